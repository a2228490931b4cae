#!/usr/bin/env bash
# Runs on Cloud TPU slices: from a request to a finished run, over preemptions.
#
#   ./launch/tpu.sh COMMAND --project=P --zone=Z --name=N [options] [-- --config.key=value ...]
#
#   create   asks for the slice and waits until it is there
#   setup    brings the committed code to all workers and makes their environment
#   run      starts the config on all workers and stays with it until it is finished
#   resume   the same for a slice whose job may be running, or has ended: attaches, or goes on
#   watch    all of it: creates, sets up, runs; after a preemption once more; deletes at the end
#   status   the slice's state and the workers'
#   logs     the workers' last lines (--lines=N), or all that comes (--follow)
#   delete   stops the bill; nothing to delete is as good
#
#   --topology=v5p:4x4x4     chips, as for --compile_only (create, watch; run: for the memory check)
#   --config=configs/NAME.py --workdir=gs://BUCKET/PATH     (run, resume, watch, setup)
#   --spot | --reserved      else on demand
#   --runtime_version=V      of the VMs (default: by the kind of chip)
#   --network=N  --service_account=S                        given to the VMs
#   --commit=C               what is brought there (default: HEAD)
#   --max_recreations=N (20) --max_hours=H (72) --max_wait_hours=H (24: waiting for chips)
#   --ssh_tries=N (6)        of a call that fails
#   --restarts=N (3)         of a job that restart.sh on the workers gave up
#   --keep                   watch leaves the slice when it ends; create, when chips never came
#   --skip_memory_check      does not compile the run for the chips before they are billed
#   --dry_run                prints every gcloud command and runs none
#
# Exit codes: 0 finished, 1 failed, 2 bad input or config, 75 a limit was reached and the same
# command goes on, 130 Ctrl-C (the job and the bill go on). PR2JAX_POLL_S (30) and
# PR2JAX_BACKOFF_S (10) are its pauses in seconds. More: docs/pods.md
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=launch/lib.sh
source launch/lib.sh
# shellcheck source=launch/tpu_lib.sh
source launch/tpu_lib.sh
# shellcheck source=launch/tpu_job.sh
source launch/tpu_job.sh

EXIT_BAD=2 EXIT_LIMIT=75
complain() { printf 'error: %s\n' "$*" >&2; }
bad() {
  complain "$@"
  exit "$EXIT_BAD"
}

project='' zone='' name='' topology='' config='' workdir='' runtime_version='' spot='' reserved=''
network='' service_account='' commit=HEAD keep='' dry_run='' skip_memory_check='' follow=''
max_recreations=20 max_hours=72 max_wait_hours=24 ssh_tries=6 restarts=3 lines=50
made='' scratch='' extra=()

command=${1:-}
case $command in
  create | setup | run | watch | resume | status | logs | delete) shift ;;
  -h | --help | help | '')
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' launch/tpu.sh
    exit 0
    ;;
  *) bad "no command $command: create, setup, run, resume, watch, status, logs or delete" ;;
esac
while (($#)); do
  key=${1%%=*} value=${1#*=}
  case $1 in
    --spot | --reserved | --keep | --dry_run | --skip_memory_check | --follow)
      printf -v "${1#--}" yes
      ;;
    --project=* | --zone=* | --name=* | --topology=* | --config=* | --workdir=* | \
      --runtime_version=* | --network=* | --service_account=* | --commit=* | \
      --max_recreations=* | --max_hours=* | --max_wait_hours=* | --ssh_tries=* | \
      --restarts=* | --lines=*) printf -v "${key#--}" %s "$value" ;;
    --config.*) extra+=("$1") ;;
    --)
      shift
      extra+=("$@")
      break
      ;;
    *) bad "$key: no such option (arguments of the run go after --); ./launch/tpu.sh help" ;;
  esac
  shift
done

needs() { # needs OPTION...: of this command
  local option
  for option in "$@"; do
    [[ ${!option} ]] || bad "--$option: missing; $command needs it"
  done
}

matches() { # matches OPTION PATTERN LIKE
  [[ ${!1} =~ ^($2)$ ]] || bad "--$1: '${!1}' is not like $3"
}

