"""config.json of a BailingMoeV2_5 checkpoint <-> MaxText settings. Other models are refused by name.

`hf_keys` is the table of all keys; `hf_rope` converts the rotary embedding.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxtext_ling2.checkpoint import hf_keys, hf_rope
from maxtext_ling2.checkpoint.decay_offset import FIELD as OFFSET
from maxtext_ling2.checkpoint.hf_keys import SAME
from maxtext_ling2.checkpoint.safetensors_file import unique_keys
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.model.layer_layout import shared_expert_width

ARCHITECTURE = "BailingMoeV2_5ForCausalLM"

MTP_LOSS_SCALING_FACTOR = 0.1
"""MaxText's default, for models whose YAML file does not set it."""

_OTHER_MODELS = {
  "BailingMoeForCausalLM": "Ling 1.5, which would need grouped-query attention in every layer",
  "BailingMoeV2ForCausalLM": "Ling 2.0, which would need grouped-query attention in every layer",
  "BailingMoeLinearV2ForCausalLM": "Ring-linear 2.0, which would need GQA instead of MLA in its full-attention layers",
  "BailingMoeLinearForCausalLM": "Ring-linear, which would need GQA instead of MLA in its full-attention layers",
  "BailingHybridForCausalLM": "Ling 3.0, which would need KDA (Kimi delta attention) instead of GLA",
  "BailingMoeV3ForCausalLM": "Ling 3.0, which would need KDA (Kimi delta attention) instead of GLA",
}
_WRITTEN = (
  *("hidden_act", "use_bias", "use_qkv_bias", "tie_word_embeddings", "rope_interleave", "score_function"),
  "moe_router_enable_expert_bias",
)
_FLOATS = ("rms_norm_eps", "routed_scaling_factor", "partial_rotary_factor", "rope_theta")
_MAY_BE_ZERO = (
  "first_k_dense_replace",
  "num_shared_experts",
  "q_lora_rank",
  "num_nextn_predict_layers",
  "head_dim",
  OFFSET,
)
_LAYERS = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0}  # at least
_MOST_LAYERS = 10_000
_LARGEST_SIZE = 2**31  # of an axis
_OPTIONAL_COUNTS = (*_MAY_BE_ZERO[1:], "num_key_value_heads")
_SWITCHES = ("linear_silu", "use_linear_silu")  # two names of one


def read(folder: Path) -> dict[str, Any]:
  """Reads config.json of a Hugging Face folder.

  Raises:
    CheckpointError: there is none, or it is not a JSON object.
  """
  path = Path(folder) / "config.json"
  if not path.is_file():
    raise CheckpointError(f"{path}: no such file; pass a Hugging Face folder with config.json and safetensors")
  return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    CheckpointError: the file does not hold one, or a key occurs twice in it.
  """
  try:
    found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
  except (ValueError, RecursionError) as error:
    raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again") from error
  if not isinstance(found, dict):
    raise CheckpointError(f"{path}: a {type(found).__name__} instead of a JSON object; fetch the file again")
  return found


def to_maxtext(config: dict[str, Any]) -> dict[str, Any]:
  """Converts a config.json to MaxText settings: those of LING2's model YAML files, without training choices.

  `gla_decay_layer_offset` is among them only if config.json has it, as our exports do.

  Raises:
    CheckpointError: it is another model, lacks keys or contradicts itself; all reasons are named.
  """
  _check_architecture(config)
  config = hf_rope.one_layout(config)
  problems = list(_validate(config))
  if problems:
    raise CheckpointError("\n".join(problems))
  settings = {ours: config[theirs] for theirs, ours in SAME.items()}
  shared = hf_keys.shared_experts(config)
  settings |= {
    "decoder_block": "ling2",
    "base_num_kv_heads": config["num_attention_heads"],
    "head_dim": hf_rope.head_dim(config),
    "mtp_num_layers": config.get("num_nextn_predict_layers") or 0,
    "use_linear_silu": any(config.get(key) for key in _SWITCHES),
    "q_lora_rank": config.get("q_lora_rank") or 0,
    "shared_experts": min(1, shared),
    "moe_shared_expert_dim": shared * config["moe_intermediate_size"],
    "rope_max_timescale": int(config["rope_theta"]),
    **hf_rope.to_maxtext(config),
    "mla_interleaved_rope": True,
    "attention_type": "mla",
    "mlp_activations": ["silu", "linear"],
    "routed_score_func": "sigmoid",
    "routed_bias": True,
    "logits_via_embedding": False,
    "enable_dropout": False,
    "float32_logits": True,
    "routed_bias_dtype": "float32",
    "enable_routed_bias_grad": False,
  }
  if config.get(OFFSET) is not None:
    settings[OFFSET] = config[OFFSET]
  return settings


def _check_architecture(config: dict[str, Any]) -> None:
  architectures = config.get("architectures") or []
  if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
    raise CheckpointError(
      f"architectures={architectures!r}: not a list of names, so config.json is damaged; fetch it again"
    )
  if architectures == [ARCHITECTURE]:
    return
  known = [_OTHER_MODELS[name] for name in architectures if name in _OTHER_MODELS]
  if not architectures and config.get("model_type") == "bailing_hybrid":
    known = ["which could be Ling 2.5 or Ling 3.0 (that would need KDA instead of GLA): write it into config.json"]
  which = f"more than {ARCHITECTURE}" if ARCHITECTURE in architectures else f"not {ARCHITECTURE}"
  raise CheckpointError(
    f"architectures={architectures}, model_type={config.get('model_type')!r}: {which}"
    f"{f', but {known[0]}' if known else ''}; LING2 loads Ling 2.5 and 2.6 checkpoints only"
  )


def _validate(config: dict[str, Any]) -> Iterator[str]:
  """Yields all reasons why a config.json (in `hf_rope.one_layout`) is not LING2's, or is incomplete."""
  missing = [key for key in (*SAME, "rope_theta") if config.get(key) is None]
  if missing:
    yield f"config.json lacks {', '.join(missing)}; take the config.json that belongs to these weights"
    return
  mistyped = list(_validate_types(config))
  yield from mistyped
  if mistyped:
    return
  yield from hf_keys.validate(config)
  yield from _validate_sizes(config)
  yield from hf_rope.validate(config)


