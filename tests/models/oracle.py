"""The transformer again, in float64 numpy, a token at a time where that is plainer."""

import jax
import numpy as np

from pr2jax.models.config import block_specs, segments

# Tests compile many small programs and run each once: skip LLVM's optimizations.
QUICK = {"xla_backend_optimization_level": 0}


def compiled(fn, **options):
    """jax.jit with a cheap compilation."""
    return jax.jit(fn, compiler_options=QUICK, **options)


def to64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def layer_params(params, cfg):
    """One parameter dict a layer, bottom first, in float64."""
    out = []
    for i, segment in enumerate(segments(cfg)):
        for r in range(segment.repeats):
            for j in range(len(segment.pattern)):
                block = to64(params[f"segment_{i}"][f"block_{j}"])
                out.append(jax.tree.map(lambda a, r=r: a[r], block))
    return out


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def top_k(x, k):
    """Best first, ties to the lower id."""
    return np.argsort(-x, axis=-1, kind="stable")[..., :k]


def mlp(p, x):
    return (silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def rope(x, positions, theta):
    """x [T, H, d] rotated by position; halves against each other."""
    d = x.shape[-1]
    angle = positions[:, None] / theta ** (np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(p, x, positions, segment_ids, cfg, window):
    """One row [T, D]: head by head, query by query."""
    t = x.shape[0]
    heads = {}
    for name in "qkv":
        y = np.einsum("td,dhe->the", x, p[name]["kernel"])
        if "bias" in p[name]:
            y = y + p[name]["bias"]
        if name != "v" and cfg.qk_norm == "full":
            y = norm(y.reshape(t, -1), p[f"{name}_norm"]["scale"], cfg.norm_eps).reshape(y.shape)
        if cfg.clip_qkv:
            y = np.clip(y, -cfg.clip_qkv, cfg.clip_qkv)
        if name != "v" and cfg.qk_norm == "head":
            y = norm(y, p[f"{name}_norm"]["scale"], cfg.norm_eps)
        heads[name] = y if name == "v" else rope(y, positions, cfg.rope_theta)
    out = np.zeros((t, cfg.num_heads, cfg.head_dim))
    share = cfg.num_heads // cfg.num_kv_heads
    for h in range(cfg.num_heads):
        for i in range(t):
            seen = [
                j
                for j in range(i + 1)
                if segment_ids[j] == segment_ids[i] and (not window or i - j < window)
            ]
            q, k = heads["q"][i, h], heads["k"][seen, h // share]
            out[i, h] = softmax(k @ q / np.sqrt(cfg.head_dim)) @ heads["v"][seen, h // share]
    y = np.einsum("the,hed->td", out, p["o"]["kernel"])
    return y + p["o"]["bias"] if "bias" in p["o"] else y


def select(logits, bias, moe):
    """Expert ids of one token from its selection logits [E]."""
    if bias is None and moe.num_groups == 1:
        return top_k(logits, moe.top_k)
    choice = softmax(logits) if moe.score == "softmax" else sigmoid(logits)
    if bias is not None:
        choice = choice + bias
    if moe.num_groups > 1:
        groups = choice.reshape(moe.num_groups, -1)
        best = top_k(np.sort(groups, -1)[:, -2:].sum(-1), moe.top_groups)
        for g in set(range(moe.num_groups)) - set(best):
            groups[g] = -np.inf
        choice = groups.reshape(-1)
    return top_k(choice, moe.top_k)


def gates(logits, ids, moe):
    """Gate of each used expert of one token."""
    if moe.normalize == "pre":
        w = softmax(logits[ids])
    else:
        w = (softmax(logits) if moe.score == "softmax" else sigmoid(logits))[ids]
        if moe.normalize == "post":
            w = w / w.sum()
    return w * moe.routed_scaling


def moe_layer(p, x, moe, routes=None, shift=None, real=None):
    """One row [T, D] -> (y, ids [T, K], logits [T, E]), token by token, expert by expert.

    Tokens that are not `real` are routed, and sent to no expert.
    """
    logits = x @ p["router"]["kernel"]
    moved = logits if shift is None else logits + x @ shift
    ids = np.zeros((len(x), moe.top_k), int)
    y = np.zeros_like(x)
    for t in range(len(x)):
        bias = p["router"].get("selection_bias")
        ids[t] = select(moved[t], bias, moe) if routes is None else routes[t]
        sent = real is None or real[t]
        for e, w in zip(ids[t], gates(logits[t], ids[t], moe), strict=True) if sent else ():
            y[t] += w * mlp({n: p["experts"][n][e] for n in ("gate", "up", "down")}, x[t])
        if "shared" in p:
            y[t] += mlp(p["shared"], x[t])
    return y, ids, logits


def forward(params, tokens, positions, segment_ids, cfg, routes=None, shift=None):
    """hidden [B, T, D], routes [L, B, T, K], router logits [L, B, T, E], inputs [L, B, T, D]."""
    hidden, all_ids, all_logits, all_inputs = [], [], [], []
    layers = layer_params(params, cfg)
    for b in range(len(tokens)):
        x = np.asarray(params["embed"]["table"], np.float64)[tokens[b]]
        ids, logits, inputs = [], [], []
        for p, spec in zip(layers, block_specs(cfg), strict=True):
            h = norm(x, p["attention_norm"]["scale"], cfg.norm_eps)
            x = x + attend(p["attention"], h, positions[b], segment_ids[b], cfg, spec.window)
            h = norm(x, p["ffn_norm"]["scale"], cfg.norm_eps)
            if spec.moe:
                n = len(ids)
                forced = None if routes is None else routes[n][b]
                own = None if shift is None else shift[n]
                real = np.asarray(segment_ids[b]) > 0
                y, i, g = moe_layer(p["moe"], h, cfg.moe, forced, own, real)
                ids.append(i)
                logits.append(g)
                inputs.append(h)
            else:
                y = mlp(p["ffn"], h)
            x = x + y
        hidden.append(norm(x, np.asarray(params["final_norm"]["scale"], np.float64), cfg.norm_eps))
        all_ids.append(ids)
        all_logits.append(logits)
        all_inputs.append(inputs)
    layer_first = lambda a: np.moveaxis(np.asarray(a), 1, 0)
    return np.asarray(hidden), *map(layer_first, (all_ids, all_logits, all_inputs))


def logprobs(params, hidden, targets, cfg, temperature=1.0):
    """(log-probs, entropies) [B, T] of `targets` given float64 hidden states."""
    head = params["embed"]["table"].T if cfg.tie_embeddings else params["lm_head"]["kernel"]
    p = softmax(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64) / temperature)
    logp = np.log(p)
    hit = np.take_along_axis(logp, np.asarray(targets)[..., None], -1)[..., 0]
    return hit, -(p * logp).sum(-1)
