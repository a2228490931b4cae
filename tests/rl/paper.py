"""The policy loss of every member of the family as it is written on paper, in float64 loops."""

import numpy as np


def on_paper(new, frozen, old, behavior, ref, mask, adv, cfg):
    """(loss, how many tokens each bound stopped); [B, T] in input alignment, advantages [B].

    What a stop-gradient holds is computed from `frozen`, so that differences of `new` are the
    gradient.
    """
    new, frozen, old, behavior, ref, mask, adv = (
        np.asarray(x, np.float64) for x in (new, frozen, old, behavior, ref, mask, adv)
    )
    rows = [b for b in range(len(mask)) if mask[b].any()]
    total, seen = 0.0, {"low": 0, "high": 0, "dual": 0, "capped": 0}
    below, above = 1 - cfg.clip_low, 1 + cfg.clip_high

    def ratio(x, b, t):
        places = [t] if cfg.ratio == "token" else np.flatnonzero(mask[b])
        return np.exp(np.mean([x[b, s] - old[b, s] for s in places]))

    for b in rows:
        places, a = np.flatnonzero(mask[b]), adv[b]
        for t in places:
            if cfg.surrogate == "cispo":
                w = ratio(frozen, b, t)
                term = -min(max(w, below), above) * a * new[b, t]
                seen["low"] += w < below
                seen["high"] += w > above
            else:
                r = ratio(new, b, t)
                gain = min(r * a, min(max(r, below), above) * a)
                seen["low"] += a < 0 and r < below
                seen["high"] += a > 0 and r > above
                if cfg.dual_clip and a < 0:
                    seen["dual"] += cfg.dual_clip * a > gain
                    gain = max(gain, cfg.dual_clip * a)
                term = -gain
            if cfg.tis_cap:
                which = [t] if cfg.tis_level == "token" else places
                w = np.exp(sum(old[b, s] - behavior[b, s] for s in which))
                seen["capped"] += (w > cfg.tis_cap) / len(which)  # of tokens, or of sequences
                term *= min(w, cfg.tis_cap)
            d = new[b, t] - ref[b, t]
            kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[cfg.kl_estimator]
            if cfg.kl_importance:
                kl *= np.exp(new[b, t] - old[b, t])
            share = {
                "token_mean": mask.sum(),
                "sequence_mean": len(places) * len(rows),
                "fixed": cfg.sampling.max_tokens * len(rows),
            }[cfg.aggregation]
            total += (term + cfg.kl_coef * kl) / share
    return total, seen
