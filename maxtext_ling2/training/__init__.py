"""A LING2 training step on top of MaxText's.

`step.py` wraps MaxText's train and eval step; `objective.py` adds the z-loss and averages over microbatches;
`statistics.py` attaches counts to the routers, from which `balancing.py` updates their biases; `qk_clip.py` scales down
weights that give too large logits; `metrics.py` and `flops.py` report; `diloco.py` and `xla_flags.py` are for DiLoCo and
for compiling.
"""
