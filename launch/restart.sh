#!/usr/bin/env bash
# Runs a command until it is finished: ./launch/restart.sh COMMAND [ARGUMENT...]
#
# What its exit code says (pr2jax.main's):
#   0    finished
#   2    a bad configuration: never tried again
#   75   saved, "run the same command again": it is, as often as it says so, unless it ends within
#        PR2JAX_QUICK_S seconds (60) more than PR2JAX_RETRIES times (5) in a row
#   130  interrupted by hand
#   else tried again after PR2JAX_BACKOFF_S seconds (10), then twice as many, at most 10 minutes;
#        after PR2JAX_RETRIES failures (5) in a row, it is given up. A run of more than an hour
#        begins the count anew.
# Its own exit code is the command's last. SIGTERM and SIGINT (Ctrl-C) reach the command as SIGTERM,
# on which pr2jax saves, and no other start follows.
set -uo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

retries=${PR2JAX_RETRIES:-5} backoff=${PR2JAX_BACKOFF_S:-10} quick=${PR2JAX_QUICK_S:-60}
(($#)) || {
  echo "error: restart.sh: no command" >&2
  exit 2
}
tell() { printf '==> restart: %s\n' "$*" >&2; }

child='' stopped=''
stop() {
  stopped=yes woken=yes
  # Commands in the background of a script ignore SIGINT.
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

# pause SECONDS: sleeps; a signal ends it.
pause() {
  sleep "$1" &
  child=$!
  wait "$child"
  child=''
}

failures=0 fruitless=0 wait_s=$backoff
while true; do
  start=$SECONDS
  "$@" &
  child=$!
  reap "$child" # a signal to us does not end it: the command goes on until it has saved
  child=''
  took=$((SECONDS - start))
  [[ -z $stopped ]] || exit "$code"
  case $code in
    0 | 130) exit "$code" ;;
    2)
      tell "exit code 2: the configuration is wrong, it is not tried again"
      exit 2
      ;;
    75)
      failures=0 wait_s=$backoff
      if ((took >= quick)); then fruitless=0; else fruitless=$((fruitless + 1)); fi
      if ((fruitless > retries)); then
        tell "ended with 75 within $quick s, $fruitless times in a row: given up"
        exit 75
      fi
      tell "exit code 75 after $took s: going on with the same command"
      ;;
    *)
      ((took < 3600)) || failures=0 wait_s=$backoff
      failures=$((failures + 1))
      if ((failures > retries)); then
        tell "exit code $code, $failures times in a row: given up"
        exit "$code"
      fi
      tell "exit code $code after $took s: retry $failures of $retries in $wait_s s"
      pause "$wait_s"
      [[ -z $stopped ]] || exit "$code"
      wait_s=$((wait_s * 2 > 600 ? 600 : wait_s * 2))
      ;;
  esac
done