check_input() {
  needs project zone name
  matches project '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' my-project-123
  matches zone '[a-z]+-[a-z]+[0-9]+-[a-z]' us-east5-a
  matches name '[a-z]([a-z0-9-]{0,60}[a-z0-9])?' my-run
  local option
  for option in max_recreations ssh_tries restarts lines; do matches "$option" '[0-9]+' 3; done
  for option in max_hours max_wait_hours; do matches "$option" '[0-9]+(\.[0-9]+)?' 12; done
  ((ssh_tries)) || bad "--ssh_tries: must be at least 1"
  max_s=$(awk "BEGIN { print int($max_hours * 3600) }")
  max_wait_s=$(awk "BEGIN { print int($max_wait_hours * 3600) }")
  [[ $spot && $reserved ]] && bad "--spot: not with --reserved: a slice is one or the other"
  [[ $dry_run ]] || command -v gcloud >/dev/null ||
    bad "gcloud: not found; install the Google Cloud CLI, then: gcloud auth login"
  case $command in create | watch) needs topology ;; esac
  case $command in run | resume | watch) needs config workdir ;; esac
  case $command in setup) needs workdir ;; esac
  if [[ $topology ]]; then check_topology; fi
  if [[ $workdir ]]; then
    matches workdir 'gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[^/].*)?' gs://bucket/folder
    bucket=${workdir#gs://} bucket=${bucket%%/*}
  fi
  if [[ $config ]]; then
    [[ -f ${config%%:*} ]] || bad "--config: no file ${config%%:*}"
    [[ $config == configs/* ]] ||
      bad "--config: $config is not under configs/: the workers have only what git has"
  fi
  case $command in setup | watch) check_commit ;; esac
}

check_topology() {
  matches topology '(v4|v5e|v5p|v6e):[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' v5p:4x4x4
  kind=${topology%%:*} shape=${topology#*:}
  local chips=$((${shape//x/*})) version
  case $kind:$shape in
    v4:*x*x* | v5p:*x*x*) accelerator=$kind-$((chips * 2)) ;;
    v4:* | v5p:*) bad "--topology: a $kind slice has three dimensions, like $kind:4x4x4" ;;
    v5e:*x*x* | v6e:*x*x*) bad "--topology: a $kind slice has two dimensions, like $kind:4x4" ;;
    v5e:*) accelerator=v5litepod-$chips ;;
    v6e:*) accelerator=v6e-$chips ;;
  esac
  # Of two-dimensional slices a type is a number of chips, which has one shape.
  if [[ $shape != *x*x* ]]; then
    case $shape in
      1x1 | 2x2 | 2x4 | 4x4 | 4x8 | 8x8 | 8x16 | 16x16) ;;
      *) bad "--topology: $kind comes as 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16" ;;
    esac
  fi
  case $kind in
    v4) version=tpu-ubuntu2204-base ;;
    v5e) version=v2-alpha-tpuv5-lite ;;
    v5p) version=v2-alpha-tpuv5 ;;
    v6e) version=v2-alpha-tpuv6e ;;
  esac
  runtime_version=${runtime_version:-$version}
}

check_commit() {
  commit=$(git rev-parse --verify --quiet "$commit^{commit}") || bad "--commit: git has no such one"
  [[ ! $config ]] || git cat-file -e "$commit:${config%%:*}" 2>/dev/null ||
    bad "--config: ${config%%:*} is not in commit ${commit:0:10}, which the workers get: commit it"
  [[ -z $(git status --porcelain --untracked-files=no) ]] ||
    say "changes that are not committed stay here: the workers get commit ${commit:0:10}"
}

# memory_check: whether the config loads, and the run fits the chips, by their own compiler where
# libtpu is installed, else by arithmetic.
memory_check() {
  local python how code=0
  scratch=$(mktemp -d)
  python=${PR2JAX_PYTHON:-}
  [[ $python ]] || python=$(project_venv)/bin/python || exit 1
  how=--estimate
  if [[ ! $skip_memory_check ]]; then
    if "$python" -c 'import libtpu' 2>/dev/null; then
      how=--compile_only
    else
      say 'no libtpu here: memory by estimate (pip install "jax[tpu]" compiles the run itself)'
    fi
  fi
  say "pr2jax.main $how --config=$config --topology=$topology"
  "$python" -m pr2jax.main --config="$config" --workdir="$scratch" "$how" \
    --topology="$topology" ${extra[@]+"${extra[@]}"} >&2 || code=$?
  rm -rf "$scratch"
  scratch=''
  ((code != 2)) || bad "--config: $config does not load, see above; nothing was created or started"
  ((code == 0)) || [[ $skip_memory_check ]] ||
    bad "memory: $config does not fit $topology, see above; nothing was created or started" \
      "(--skip_memory_check goes on all the same)"
}

remains() { # on every way out: what still costs
  local code=$?
  trap - EXIT
  [[ ! $scratch ]] || rm -rf "$scratch"
  if [[ $made && ! $dry_run && $command != status && $command != logs ]]; then
    say "$name in $zone is (or may be) still there, and billed while it is. To delete it:"
    say "  ./launch/tpu.sh delete --project=$project --zone=$zone --name=$name"
  fi
  exit "$code"
}

if [[ $dry_run ]]; then say() { printf '==> (dry run) %s\n' "$*" >&2; }; fi
check_input
trap remains EXIT
trap 'say "stopped watching; a job that was started goes on"; exit 130' INT TERM
if [[ $config && $topology && ! $dry_run ]]; then memory_check; fi

case $command in
  create)
    submit || exit 1
    code=0
    wait_active || code=$?
    ((code == 0)) || [[ $keep ]] || remove
    ((code == 3)) && exit "$EXIT_LIMIT"
    exit "$code"
    ;;
  setup) made=yes && ship || exit 1 ;;
  run | resume)
    made=yes
    run_job "$command"
    ;;
  watch) watch ;;
  status)
    say "$name is $(state)"
    on_workers "$(remote state)"
    ;;
  logs)
    if [[ $follow ]]; then on_workers "$(remote logs follow)"; else
      on_workers "$(remote logs "$lines")"
    fi
    ;;
  delete) remove ;;
esac
