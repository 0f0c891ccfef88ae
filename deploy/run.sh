#!/bin/sh
# run.sh COMMAND FOLDER [argument ...]: run `aurora-rl COMMAND` in this folder, and go on with the run that it holds, if
# there is one.
set -eu
command=$1 run=$2
shift 2
if [ -f "$run/config.yaml" ]; then
  exec aurora-rl "$command" --resume "$run" "$@"
fi
exec aurora-rl "$command" "run_dir=$run" "$@"
