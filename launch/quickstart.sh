#!/usr/bin/env bash
# From a fresh clone to a trained model and its report: makes .venv, installs, runs the quickstart.
# Arguments go to pr2jax.main: ./launch/quickstart.sh --workdir=DIR --config.section.key=value
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

venv=$(project_venv)
exec "$venv/bin/python" -m pr2jax.main --config=configs/quickstart.py --workdir=runs/quickstart "$@"
