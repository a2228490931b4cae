# Sourced by tpu.sh: a job on all workers of a slice, and slices one after the other.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # options that tpu.sh parses, and what it reads

# How a job ended: FINISHED and the exit codes of pr2jax.main, or
JOB_GONE=90   # the slice is not there any more
JOB_SILENT=91 # its workers do not answer, though it is

# start_job: on all workers. Their order to restart, and its limits, is restart.sh's.
start_job() {
  local line
  line=$(remote start "${workdir%/}" --config="$config" ${extra[@]+"${extra[@]}"})
  say "starting $config on all workers"
  retried "starting the job" on_workers "$line"
}

# workers: how many the slice has.
workers() {
  local out
  out=$(node describe '--format=value(networkEndpoints.ipAddress)' 2>/dev/null) || return 1
  [[ $dry_run ]] && out=dry
  [[ $out ]] || return 1
  tr -s ';, ' '\n' <<<"$out" | grep -c .
}

# poll_job: takes new log lines off the workers, and prints "STATE:CODE" of each.
poll_job() {
  local out code=0
  out=$(on_workers "$(remote poll)" 2>"$scratch/err") || code=$?
  if [[ $dry_run ]]; then
    printf 'ended:0\n'
    return
  fi
  if ((code)); then
    tail -n 3 "$scratch/err" >&2
    return 1
  fi
  grep -av -e '^pr2jax-status ' -e '^$' <<<"$out" | tee -a "$log_file" >&2
  sed -n 's/^pr2jax-status [^ ]* \([a-z]*\) \([^ ]*\)$/\1:\2/p' <<<"$out"
}

# verdict STATE:CODE...: of all workers' ends one: a bad configuration, then "resume me", then any
# failure, then finished.
verdict() {
  local one code found=0
  for one in "$@"; do
    code=${one#*:}
    case $code in
      75) [[ $found == 2 ]] || found=75 ;;
      2) found=2 ;;
      0) ;;
      *) [[ $found != 0 ]] || found=${code/-/1} ;;
    esac
  done
  printf '%s' "$found"
}

# follow_job: until all workers have ended. Returns their verdict, JOB_GONE or JOB_SILENT. Where
# some have ended and others go on (they know nothing of it), these are stopped after 10 polls.
follow_job() {
  local count reports running ended none silent=0 lingering=0 stopped=''
  count=$(workers) || count=1
  while true; do
    ((SECONDS < deadline)) || return "$EXIT_LIMIT"
    if ! reports=$(poll_job); then
      healthy || return "$JOB_GONE"
      silent=$((silent + 1))
      ((silent < ssh_tries)) || return "$JOB_SILENT"
      say "the workers do not answer, try $((silent + 1)) of $ssh_tries"
      pause "$BACKOFF_S"
      continue
    fi
    silent=0
    mapfile -t reports <<<"$reports"
    running=0 ended=0 none=0
    for report in "${reports[@]}"; do
      case $report in
        running:*) running=$((running + 1)) ;;
        none:*) none=$((none + 1)) ;;
        ?*) ended=$((ended + 1)) ;;
      esac
    done
    if ((running == 0 && ended + none >= count)); then
      ((none == 0)) || return 1
      return "$(verdict "${reports[@]}")"
    fi
    healthy || return "$JOB_GONE"
    if ((ended)); then lingering=$((lingering + 1)); else lingering=0; fi
    if ((lingering >= 10)) && [[ ! $stopped ]]; then
      say "$ended of $count workers have ended, the others are told to"
      on_workers "$(remote stop)" || true
      stopped=yes
    fi
    pause "$POLL_S"
  done
}

# do_job: starts it and follows it, again after 75, and --restarts times after other failures.
do_job() {
  local code tries=0 resumed=0 wait_s=$BACKOFF_S
  while true; do
    if ! start_job; then
      healthy || return "$JOB_GONE"
      return "$JOB_SILENT"
    fi
    code=0
    follow_job || code=$?
    case $code in
      0 | "$JOB_GONE" | "$JOB_SILENT") return "$code" ;;
      2)
        # A slice that is being taken away fails in many ways: is it still there?
        pause "$POLL_S"
        healthy || return "$JOB_GONE"
        return 2
        ;;
    esac
    ((SECONDS < deadline)) || return "$EXIT_LIMIT"
    healthy || return "$JOB_GONE"
    if ((code == 75)); then
      resumed=$((resumed + 1))
      ((resumed <= 100)) || return 75
      say "the workers ended with 75: the same command goes on, on all of them"
      continue
    fi
    tries=$((tries + 1))
    if ((tries > restarts)); then
      complain "the job failed $tries times, the last time with exit code $code"
      return 1
    fi
    say "the job ended with exit code $code: restart $tries of $restarts in $wait_s s"
    pause "$wait_s"
    wait_s=$((wait_s * 2))
  done
}