def _validate_types(config: dict[str, Any]) -> Iterator[str]:
  """Yields values of another type or range than the model's own configuration class has."""
  for key in (*SAME, "rope_theta", "mtp_loss_scaling_factor", *_OPTIONAL_COUNTS, *_SWITCHES):
    value = config.get(key)
    if value is None:
      continue
    if key == "partial_rotary_factor":
      right, what = type(value) in (int, float) and 0 < value <= 1, "a positive number up to 1"
    elif key in _FLOATS:
      right, what = type(value) in (int, float) and 0 < value < hf_rope.LARGEST, "a positive number"
    elif key == "mtp_loss_scaling_factor":
      right, what = type(value) in (int, float) and 0 <= value < hf_rope.LARGEST, "a non-negative number"
    elif key in ("use_qk_norm", *_SWITCHES):
      right, what = type(value) is bool, "true or false"
    elif key in _LAYERS:
      right, what = type(value) is int and _LAYERS[key] <= value <= _MOST_LAYERS, "a number of layers"
      what = "a positive integer" if value == 0 else what
    elif key in _MAY_BE_ZERO:
      right, what = type(value) is int and 0 <= value < _LARGEST_SIZE, "a non-negative integer"
    else:
      right, what = type(value) is int and 0 < value < _LARGEST_SIZE, "a positive integer"
    if not right:
      yield f"{key}={value!r}: not {what}, so config.json is damaged; fetch it again"


def _validate_sizes(config: dict[str, Any]) -> Iterator[str]:
  heads = config["num_attention_heads"]
  if not config.get("head_dim", True) and config["hidden_size"] % heads:
    yield (
      f"head_dim={config['head_dim']}: it means hidden_size / num_attention_heads, but {config['hidden_size']} is not a "
      f"multiple of {heads}; write head_dim into config.json"
    )
  if config["num_hidden_layers"] < config["first_k_dense_replace"]:
    yield (
      f"first_k_dense_replace={config['first_k_dense_replace']}: more than num_hidden_layers="
      f"{config['num_hidden_layers']}; take the config.json that belongs to these weights"
    )
  if config["num_experts"] % config["n_group"]:
    yield (
      f"n_group={config['n_group']}: does not divide num_experts={config['num_experts']}; take the config.json that "
      "belongs to these weights"
    )
  switches = {key: config[key] for key in _SWITCHES if config.get(key) is not None}
  if len(set(switches.values())) > 1:
    written = ", ".join(f"{key}={value}" for key, value in switches.items())
    yield f"{written}: not equal, but two names of one switch; correct config.json"
  if (config.get(OFFSET) or 0) > 1:
    yield f"{OFFSET}={config[OFFSET]}: neither 0 nor 1; correct config.json"


