#!/usr/bin/env bash
# What launch/tpu.sh runs on every worker of a TPU slice. Not for other machines.
#   vm.sh setup BUCKET         finds or installs Python, makes .venv, writes to the bucket
#   vm.sh start WORKDIR ARG..  starts `python -m pr2jax.main ARG..` under restart.sh, detached
#   vm.sh poll                 log lines since the last poll, then "pr2jax-status HOST STATE CODE"
#   vm.sh state                only the latter
#   vm.sh logs N | follow      the last N lines, or all that comes
#   vm.sh stop                 ends the job: SIGTERM, so that it saves
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

export PATH=$HOME/.local/bin:$PATH PR2JAX_EXTRAS=tpu,gcs
run_dir=$HOME/pr2jax_run
host=${HOSTNAME:-$(hostname)}

# Images of TPU VMs come with Python 3.10. uv (of the user's own pip) brings 3.12.
ensure_python() {
  if find_python 3.12 3.13 3.11 >/dev/null; then return; fi
  say "no Python of 3.11 or later: uv installs 3.12 into $HOME/.local"
  python3 -m pip install --quiet --user uv || die "$host: could not install uv"
  uv python install 3.12 || die "$host: uv could not install Python 3.12"
  ln -sf "$(uv python find 3.12)" "$HOME/.local/bin/python3.12"
}

# check_bucket BUCKET: this worker can write there.
check_bucket() {
  .venv/bin/python -c 'import sys
from pr2jax.core.files import check_writable
check_writable(sys.argv[1])' "gs://$1" ||
    die "$host: gs://$1: see above; does it exist, and may the VM's service account write it?"
}

# alive: the job runs. Its code is the last that it leaves, and a number may be another's by now.
alive() {
  [[ -f $run_dir/pid && ! -f $run_dir/code ]] &&
    grep -aqs 'vm\.sh' "/proc/$(<"$run_dir/pid")/cmdline"
}

start() {
  local workdir=$1
  shift
  if alive; then
    say "$host: the job is running already"
    return
  fi
  mkdir -p "$run_dir"
  rm -f "$run_dir/code"
  printf '%s\n' "$workdir" >"$run_dir/workdir"
  # Detached, so that it outlives this connection.
  setsid nohup bash launch/vm.sh job "$workdir" "$@" >>"$run_dir/log" 2>&1 </dev/null &
  printf '%s\n' "$!" >"$run_dir/pid"
}

# The job itself: its exit code and its log are kept, the log beside the run too, since a slice
# that is preempted takes its disks along.
job() {
  local workdir=$1 code=0 runner=''
  shift
  printf '==> %s: %s\n' "$(date -u +%FT%TZ)" "$*"
  # The next slice finds its programs compiled.
  bash launch/restart.sh .venv/bin/python -m pr2jax.main --workdir="$workdir" \
    --compilation_cache="$workdir/xla" "$@" &
  runner=$!
  trap 'woken=yes; kill -TERM "$runner" 2>/dev/null' TERM
  reap "$runner"
  printf '==> %s: ended with exit code %s\n' "$(date -u +%FT%TZ)" "$code"
  gcloud storage cp --quiet "$run_dir/log" "$workdir/launch/$host.log" || true
  printf '%s\n' "$code" >"$run_dir/code"
}

poll() {
  local told=0 size=0 state=none code=-
  if [[ ${1:-} != state && -f $run_dir/log ]]; then
    if [[ -f $run_dir/told ]]; then told=$(<"$run_dir/told"); fi
    size=$(stat -c %s "$run_dir/log")
    tail -c "+$((told + 1))" "$run_dir/log" | head -c "$((size - told))" | tail -n 2000 |
      sed "s/^/[$host] /"
    printf '%s\n' "$size" >"$run_dir/told"
  fi
  if [[ -f $run_dir/code ]]; then
    state=ended code=$(<"$run_dir/code")
  elif alive; then
    state=running
  elif [[ -f $run_dir/pid ]]; then
    state=lost # killed with all its processes: the VM was started anew
  fi
  printf '\npr2jax-status %s %s %s\n' "$host" "$state" "$code"
}

command=${1:-}
shift || true
case $command in
  setup)
    ensure_python
    project_venv >/dev/null
    check_bucket "$1"
    ;;
  start) start "$@" ;;
  job) job "$@" ;;
  poll) poll ;;
  state) poll state ;;
  logs)
    touch "$run_dir/log"
    if [[ $1 == follow ]]; then tail -n 100 -F "$run_dir/log"; else tail -n "$1" "$run_dir/log"; fi |
      sed -u "s/^/[$host] /"
    ;;
  stop) if alive; then kill -TERM "$(<"$run_dir/pid")"; fi ;;
  *) die "vm.sh: no command ${command:-given}" ;;
esac
