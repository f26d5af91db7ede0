"""YaRN (arXiv:2309.00071): stretched rotary frequencies, and the two scales that go with them.

MaxText has fields for YaRN, and rules of its own for the scales. Two fields of ours follow the Hugging Face code instead,
where a model comes from there: `rope_attention_factor` and `rope_mscale_all_dim`.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_yarn(config: Any) -> bool:
  """Whether a MaxText config (pydantic object or HyperParameters) asks for YaRN."""
  return bool(getattr(config.rope_type, "value", config.rope_type) == "yarn")


def inverse_frequencies(config: Any, dims: int) -> NDArray[np.float64]:
  """Radians per position of the rotated pairs, [dims / 2] float64.

  Pairs that turn more than beta_fast times within the original length keep their frequency, pairs that turn less than
  beta_slow times are slowed down by the factor, those between are blended linearly.

  Args:
    config: MaxText config.
    dims: number of rotated dimensions.
  """
  pair = np.arange(dims // 2, dtype=np.float64)
  plain = np.asarray(config.rope_max_timescale, np.float64) ** (-2.0 * pair / dims)
  low, high = (_pair_that_turns(config, dims, beta) for beta in (config.beta_fast, config.beta_slow))
  if config.rope_truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dims - 1)
  slowed = np.clip((pair - low) / max(high - low, 1e-3), 0.0, 1.0)
  return plain * (1.0 - slowed) + plain / config.rope_factor * slowed


def _pair_that_turns(config: Any, dims: int, times: float) -> float:
  """The (fractional) index of the pair that turns so many times within the original length."""
  radians_per_position = 2 * math.pi * times / config.original_max_position_embeddings
  return -dims * math.log(radians_per_position) / (2 * math.log(config.rope_max_timescale))


def magnitude(factor: float, mscale: float) -> float:
  """0.1 * mscale * ln(factor) + 1; 1 without stretching."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(config: Any) -> float:
  """The scale of cos and sin: `rope_attention_factor`, or MaxText's own rule where that is 0."""
  if config.rope_attention_factor:
    return float(config.rope_attention_factor)
  return magnitude(config.rope_factor, 1.0) if config.rope_attention_scaling else 1.0


def softmax_mscale(config: Any) -> float | None:
  """mscale in m = 0.1 * mscale * ln(factor) + 1, where MLA's softmax scale is multiplied by m^2; None: it is not.

  Without YaRN it never is, however many positions there are. With YaRN `rope_mscale_all_dim` says it, as in the Hugging
  Face code; where it is negative MaxText's own rule holds.
  """
  if not is_yarn(config):
    return None
  if config.rope_mscale_all_dim < 0:
    longer = config.max_position_embeddings > config.original_max_position_embeddings
    return float(config.mscale) if longer else None
  applies = config.rope_mscale_all_dim > 0 and config.rope_factor > 1
  return float(config.rope_mscale_all_dim) if applies else None
