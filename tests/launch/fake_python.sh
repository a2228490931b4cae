#!/usr/bin/env bash
# An interpreter that installs nothing: makes "environments" of itself, and its pr2jax.main ends
# with the codes that FAKE_GCLOUD/codes lists, one a line, a line for every start of a worker
# (0 after the last). "hang" is a run that goes on; "sigterm", one that ends with 75 when told.
case "$*" in
  --version) echo "Python 3.12.0" ;;
  "-m venv"*)
    dir=${!#}
    mkdir -p "$dir/bin"
    cp "$0" "$dir/bin/python"
    ;;
  "-m pr2jax.main"*)
    if [[ "$*" == *--compile_only* || "$*" == *--estimate* ]]; then
      echo "memory check: $*" >>"$FAKE_GCLOUD/checks"
      exit "$(cat "$FAKE_GCLOUD/memory" 2>/dev/null || echo 0)"
    fi
    # Counted over all slices, since a run is gone on with on the next one.
    count=$FAKE_GCLOUD/count$FAKE_WORKER
    echo "$*" >>"$count"
    echo "start $(wc -l <"$count"): $*"
    code=$(sed -n "$(wc -l <"$count")p" "$FAKE_GCLOUD/codes" 2>/dev/null)
    case ${code:-0} in
      hang) exec sleep 600 ;;
      sigterm)
        trap 'exit 75' TERM
        sleep 600 &
        wait
        ;;
      *) exit "${code:-0}" ;;
    esac
    ;;
  *check_writable*)
    if [[ -e $FAKE_GCLOUD/denied ]]; then
      echo "StorageError: ${!#}: cannot be written: Forbidden" >&2
      exit 1
    fi
    ;;
  *) exit 0 ;;
esac
