"""rope_scaling of a config.json as MaxText settings, and back.

YaRN stretches the frequencies of both attentions. MaxText has fields for that, but its own rules for the two scales that
go with it; those of the Hugging Face code are written out as numbers:

  rope_attention_factor: multiplies cos and sin; by transformers' rule, unless rope_scaling names an attention_factor.
  rope_mscale_all_dim: MLA's softmax scale is multiplied by m^2, m = 0.1 * rope_mscale_all_dim * ln(factor) + 1.
"""

import math
from collections.abc import Iterator
from typing import Any

from maxtext_ling2.model import yarn

_BETAS = {"beta_fast": 32, "beta_slow": 1}  # transformers' defaults
_KNOWN = {
  *("type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"),
  *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor"),
}


def refusals(config: dict[str, Any]) -> Iterator[str]:
  """What of a config.json's rotary embedding LING2 cannot represent, one sentence each."""
  theta, rotary = config["rope_theta"], _rotary_dims(config)
  if theta != int(theta):
    yield f"rope_theta={theta}: not an integer, as MaxText's rope_max_timescale must be; round it in config.json"
  if rotary != config["qk_rope_head_dim"]:
    yield (
      f"partial_rotary_factor={config['partial_rotary_factor']}: head_dim * factor is {rotary}, not qk_rope_head_dim="
      f"{config['qk_rope_head_dim']}, but the Hugging Face code rotates GLA and MLA with the same frequencies; take the "
      "config.json that belongs to these weights"
    )
  scaling = config.get("rope_scaling")
  if not scaling:
    return
  if not isinstance(scaling, dict) or _kind(scaling) not in ("yarn", "default"):
    yield f"rope_scaling={scaling!r}: not YaRN, the only scaling LING2 has; remove it to train without scaling"
  elif _kind(scaling) == "yarn":
    yield from _yarn_refusals(config, scaling)


def _yarn_refusals(config: dict[str, Any], scaling: dict[str, Any]) -> Iterator[str]:
  unknown = sorted(set(scaling) - _KNOWN)
  if unknown:
    yield f"rope_scaling.{unknown[0]}={scaling[unknown[0]]!r}: not a parameter of YaRN that LING2 knows; remove it"
  numbers = {key: value for key, value in scaling.items() if key not in ("type", "rope_type", "truncate")}
  wrong = [key for key, value in numbers.items() if value is not None and not _is_number(value)]
  if wrong:
    yield f"rope_scaling.{wrong[0]}={scaling[wrong[0]]!r}: not a number; correct config.json"
    return
  for key in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
    value = _parameters(config, scaling)[key]
    if value != int(value) or value < 1:
      yield f"rope_scaling.{key}={value}: not a positive integer, as MaxText's field must be; round it in config.json"
  parameters = _parameters(config, scaling)
  ratio = config["max_position_embeddings"] / parameters["original_max_position_embeddings"]
  if "original_max_position_embeddings" in scaling and ratio != parameters["factor"]:
    yield (
      f"rope_scaling.factor={parameters['factor']}: not max_position_embeddings / original_max_position_embeddings = "
      f"{ratio}, and of these two transformers 4 takes the one, transformers 5 the other; make them agree in config.json"
    )


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


def _kind(scaling: dict[str, Any]) -> str:
  return str(scaling.get("rope_type", scaling.get("type", "default")))


def _rotary_dims(config: dict[str, Any]) -> int:
  head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
  return int(head_dim * config["partial_rotary_factor"])


def _parameters(config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
  """The parameters of YaRN with transformers' defaults filled in."""
  longest = config["max_position_embeddings"]
  original = scaling.get("original_max_position_embeddings") or longest
  defaults = {"original_max_position_embeddings": original, "factor": longest / original, **_BETAS}
  return {key: scaling.get(key) or value for key, value in defaults.items()}


def to_maxtext(config: dict[str, Any]) -> dict[str, Any]:
  """The MaxText settings of an accepted config.json's rope_scaling."""
  scaling = config.get("rope_scaling")
  if not scaling or _kind(scaling) == "default":
    return {"rope_type": "default", "original_max_position_embeddings": config["max_position_embeddings"]}
  parameters = _parameters(config, scaling)
  all_dim = scaling.get("mscale_all_dim") or 0.0
  return {
    "rope_type": "yarn",
    "rope_factor": int(parameters["factor"]),
    "beta_fast": int(parameters["beta_fast"]),
    "beta_slow": int(parameters["beta_slow"]),
    "original_max_position_embeddings": int(parameters["original_max_position_embeddings"]),
    "rope_truncate": bool(scaling.get("truncate", True)),
    "mscale": float(scaling.get("mscale") or 1.0),
    "rope_mscale_all_dim": float(all_dim),
    "rope_attention_factor": float(scaling.get("attention_factor") or _attention_factor(parameters["factor"], scaling)),
  }


def _attention_factor(factor: float, scaling: dict[str, Any]) -> float:
  """transformers' rule for the scale of cos and sin."""
  mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
  if mscale and all_dim:
    return yarn.magnitude(factor, mscale) / yarn.magnitude(factor, all_dim)
  return yarn.magnitude(factor, 1.0)


def from_maxtext(config: Any) -> dict[str, Any] | None:
  """rope_scaling of a MaxText config (HyperParameters or pydantic object); None without YaRN.

  The attention factor is written as a number, so that the result does not depend on anyone's rule for it.
  """
  if not yarn.is_yarn(config):
    return None
  return {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": float(config.rope_factor),
    "beta_fast": float(config.beta_fast),
    "beta_slow": float(config.beta_slow),
    "original_max_position_embeddings": config.original_max_position_embeddings,
    "mscale": float(config.mscale),
    "mscale_all_dim": yarn.softmax_mscale(config) or 0.0,
    "attention_factor": yarn.attention_factor(config),
    "truncate": config.rope_truncate,
  }
