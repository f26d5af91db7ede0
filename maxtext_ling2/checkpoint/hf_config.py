"""config.json of a BailingMoeV2_5 checkpoint, read as plain JSON, as MaxText settings; other models refused by name."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxtext_ling2.checkpoint import hf_rope
from maxtext_ling2.checkpoint.json_object import unique
from maxtext_ling2.errors import CheckpointError

ARCHITECTURE = "BailingMoeV2_5ForCausalLM"

_OTHER_MODELS = {
  "BailingMoeForCausalLM": "Ling 1.5, which would need grouped-query attention in every layer",
  "BailingMoeV2ForCausalLM": "Ling 2.0, which would need grouped-query attention in every layer",
  "BailingMoeLinearV2ForCausalLM": "Ring-linear 2.0, which would need GQA instead of MLA in its full-attention layers",
  "BailingMoeLinearForCausalLM": "Ring-linear, which would need GQA instead of MLA in its full-attention layers",
  "BailingHybridForCausalLM": "Ling 3.0, which would need KDA (Kimi delta attention) instead of GLA",
  "BailingMoeV3ForCausalLM": "Ling 3.0, which would need KDA (Kimi delta attention) instead of GLA",
}
# Settings that change the computation to something LING2 is not: key -> the only value that is LING2.
_FIXED = {
  "use_qkv_bias": False,
  "use_bias": False,
  "tie_word_embeddings": False,
  "hidden_act": "silu",
  "score_function": "sigmoid",
  "rope_interleave": True,
  "moe_router_enable_expert_bias": True,
}
# config.json -> MaxText, where the value passes unchanged.
SAME = {
  "hidden_size": "base_emb_dim",
  "intermediate_size": "base_mlp_dim",
  "num_hidden_layers": "base_num_decoder_layers",
  "vocab_size": "vocab_size",
  "first_k_dense_replace": "first_num_dense_layers",
  "layer_group_size": "inhomogeneous_layer_cycle_interval",
  "rms_norm_eps": "normalization_layer_epsilon",
  "num_attention_heads": "base_num_query_heads",
  "group_norm_size": "group_norm_size",
  "use_qk_norm": "use_qk_norm",
  "kv_lora_rank": "kv_lora_rank",
  "qk_nope_head_dim": "qk_nope_head_dim",
  "qk_rope_head_dim": "qk_rope_head_dim",
  "v_head_dim": "v_head_dim",
  "num_experts": "num_experts",
  "num_experts_per_tok": "num_experts_per_tok",
  "moe_intermediate_size": "base_moe_mlp_dim",
  "n_group": "n_routing_groups",
  "topk_group": "topk_routing_group",
  "routed_scaling_factor": "routed_scaling_factor",
  "partial_rotary_factor": "partial_rotary_factor",
  "max_position_embeddings": "max_position_embeddings",
}
_FLOATS = ("rms_norm_eps", "routed_scaling_factor", "partial_rotary_factor", "rope_theta")
_OPTIONAL_COUNTS = ("head_dim", "num_shared_experts", "q_lora_rank", "num_nextn_predict_layers", "num_key_value_heads")
_MAY_BE_ZERO = ("first_k_dense_replace", "num_shared_experts", "q_lora_rank", "num_nextn_predict_layers")


def read(folder: Path) -> dict[str, Any]:
  """Reads config.json of a Hugging Face folder.

  Raises:
    CheckpointError: there is none, or it is not a JSON object.
  """
  path = Path(folder) / "config.json"
  if not path.is_file():
    raise CheckpointError(f"{path}: no such file; pass a Hugging Face folder with config.json and safetensors")
  try:
    config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again") from error
  if not isinstance(config, dict):
    raise CheckpointError(f"{path}: a {type(config).__name__} instead of a JSON object; fetch the file again")
  return config


def to_maxtext(config: dict[str, Any]) -> dict[str, Any]:
  """The MaxText settings of a config.json: those of LING2's model ymls, without training choices.

  Raises:
    CheckpointError: it is another model, or lacks or contradicts something; all reasons are named.
  """
  problems = list(_refusals(config))
  if problems:
    raise CheckpointError("\n".join(problems))
  settings = {ours: config[theirs] for theirs, ours in SAME.items()}
  heads, shared = config["num_attention_heads"], config.get("num_shared_experts") or 0
  settings |= {
    "decoder_block": "ling2",
    "base_num_kv_heads": heads,
    "head_dim": _head_dim(config),
    "mtp_num_layers": config.get("num_nextn_predict_layers") or 0,
    "use_linear_silu": bool(config.get("linear_silu", config.get("use_linear_silu", False))),
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
  return settings


def _head_dim(config: dict[str, Any]) -> int:
  return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _refusals(config: dict[str, Any]) -> Iterator[str]:
  architectures = config.get("architectures") or []
  if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
    yield f"architectures={architectures!r}: not a list of names, so config.json is damaged; fetch it again"
    return
  if ARCHITECTURE not in architectures:
    known = [_OTHER_MODELS[name] for name in architectures if name in _OTHER_MODELS]
    if not architectures and config.get("model_type") == "bailing_hybrid":
      known = ["which could be Ling 2.5 or Ling 3.0 (that would need KDA instead of GLA): write it into config.json"]
    yield (
      f"architectures={architectures}, model_type={config.get('model_type')!r}: not {ARCHITECTURE}"
      f"{f', but {known[0]}' if known else ''}; LING2 loads Ling 2.5 and 2.6 checkpoints only"
    )
    return
  missing = [key for key in (*SAME, "rope_theta") if config.get(key) is None]
  if missing:
    yield f"config.json lacks {', '.join(missing)}; take the config.json that belongs to these weights"
    return
  mistyped = list(_mistyped(config))
  yield from mistyped
  if mistyped:
    return
  for key, only in _FIXED.items():
    if config.get(key, only) != only:
      yield f"{key}={config[key]!r}: not {only!r}, the only value LING2 computes; use another model's trainer for it"
  if config.get("quantization_config"):
    yield "quantization_config is set: the weights are quantized, which LING2 does not load; take the bfloat16 weights"
  yield from _contradictions(config)
  yield from hf_rope.refusals(config)


def _mistyped(config: dict[str, Any]) -> Iterator[str]:
  """Values of another type than the model's own configuration class gives them."""
  for key in (*SAME, "rope_theta", *_OPTIONAL_COUNTS):
    value = config.get(key)
    if value is None:
      continue
    if key in _FLOATS:
      right, what = type(value) in (int, float) and 0 < value < math.inf, "a positive number"
    elif key == "use_qk_norm":
      right, what = type(value) is bool, "true or false"
    elif key in _MAY_BE_ZERO:
      right, what = type(value) is int and value >= 0, "a non-negative integer"
    else:
      right, what = type(value) is int and value > 0, "a positive integer"
    if not right:
      yield f"{key}={value!r}: not {what}, so config.json is damaged; fetch it again"


