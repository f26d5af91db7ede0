"""config.json of a BailingMoeV2_5 checkpoint, read as plain JSON, as MaxText settings; other models refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ARCHITECTURE = "BailingMoeV2_5ForCausalLM"

_OTHER_MODELS = {
  "BailingMoeV2ForCausalLM": "Ling 2.0, which has no linear attention",
  "BailingMoeLinearV2ForCausalLM": "Ring-linear 2.0, whose full-attention layers are GQA instead of MLA",
  "BailingMoeLinearForCausalLM": "Ring-linear, whose full-attention layers are GQA instead of MLA",
  "BailingHybridForCausalLM": "Ling 3.0, whose linear attention is KDA instead of GLA",
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
_SAME = {
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


class UnsupportedCheckpoint(ValueError):
  """The folder does not hold a model that LING2 can represent; the text says what it holds and what is missing."""


def read(folder: Path) -> dict[str, Any]:
  """Reads config.json of a Hugging Face folder.

  Raises:
    UnsupportedCheckpoint: there is none, or it is not a JSON object.
  """
  path = Path(folder) / "config.json"
  if not path.is_file():
    raise UnsupportedCheckpoint(f"{path}: no such file; pass a Hugging Face folder with config.json and safetensors")
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UnsupportedCheckpoint(f"{path}: not valid JSON ({error}); fetch the file again") from error
  if not isinstance(config, dict):
    raise UnsupportedCheckpoint(f"{path}: a {type(config).__name__} instead of a JSON object; fetch the file again")
  return config


def to_maxtext(config: dict[str, Any]) -> dict[str, Any]:
  """The MaxText settings of a config.json: those of LING2's model ymls, without training choices.

  Raises:
    UnsupportedCheckpoint: it is another model, or lacks or contradicts something; all reasons are named.
  """
  problems = list(_refusals(config))
  if problems:
    raise UnsupportedCheckpoint("\n".join(problems))
  settings = {ours: config[theirs] for theirs, ours in _SAME.items()}
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
    "original_max_position_embeddings": config["max_position_embeddings"],
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
  if ARCHITECTURE not in architectures:
    known = [_OTHER_MODELS[name] for name in architectures if name in _OTHER_MODELS]
    what = f"; that is {known[0]}" if known else ""
    yield (
      f"architectures={architectures}: not {ARCHITECTURE}{what}; LING2 loads Ling 2.5 and 2.6 checkpoints only "
      f"(model_type={config.get('model_type')!r} alone does not tell: Ling 3.0 bears it too)"
    )
    return
  missing = [key for key in (*_SAME, "rope_theta") if config.get(key) is None]
  if missing:
    yield f"config.json lacks {', '.join(missing)}; take the config.json that belongs to these weights"
    return
  for key, only in _FIXED.items():
    if config.get(key, only) != only:
      yield f"{key}={config[key]!r}: LING2 computes with {key}={only!r} only"
  heads = config["num_attention_heads"]
  if config.get("num_key_value_heads", heads) != heads:
    yield f"num_key_value_heads={config['num_key_value_heads']}: must equal num_attention_heads={heads}, or be absent"
  if int(_head_dim(config) * config["partial_rotary_factor"]) != config["qk_rope_head_dim"]:
    yield (
      f"partial_rotary_factor={config['partial_rotary_factor']}: head_dim * factor must be qk_rope_head_dim="
      f"{config['qk_rope_head_dim']}, because the Hugging Face code rotates GLA and MLA with the same frequencies"
    )
  if config.get("rope_scaling"):
    yield f"rope_scaling={config['rope_scaling']}: scaled rotary embeddings are not supported yet"
