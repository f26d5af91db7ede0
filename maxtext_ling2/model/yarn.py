"""YaRN (arXiv:2309.00071): scaled rotary frequencies, and the scales of attention that go with them.

MaxText has fields for YaRN and its own rules for the two scales. For models from Hugging Face two fields of LING2 follow
the code there instead: `rope_attention_factor` and `rope_mscale_all_dim`.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_yarn(config: Any) -> bool:
  """True if a MaxText config (pydantic object or HyperParameters) has rope_type=yarn."""
  return bool(getattr(config.rope_type, "value", config.rope_type) == "yarn")


def inverse_frequencies(config: Any, dims: int) -> NDArray[np.float64]:
  """Radians per position of the rotated pairs, [dims / 2] float64.

  Pairs with more than beta_fast rotations within the original length keep their frequency, those with fewer than
  beta_slow are divided by rope_factor, and those between are interpolated linearly.

  Args:
    config: MaxText config.
    dims: number of rotated dimensions.
  """
  pair = np.arange(dims // 2, dtype=np.float64)
  unscaled = np.asarray(config.rope_max_timescale, np.float64) ** (-2.0 * pair / dims)  # [dims / 2]
  low, high = (_pair_with_rotations(config, dims, beta) for beta in (config.beta_fast, config.beta_slow))
  if config.rope_truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dims - 1)
  ramp = np.clip((pair - low) / max(high - low, 1e-3), 0.0, 1.0)
  return unscaled * (1.0 - ramp) + unscaled / config.rope_factor * ramp


def _pair_with_rotations(config: Any, dims: int, rotations: float) -> float:
  """The (fractional) index of the pair that makes this many rotations within the original length."""
  radians_per_position = 2 * math.pi * rotations / config.original_max_position_embeddings
  return -dims * math.log(radians_per_position) / (2 * math.log(config.rope_max_timescale))


def magnitude(factor: float, mscale: float) -> float:
  """0.1 * mscale * ln(factor) + 1, YaRN's scale of attention; 1 for factors up to 1."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(config: Any) -> float:
  """The factor of cos and sin: `rope_attention_factor`, or MaxText's rule where that is 0."""
  if config.rope_attention_factor:
    return float(config.rope_attention_factor)
  return magnitude(config.rope_factor, 1.0) if config.rope_attention_scaling else 1.0


def softmax_mscale(config: Any) -> float | None:
  """mscale in m = 0.1 * mscale * ln(factor) + 1, where MLA's softmax scale is multiplied by m^2; None: by nothing.

  Without YaRN it is None, whatever max_position_embeddings. With YaRN it is `rope_mscale_all_dim`, as in Hugging Face's
  code; if that is negative, MaxText's rule applies.
  """
  if not is_yarn(config):
    return None
  if config.rope_mscale_all_dim < 0:
    extended = config.max_position_embeddings > config.original_max_position_embeddings
    return float(config.mscale) if extended else None
  applies = config.rope_mscale_all_dim > 0 and config.rope_factor > 1
  return float(config.rope_mscale_all_dim) if applies else None