def mtp_weight(config: dict[str, Any]) -> float | None:
  """mtp_loss_scaling_factor of a config.json; None if it has none."""
  value = config.get("mtp_loss_scaling_factor")
  return None if value is None else float(value)


def from_maxtext(config: Any) -> dict[str, Any]:
  """Converts a MaxText config to a config.json: `architectures` and plain values.

  Args:
    config: MaxText config (HyperParameters or pydantic object) of a LING2 model.

  Raises:
    CheckpointError: config.json cannot represent the model; all reasons are named.
  """
  problems = list(_validate_export(config))
  if problems:
    raise CheckpointError("\n".join(problems))
  groups, kept = routing_groups(config)
  written = {theirs: effective(config, ours) for theirs, ours in SAME.items()}
  written |= {
    "architectures": [ARCHITECTURE],
    "model_type": "bailing_hybrid",
    "n_group": groups,
    "topk_group": kept,
    "head_dim": config.head_dim,
    "num_key_value_heads": effective(config, "base_num_query_heads"),
    "num_shared_experts": shared_width(config) // effective(config, "base_moe_mlp_dim")
    or None,  # 0: the official code builds an MLP
    "q_lora_rank": config.q_lora_rank or None,
    "num_nextn_predict_layers": config.mtp_num_layers,
    "mtp_loss_scaling_factor": config.mtp_loss_scaling_factor,
    "linear_silu": config.use_linear_silu,
    "use_linear_silu": config.use_linear_silu,
    "rope_theta": float(config.rope_max_timescale),
    "rope_scaling": hf_rope.from_maxtext(config),
    OFFSET: config.gla_decay_layer_offset,
    **{key: hf_keys.ONLY[key][0] for key in _WRITTEN},
  }
  return dict(sorted(written.items()))


def shared_width(config: Any) -> int:
  """Hidden width of all shared experts together, which are one MLP in both implementations."""
  return int(config.shared_experts * shared_expert_width(config))


def effective(config: Any, field: str) -> Any:
  """The value of a field as the model uses it: `base_*` sizes after MaxText's `global_parameter_scale`."""
  scaled = getattr(config, field.removeprefix("base_"), None) if field.startswith("base_") else None
  return getattr(config, field) if scaled is None else scaled


def routing_groups(config: Any) -> tuple[int, int]:
  """(groups of experts, groups selected per token); no groups (-1 in MaxText) are one group, always selected."""
  return (1, 1) if config.n_routing_groups == -1 else (config.n_routing_groups, config.topk_routing_group)


_FIELDS_OF_ONE_VALUE: dict[str, tuple[Any, ...]] = {
  "mla_interleaved_rope": (True,),
  "routed_bias": (True,),
  "rope_min_timescale": (1,),
  "mlp_activations": (["silu", "linear"],),
  "logits_via_embedding": (False,),
}
"""MaxText's fields that change LING2's computation and have no key in config.json: the values it implies."""


def _validate_export(c: Any) -> Iterator[str]:
  width = effective(c, "base_moe_mlp_dim")
  if shared_width(c) % width:
    yield (
      f"moe_shared_expert_dim={c.moe_shared_expert_dim}: not a multiple of base_moe_mlp_dim={width}, but config.json "
      "counts shared experts of that width; train with a multiple"
    )
  if int(c.head_dim * c.partial_rotary_factor) != c.qk_rope_head_dim:
    yield (
      f"partial_rotary_factor={c.partial_rotary_factor}: head_dim * factor is not qk_rope_head_dim={c.qk_rope_head_dim}, "
      "but the Hugging Face code rotates GLA and MLA with the same frequencies; train with the same number"
    )
  for field, allowed in _FIELDS_OF_ONE_VALUE.items():
    value = getattr(c, field, allowed[0])
    if value not in allowed:
      yield f"{field}={value!r}: not {allowed[0]!r}, the only value config.json can represent; train and export with it"
  if (getattr(c, "attn_logits_soft_cap", None) or 0) > 0:
    yield f"attn_logits_soft_cap={c.attn_logits_soft_cap}: config.json has no key for it; train and export with 0"
  if not getattr(c, "capacity_factor", -1.0) <= 0:  # NaN neither
    yield (
      f"capacity_factor={c.capacity_factor}: config.json has no key for it, so the export would compute something "
      "else; export with capacity_factor=-1 if you want that"
    )
  yield from hf_rope.validate_export(c)
