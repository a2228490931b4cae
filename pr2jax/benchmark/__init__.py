"""Measured speed, beside the tools that people know, in one run.

  python -m pr2jax.benchmark train  [--peer=transformers]   a full training step
  python -m pr2jax.benchmark decode [--peer=transformers]   sampling
  python -m pr2jax.benchmark grpo   [--peer=trl]            a GRPO step
  python -m pr2jax.benchmark pr2                            what PR2 costs over R3
  python -m pr2jax.benchmark experts                        step time by the number of experts
  python -m pr2jax.benchmark divergence                     how often programs of the sampler part
  python -m pr2jax.benchmark peaks  [--peer=torch]          what the machine multiplies
  python -m pr2jax.benchmark curate [--rows=100000]         what curation finds, and its cost
  python -m pr2jax.benchmark sandbox [--rows=1000]          what isolation costs a program

Each side is a process of its own (`serve.py`), kept alive, and told when to work: ours, peer,
ours, peer, ..., never two at once, so that a machine that slows down slows both. The peer runs in
the environment of PR2JAX_REFERENCE_PYTHON (or --peer_python) in its best documented settings,
which it finds by trying them. Both load one random Qwen3-MoE checkpoint, which the peer makes
once; without a peer ours initialises that model itself. `--smoke` is a tiny model and tiny sizes;
its figures, and those of a busy machine (`--quiet_check`), mean nothing.

`--json=FILE` writes what was measured. Keys of every command:

  command, sizes (workload.Sizes), smoke, repeats (rounds), steps (in each round)
  machine      versions and hardware; quiet {load_1min, busy_share, quiet} before the start
  overrides    of --set

of train, decode, grpo, pr2, experts (`rows` are what was compared):

  rows[]       name; side "ours" or "peer"; dtype; settings; tries {setting: seconds} (peers);
               seconds {median, min, max, all} of one step; per_second {median, min, max}, in
               tokens (train), new tokens (decode) or steps;
               parts {NAME: {median, min, max, all}} in seconds (grpo: generate, update);
               compile_seconds (a peer's: its first step, and loading before it);
               peak_rss_bytes (in the rounds), prepare_peak_rss_bytes (before them);
               flops (of a step; models/flops.py), flops_per_second;
               peak_flops (best 2048-cubed product in that side's library and precision),
               share_of_peak; versions
  ratios[]     row, to (the row it is held against), {median, min, max, all} over rounds of
               seconds(to) / seconds(row): above 1 says that `row` is faster
  check        train with a peer: {row, peer, losses, peer_losses, first_difference}
               pr2: {cost {mini_step, step} (seconds of pr2 over r3's), features {rows, places,
               bytes, index_bytes, predicted_bytes}, predictor_work {r3, pr2: {calls,
               instructions}}, r3_free_of_predictor}
               experts: {step, layer, experts, update (last pool over first), grown {PART: share
               of what the step grew by}, paper}; its ratios are seconds(to) / seconds(first pool)

of experts also: `pools[]` {experts, parameters, active}, in the order of `rows`.

of divergence: `programs[]` {program, dtype, rows, diverged, tokens, rate} (sampler/divergence.py).

of peaks: `rates[]` {library, shape, dims, dtype, flops_per_second} and `memory[]` {library,
bytes_per_second} (read + write of a block in place).

of curate: `curation` {rows, input_bytes, planted {KIND: {planted, found, dropped_otherwise}},
fresh_dropped, false_hits {clean, leaked_but_not_planted}, dropped {REASON: rows}, near, seconds,
cpu_seconds, stages {NAME: seconds}, rows_per_second, peak_rss_bytes, prepare_peak_rss_bytes}.

of sandbox: `start[]` {name ("plain", an interpreter's start, or a tier), median, min, max,
over_plain (seconds), tries}, `missing` {TIER: why}, `parallel` {programs, workers, seconds,
per_second, wrong_verdicts, tier}.
"""
