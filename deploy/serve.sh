#!/bin/sh
# serve.sh FOLDER [key=value ...]: serve in this folder, and go on with the run that it holds, if there is one.
set -eu
run=$1
shift
if [ -f "$run/config.yaml" ]; then
  exec aurora-rl serve --resume "$run" "$@"
fi
exec aurora-rl serve "run_dir=$run" "$@"
