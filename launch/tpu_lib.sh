# Sourced by tpu.sh: every call of gcloud, and what its answers mean.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # options that tpu.sh parses, and what it reads

POLL_S=${PR2JAX_POLL_S:-30}
BACKOFF_S=${PR2JAX_BACKOFF_S:-10}
exec 3>&1 # where --dry_run prints, also from within $(...)

# pause SECONDS: a sleep that Ctrl-C ends at once.
pause() {
  [[ $dry_run ]] && return
  sleep "$1" &
  wait $!
}

# cloud ARG...: runs gcloud, or prints the command.
cloud() {
  if [[ $dry_run ]]; then
    show gcloud "$@" >&3
  else
    gcloud "$@" </dev/null 3>&-
  fi
}

# show WORD...: a command line to copy.
show() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

where() { printf -- '--project=%s\n--zone=%s\n' "$project" "$zone"; }

queued() { # queued VERB ARG...
  local verb=$1 place
  shift
  mapfile -t place < <(where)
  cloud compute tpus queued-resources "$verb" "$name" "${place[@]}" "$@"
}

node() { # node VERB ARG...
  local verb=$1 place
  shift
  mapfile -t place < <(where)
  cloud compute tpus tpu-vm "$verb" "$name" "${place[@]}" "$@"
}

# on_workers COMMAND: runs it on all workers, their output mixed.
on_workers() { node ssh --worker=all --quiet --command="$1"; }

# remote ARG...: a command line of vm.sh, quoted for the workers' shell.
remote() {
  printf 'bash pr2jax/launch/vm.sh'
  printf ' %q' "$@"
}

# retried WHAT COMMAND...: until it works, --ssh_tries times, with longer and longer pauses.
retried() {
  local what=$1 try wait_s=$BACKOFF_S code
  shift
  for ((try = 1; ; try++)); do
    code=0
    "$@" || code=$?
    ((code)) || return 0
    if ((try >= ssh_tries)); then
      complain "$what: failed $try times (gcloud's exit code $code)"
      return 1
    fi
    say "$what: failed (exit code $code), try $((try + 1)) of $ssh_tries in $wait_s s"
    pause "$wait_s"
    wait_s=$((wait_s * 2 > 300 ? 300 : wait_s * 2))
  done
}

# state: of the queued resource, GONE where there is none, UNKNOWN where gcloud does not say.
state() {
  local out code=0
  out=$(queued describe '--format=value(state.state)' 2>&1) || code=$?
  if [[ $dry_run ]]; then
    printf ACTIVE
  elif ((code == 0)); then
    printf '%s' "${out##*$'\n'}"
  elif [[ $out == *NOT_FOUND* || $out == *"not found"* ]]; then
    printf GONE
  else
    complain "queued-resources describe: $out"
    printf UNKNOWN
  fi
}

# healthy: whether the slice is there to be worked with, which the queued resource may be late to
# tell. Where gcloud does not answer it is taken to be.
healthy() {
  local found out code=0
  found=$(state)
  case $found in
    ACTIVE | UNKNOWN) ;;
    *)
      say "$name is $found"
      return 1
      ;;
  esac
  out=$(node describe '--format=value(state)' 2>&1) || code=$?
  [[ $dry_run ]] && return 0
  if ((code)); then
    [[ $out != *NOT_FOUND* && $out != *"not found"* ]] && return 0
    out=gone
  fi
  case ${out##*$'\n'} in
    PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING | HIDING | HIDDEN | gone)
      say "the nodes of $name are ${out##*$'\n'}"
      return 1
      ;;
  esac
}

# submit: asks for the slice.
submit() {
  local args out code=0
  args=(--node-id="$name" --runtime-version="$runtime_version")
  if [[ $shape == *x*x* ]]; then
    args+=(--type="$kind" --topology="$shape")
  else
    args+=(--accelerator-type="$accelerator")
  fi
  [[ $spot ]] && args+=(--spot)
  [[ $reserved ]] && args+=(--reserved)
  [[ $network ]] && args+=(--network="$network")
  [[ $service_account ]] && args+=(--service-account="$service_account")
  say "asking for $topology (${spot:+spot}${reserved:+reserved}$([[ $spot$reserved ]] ||
    echo on demand)) as $name in $zone"
  made=yes # even a call that fails may leave something
  if [[ $dry_run ]]; then
    queued create "${args[@]}"
    return
  fi
  out=$(queued create "${args[@]}" 2>&1) || code=$?
  ((code)) || return 0
  printf '%s\n' "$out" >&2
  case $out in
    *ALREADY_EXISTS* | *"already exists"*)
      complain "--name: $name exists already in $zone: resume, watch or delete it"
      return 1
      ;;
  esac
  [[ $(state) == GONE ]] && made=''
  case $out in
    *[Qq]uota* | *QUOTA*)
      complain "quota: project $project may not have that many ${spot:+spot }chips of $kind in" \
        "$zone; ask for more quota, or fewer chips (--topology)"
      ;;
    *[Zz]one* | *[Ll]ocation*) complain "--zone: $zone is not accepted for $kind; see above" ;;
    *ccelerator* | *[Tt]opology*)
      complain "--topology: $topology is not accepted in $zone; see above"
      ;;
    *untime*) complain "--runtime_version: $runtime_version is not accepted; see above" ;;
    *PERMISSION_DENIED*) complain "--project: $project: no permission; see above" ;;
    *) complain "queued-resources create: see above" ;;
  esac
  return 1
}

# wait_active: until the slice is there. 1: it failed; 3: --max_wait_hours are over.
wait_active() {
  local found last='' deadline=$((SECONDS + max_wait_s)) unknown=0
  while true; do
    found=$(state)
    [[ $found == "$last" ]] || say "$name is $found"
    last=$found
    case $found in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | GONE)
        complain "$name is $found before it could be used"
        return 1
        ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        if ((unknown >= ssh_tries)); then return 1; fi
        ;;
      *) unknown=0 ;;
    esac
    if ((SECONDS >= deadline)); then
      complain "$name is still $found after $max_wait_hours hours: no chips of $kind were free"
      return 3
    fi
    pause "$POLL_S"
  done
}

# remove: deletes the request and its nodes; nothing to delete is as good.
remove() {
  local out try code
  for ((try = 1; try <= ssh_tries; try++)); do
    code=0
    out=$(queued delete --force --quiet 2>&1) || code=$?
    if ((code == 0)) || [[ $out == *NOT_FOUND* || $out == *"not found"* ]]; then
      made=''
      say "$name in $zone: deleted$([[ $code == 0 ]] || echo ' before')"
      return 0
    fi
    pause "$BACKOFF_S"
  done
  printf '%s\n' "$out" >&2
  complain "could not delete $name"
  return 1
}

# ship: brings the committed code to the workers, and sets them up.
ship() {
  local archive place
  mapfile -t place < <(where)
  archive=runs/tpu/$name.tar.gz
  local pack=(git archive --format=tar.gz --output="$archive" "$commit")
  if [[ $dry_run ]]; then
    show "${pack[@]}" >&3
  else
    mkdir -p runs/tpu || die "runs/tpu: cannot be made"
    "${pack[@]}" || die "could not write $archive"
  fi
  say "bringing commit ${commit:0:10} to all workers and setting them up (minutes, the first time)"
  retried "copying the code" cloud compute tpus tpu-vm scp "$archive" "$name:pr2jax.tar.gz" \
    "${place[@]}" --worker=all --quiet || return 1
  retried "setting up" on_workers "mkdir -p pr2jax && tar -xzf pr2jax.tar.gz -C pr2jax && $(
    remote setup "$bucket"
  )"
}
