#!/usr/bin/env bash
# Makes the environments and runs the tests. Arguments go to pytest: ./launch/test.sh tests/core -x
#
# Tests against torch and transformers run those in a second environment, .venv-ref (or the one
# whose interpreter PR2JAX_REFERENCE_PYTHON names); where it cannot be made they are skipped, and
# counted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

venv=$(project_venv test)
if [[ -z ${PR2JAX_REFERENCE_PYTHON:-} ]]; then
  if python=$(find_python 3.11 3.12 3.13) &&
    make_venv .venv-ref "$python" tests/reference/requirements.txt \
      --requirement tests/reference/requirements.txt; then
    export PR2JAX_REFERENCE_PYTHON=$PWD/.venv-ref/bin/python
  else
    rm -rf .venv-ref
    say "could not make .venv-ref (torch, transformers): tests against them are skipped"
  fi
fi
exec "$venv/bin/python" -m pytest "$@"
