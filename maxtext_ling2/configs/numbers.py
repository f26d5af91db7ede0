"""Rules about numbers, in the form of `validation`: which must be positive, which may be 0; none NaN or infinite."""

import math
from collections.abc import Iterator
from typing import Any

_POSITIVE = {
  "base_emb_dim": "the width of the model",
  "base_mlp_dim": "the width of its dense layers",
  "base_moe_mlp_dim": "the width of an expert",
  "head_dim": "the width of a head",
  "vocab_size": "the number of tokens",
  "normalization_layer_epsilon": "the epsilon of norms",
  "max_position_embeddings": "the number of positions",
  "rope_max_timescale": "the base of RoPE's frequencies",
  "routed_scaling_factor": "the scale of the routed experts",
  "max_target_length": "the number of tokens per sequence",
  "per_device_batch_size": "the number of sequences per device",
}
_POSITIVE_WITH_YARN = {
  "rope_factor": "the factor by which YaRN extends the context",
  "original_max_position_embeddings": "the context length before YaRN",
  "beta_fast": "the number of rotations above which YaRN keeps a frequency",
  "beta_slow": "the number of rotations below which YaRN divides a frequency by rope_factor",
}
_ZERO_IS_OFF = ("moe_z_loss_weight", "moe_shared_expert_dim", "routed_bias_update_rate", "mtp_num_layers")


def problems(c: Any) -> Iterator[str]:
  """Broken rules about the numbers of a LING2 config, one sentence each."""
  yarn = getattr(c.rope_type, "value", c.rope_type) == "yarn"
  for field, meaning in (_POSITIVE | (_POSITIVE_WITH_YARN if yarn else {})).items():
    if not 0 < getattr(c, field) < math.inf:
      yield f"{field}={getattr(c, field)}: {meaning} must be positive and finite; leave it out for the default"
  if yarn and c.rope_max_timescale == 1:
    yield "rope_max_timescale=1: YaRN divides by its logarithm; use at least 2"
  for field in _ZERO_IS_OFF:
    if not 0 <= getattr(c, field) < math.inf:
      yield f"{field}={getattr(c, field)}: it must not be negative, NaN or infinite; 0 turns it off"
  if not 0 <= c.rope_attention_factor < math.inf:
    yield (
      f"rope_attention_factor={c.rope_attention_factor}: it multiplies cos and sin, so it must be positive and finite; 0 "
      "takes MaxText's rule"
    )
  if not math.isfinite(c.rope_mscale_all_dim):
    yield f"rope_mscale_all_dim={c.rope_mscale_all_dim}: it must be finite; a negative number takes MaxText's rule"