def _contradictions(config: dict[str, Any]) -> Iterator[str]:
  heads = config["num_attention_heads"]
  written = config.get("num_key_value_heads")
  if written is not None and written != heads:
    yield (
      f"num_key_value_heads={written}: not num_attention_heads={heads}, but both attentions have as many of either; "
      "correct config.json, or remove the key"
    )
  if config.get("head_dim") is None and config["hidden_size"] % heads:
    yield (
      f"head_dim is absent and hidden_size={config['hidden_size']} is no multiple of num_attention_heads={heads}; write "
      "head_dim into config.json"
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


def from_maxtext(config: Any) -> dict[str, Any]:
  """The config.json of a MaxText config: `architectures` and plain values, no `auto_map`, so no code to run.

  Args:
    config: MaxText config (HyperParameters or pydantic object) of a LING2 model.

  Raises:
    CheckpointError: the model has something that the Hugging Face code has not; all reasons are named.
  """
  problems = list(_not_in_hugging_face(config))
  if problems:
    raise CheckpointError("\n".join(problems))
  written = {theirs: getattr(config, ours) for theirs, ours in SAME.items()}
  written |= {
    "architectures": [ARCHITECTURE],
    "model_type": "bailing_hybrid",
    "head_dim": config.head_dim,
    "num_key_value_heads": config.base_num_query_heads,
    "num_shared_experts": shared_width(config) // config.base_moe_mlp_dim,
    "q_lora_rank": config.q_lora_rank or None,
    "num_nextn_predict_layers": config.mtp_num_layers,
    "mtp_loss_scaling_factor": config.mtp_loss_scaling_factor,
    "linear_silu": config.use_linear_silu,
    "use_linear_silu": config.use_linear_silu,
    "rope_theta": float(config.rope_max_timescale),
    "rope_scaling": hf_rope.from_maxtext(config),
    **_FIXED,
  }
  return dict(sorted(written.items()))


def shared_width(config: Any) -> int:
  """Hidden width of all shared experts together, which are one MLP in either code."""
  return int(config.shared_experts * (config.moe_shared_expert_dim or config.base_moe_mlp_dim))


def _not_in_hugging_face(c: Any) -> Iterator[str]:
  if shared_width(c) % c.base_moe_mlp_dim:
    yield (
      f"moe_shared_expert_dim={c.moe_shared_expert_dim}: not a multiple of base_moe_mlp_dim={c.base_moe_mlp_dim}, but "
      "config.json counts shared experts of that width; train with a multiple"
    )
  if int(c.head_dim * c.partial_rotary_factor) != c.qk_rope_head_dim:
    yield (
      f"partial_rotary_factor={c.partial_rotary_factor}: head_dim * factor is not qk_rope_head_dim={c.qk_rope_head_dim}, "
      "but the Hugging Face code rotates GLA and MLA with the same frequencies; train with the same number"
    )
  for field, only in (("mla_interleaved_rope", True), ("routed_bias", True), ("rope_min_timescale", 1)):
    if getattr(c, field) != only:
      yield f"{field}={getattr(c, field)!r}: not {only!r}, the only value the Hugging Face code has; train with it"
