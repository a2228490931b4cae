"""What the peers that use torch share. Nothing here, nor beside it, knows pr2jax."""

import os
import time

import torch

# transformers' "Experts backends" page: on CPU `grouped_mm` (the default) is best, `eager` comes
# next, `batched_mm` is not recommended. The fastest is measured, per workload and precision.
EXPERTS = ("eager", "grouped_mm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def use_all_cores():
    """A thread for each core that this process may run on; how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores)
    return cores


def load_model(folder, dtype):
    """The checkpoint with sdpa attention, in `dtype`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", experts_implementation=EXPERTS[0]
    )


def versions():
    """Of what the figures were made with."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def timed(run):
    """(seconds, result) of run()."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def fastest(candidates, prepare, run, tries=2):
    """The candidate whose run() is fastest after one warm-up: (candidate, {str: seconds}).

    `prepare(candidate)` sets it up; of `tries` runs the quickest counts. One whose warm-up takes
    over four times as long as another's run is out with that figure (they differ by ten and more).
    """
    seconds = {}
    for candidate in candidates:
        prepare(candidate)
        warm = timed(run)[0]
        if seconds and warm > 4 * min(seconds.values()):
            seconds[candidate] = warm
        else:
            seconds[candidate] = min(timed(run)[0] for _ in range(tries))
    best = min(seconds, key=seconds.get)
    prepare(best)
    return best, {str(candidate): value for candidate, value in seconds.items()}


def matmul_peak(dtype, size=2048, repeats=3):
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(timed(lambda: a @ b)[0] for _ in range(repeats))
