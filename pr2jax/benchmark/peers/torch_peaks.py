"""What torch reaches here: matrix products of the shapes that matter, and memory bandwidth."""

import torch
from torch_common import DTYPES, timed, use_all_cores, versions


def product(name, dims):
    """The operation of shape `name` on tensors of `dims` as jobs/peaks.py makes them."""
    draw = lambda *shape: torch.randn(*shape)
    if name == "weight_gradient":
        m, k, n = dims
        return (draw(k, m), draw(k, n)), lambda x, y: x.mT @ y
    if len(dims) == 4:
        e, m, k, n = dims
        return (draw(e, m, k), draw(e, k, n)), torch.bmm
    m, k, n = dims
    return (draw(m, k), draw(k, n)), torch.mm


def serve(channel, params):
    """params: shapes [[name, dims, inner]], dtypes, copy_bytes, repeats."""
    use_all_cores()
    operations = {}
    for name, dims, inner in params["shapes"]:
        operands, fn = product(name, dims)
        flops = 2 * inner
        for d in dims:
            flops *= d
        for dtype in params["dtypes"]:
            x, y = (o.to(DTYPES[dtype]) for o in operands)
            operations[f"{name}/{dtype}"] = (flops, inner, lambda x=x, y=y, fn=fn: fn(x, y))
    block = torch.ones(params["copy_bytes"] // 4)

    def repeat(count, fn):
        for _ in range(count):
            fn()

    @torch.inference_mode()
    def measure(message):
        rates = {}
        for key, (flops, inner, fn) in operations.items():
            repeat(inner, fn)
            rates[key] = flops / min(
                timed(lambda: repeat(inner, fn))[0]  # noqa: B023
                for _ in range(params["repeats"])
            )
        block.add_(1.0)
        best = min(timed(lambda: block.add_(1.0))[0] for _ in range(params["repeats"]))
        rates["memory"] = 2 * params["copy_bytes"] / best
        return {"rates": rates}

    channel.loop({"versions": versions()}, measure)