prepare_job() { # a scratch folder, the log, the end of its time
  scratch=$(mktemp -d)
  log_file=runs/tpu/$name.log
  deadline=$((SECONDS + max_s))
  [[ $dry_run ]] && return
  mkdir -p "$(dirname "$log_file")" || die "$log_file: cannot be written"
  say "the workers' lines go to $log_file"
}

tell_end() { # tell_end CODE: in words, as the script's exit code
  case $1 in
    0) say "finished; its files are in $workdir" ;;
    2) complain "the run refused its configuration (exit code 2), see above; it is not retried" ;;
    "$EXIT_LIMIT") complain "stopped following it: --max_hours=$max_hours are over, or it made no" \
      "headway; the same command goes on" ;;
    "$JOB_GONE") complain "the slice is gone; watch creates it anew" ;;
    "$JOB_SILENT") complain "ssh: the workers do not answer, though the slice is there; the job may" \
      "be running" ;;
    *) complain "the run failed, see above and $log_file" ;;
  esac
  case $1 in
    0 | 2 | "$EXIT_LIMIT") return "$1" ;;
    "$JOB_GONE") return "$EXIT_LIMIT" ;;
    *) return 1 ;;
  esac
}

job_runs() { [[ $(poll_job) == *running:* ]]; }

# run_job run|resume: on a slice that is there. A job that is running is gone on with by resume.
run_job() {
  local code=0 found
  prepare_job
  if [[ ! $dry_run ]]; then
    found=$(state)
    case $found in
      ACTIVE | UNKNOWN) ;;
      *)
        [[ $found == GONE ]] && made=''
        die "--name: $name is $found, so nothing can run there; create it, or watch"
        ;;
    esac
    if [[ $1 == run ]] && job_runs; then
      die "--name: a job is running on $name already; resume stays with it"
    fi
  fi
  do_job || code=$?
  tell_end "$code"
  exit $?
}

# give_up CODE: the end of watch; the slice is deleted unless it is to be kept.
give_up() {
  local code=$1
  [[ $keep ]] || remove || code=1
  exit "$code"
}

# One slice after the other until the job has ended.
watch() {
  local found code recreated=0
  prepare_job
  while true; do
    ((SECONDS < deadline)) || {
      complain "--max_hours: $max_hours are over; the same command goes on"
      give_up "$EXIT_LIMIT"
    }
    found=GONE
    [[ $dry_run ]] || found=$(state)
    case $found in
      GONE)
        submit || exit 1
        ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        made=yes
        say "$name is $found: deleting it"
        remove || exit 1
        again || give_up "$EXIT_LIMIT"
        continue
        ;;
      *) made=yes ;;
    esac
    code=0
    wait_active || code=$?
    if ((code == 3)); then give_up "$EXIT_LIMIT"; fi
    if ((code == 0)); then
      if { [[ $found == ACTIVE ]] && job_runs; } || ship; then
        do_job || code=$?
      elif healthy; then
        complain "the workers could not be set up"
        give_up 1
      else
        code=$JOB_GONE
      fi
    else
      code=$JOB_GONE
    fi
    if ((code == JOB_GONE)); then
      remove || exit 1
      again || give_up "$EXIT_LIMIT"
      continue
    fi
    # A job that may be running is not deleted under its feet.
    if ((code == JOB_SILENT)); then keep=yes; fi
    found=0
    tell_end "$code" || found=$?
    give_up "$found"
  done
}

# again: whether a slice may be created once more.
again() {
  recreated=$((recreated + 1))
  if ((recreated > max_recreations)); then
    complain "--max_recreations: $max_recreations were not enough; the same command goes on"
    return 1
  fi
  say "recreation $recreated of $max_recreations"
  pause "$BACKOFF_S"
}
