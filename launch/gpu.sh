#!/usr/bin/env bash
# A run on all GPUs of this machine: ./launch/gpu.sh --config=configs/NAME.py --workdir=DIR [...]
#
# Makes .venv with CUDA's libraries (only the driver has to be there), checks that JAX sees the
# GPUs, and starts pr2jax.main with these arguments: one process for all GPUs, which is JAX's way
# on one machine; the mesh (--config.mesh.fsdp=8 ...) says how they share the work. Restarted by
# restart.sh on exit code 75. CUDA_VISIBLE_DEVICES=0,1 leaves others out. Several machines:
# docs/pods.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/lib.sh
source launch/lib.sh

command -v nvidia-smi >/dev/null ||
  die "nvidia-smi: not found; this machine has no NVIDIA driver (launch/quickstart.sh is for CPUs)"
gpus=$(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader) ||
  die "nvidia-smi: the driver does not answer: $gpus"
[[ -n $gpus ]] || die "nvidia-smi: no GPU on this machine"
say "GPUs:" && printf '%s\n' "$gpus" >&2

export PR2JAX_EXTRAS=cuda
venv=$(project_venv)
# shellcheck disable=SC2016 # Python's
"$venv/bin/python" -c '
import sys
import jax
try:
    found = jax.devices("gpu")
except RuntimeError as error:
    sys.exit(f"error: JAX sees no GPU: {error}")
print(f"==> JAX {jax.__version__} sees {len(found)} x {found[0].device_kind}", file=sys.stderr)
' || exit 1
# XLA's flags for GPUs are set by pr2jax.main: python -m pr2jax.core.xla_flags gpu
exec ./launch/restart.sh "$venv/bin/python" -m pr2jax.main "$@"
