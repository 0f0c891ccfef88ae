#!/bin/sh
# fleet.sh FOLDER --config FILE [key=value ...]: run a fleet in this folder, and go on with the run that it holds, if there
# is one.
set -eu
run=$1
shift
if [ -f "$run/config.yaml" ]; then
  exec aurora-rl fleet --resume "$run" "$@"
fi
exec aurora-rl fleet "run_dir=$run" "$@"
