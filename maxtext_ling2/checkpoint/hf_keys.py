"""Every key of a config.json and how it is handled: the table that import, export and docs/config_json.md use.

The keys are those of the official configuration class and of the code that reads it (inclusionAI/Ling-V2.5 at
79c5ec5), of published config.json files of its family, of vLLM's, SGLang's and mlx-lm's readers, of transformers itself
(4.57 and 5.23), and our own. A key in none of the tables is refused, since it may change the computation.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from maxtext_ling2.checkpoint import exported_code
from maxtext_ling2.checkpoint.decay_offset import FIELD as OFFSET
from maxtext_ling2.model.layer_layout import is_dense, is_mla

logger = logging.getLogger("maxtext_ling2")

IGNORE = "MAXTEXT_LING2_IGNORE_KEYS"
"""Environment variable: comma-separated unknown keys that, as the user knows, do not change the computation."""

GUARD_KEY = "transformers_weights"

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
"""Keys whose value is that of a MaxText field. All of them are required."""

TRANSLATED = {
  "head_dim": "`head_dim`; absent: 128, null: hidden_size / num_attention_heads, as in the official class",
  "q_lora_rank": "`q_lora_rank`; absent or null: 0, a query projection without a latent",
  "num_shared_experts": "`shared_experts` and `moe_shared_expert_dim`; absent: 1 (official), null or 0: none",
  "num_nextn_predict_layers": "`mtp_num_layers`; absent or null: 0",
  "mtp_loss_scaling_factor": "`mtp_loss_scaling_factor`, in the YAML file that `maxtext-ling2 config` writes",
  "linear_silu": "`use_linear_silu`; absent: false",
  "use_linear_silu": "`use_linear_silu`; must not contradict linear_silu",
  "rope_theta": "`rope_max_timescale`; may be in rope_parameters instead",
  "rope_scaling": "YaRN: `rope_type` and its fields; null: no scaling; any other type is refused",
  "rope_parameters": "the same, as transformers 5 writes it, with rope_theta and partial_rotary_factor",
  OFFSET: "`gla_decay_layer_offset`; absent: MaxText's setting, by default 0 (the official code computes 1)",
}
"""Keys that are converted in another way, and to what."""

ONLY: dict[str, tuple[Any, ...]] = {
  # Of the official class and code.
  "hidden_act": ("silu",),
  "use_bias": (False,),
  "use_qkv_bias": (False,),
  "tie_word_embeddings": (False,),
  "rope_interleave": (True,),
  "score_function": ("sigmoid",),
  "scoring_func": ("sigmoid",),
  "topk_method": ("noaux_tc",),
  "router_dtype": ("fp32", "float32", None),
  "moe_router_enable_expert_bias": (True,),
  "attention_dropout": (0, None),
  "embedding_dropout": (0, None),
  "output_dropout": (0, None),
  # Of published files of the family, and of vLLM's, SGLang's and mlx-lm's readers.
  "norm_topk_prob": (True,),
  "moe_router_enable_routed_scaling": (True,),
  "moe_router_enable_shared_expert": (True,),
  "use_rmsnorm": (True,),
  "norm_head": (False,),
  "norm_softmax": (False,),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "sliding_window": (None,),
  "use_sliding_window": (False,),
  "rope_traditional": (False,),
  "use_mla_nope": (False,),
  "value_norm": (False,),
  "up_proj_norm": (False,),
  "scale_router_input": (False,),
  "use_nGPT": (False,),
  "expert_swiglu_limit_list": (None,),
  "share_expert_swiglu_limit_list": (None,),
  "quantization_config": (None, {}),
  "quantization": (None, {}),
  "compression_config": (None, {}),
  # Our exports' guard: without trust_remote_code transformers looks for a file of this name, which does not exist.
  GUARD_KEY: (exported_code.keys()[GUARD_KEY], None),
  # Of transformers.
  "pruned_heads": (None, {}, []),
  "chunk_size_feed_forward": (0, None),
  "is_encoder_decoder": (False, None),
  "add_cross_attention": (False, None),
  "cross_attention_hidden_size": (None,),
  "tie_encoder_decoder": (False, None),
}
"""Keys of which LING2 implements some values only."""

INERT = {
  **dict.fromkeys(
    ("initializer_range", "max_window_layers", "pretraining_tp", "seq_aux", "router_aux_loss_coef", "aux_loss_alpha"),
    "training, or nothing that the official code reads",
  ),
  **dict.fromkeys(
    ("use_cache", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict")
    + ("use_return_dict", "add_router_probs", "torchscript", "attn_implementation", "_attn_implementation")
    + ("_attn_implementation_autoset", "_experts_implementation"),
    "what is returned, kept or called for the same values",
  ),
  **dict.fromkeys(
    (
      "pad_token_id",
      "eos_token_id",
      "bos_token_id",
      "sep_token_id",
      "decoder_start_token_id",
      "tokenizer_class",
      "prefix",
    )
    + ("image_patch_token",),
    "special tokens: exported again; no part of the model's function",
  ),
  **dict.fromkeys(("dtype", "torch_dtype", "use_bfloat16"), "how weights are stored; MaxText's `weight_dtype` decides"),
  **dict.fromkeys(
    ("model_type", "transformers_version", "_name_or_path", "_commit_hash", "finetuning_task", "task_specific_params")
    + ("id2label", "label2id", "num_labels", "problem_type", "tf_legacy_loss", "is_decoder"),
    "names, and what other tasks and languages need",
  ),
  **dict.fromkeys(
    ("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty")
    + ("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
    + ("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores")
    + ("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values")
    + ("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    "how transformers 4 samples text",
  ),
  "auto_map": "code for transformers, which nothing here runs",
}
"""Keys that do not change the computation, and why."""


def shared_experts(config: Mapping[str, Any]) -> int:
  """Number of shared experts: 1 if the key is absent, as in the official class; 0 if it is null."""
  return int(config.get("num_shared_experts", 1) or 0)


def _trailing_rule(config: Mapping[str, Any]) -> Any:
  layers, cycle = config["num_hidden_layers"], config["layer_group_size"]
  return ["full_attention" if is_mla(i, layers, cycle) else "linear_attention" for i in range(layers)]


def _dense_then_sparse(config: Mapping[str, Any]) -> Any:
  dense = config["first_k_dense_replace"]
  return ["dense" if is_dense(i, dense) else "sparse" for i in range(config["num_hidden_layers"])]


def _shared_widths(config: Mapping[str, Any]) -> Iterator[int]:
  yield config["moe_intermediate_size"]
  yield config["moe_intermediate_size"] * shared_experts(config)


EQUAL: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
  "num_key_value_heads": ("num_attention_heads", lambda c: c["num_attention_heads"]),
  "qk_head_dim": ("qk_nope_head_dim + qk_rope_head_dim", lambda c: c["qk_nope_head_dim"] + c["qk_rope_head_dim"]),
  "rotary_dim": ("qk_rope_head_dim", lambda c: c["qk_rope_head_dim"]),
  "n_routed_experts": ("num_experts", lambda c: c["num_experts"]),
  "num_local_experts": ("num_experts", lambda c: c["num_experts"]),
  "layer_types": ("the layers by layer_group_size", _trailing_rule),
  "mlp_layer_types": ("the layers by first_k_dense_replace", _dense_then_sparse),
}
"""Keys that repeat another one: its name and value. Null is allowed."""

ONE_OF: dict[str, tuple[str, Callable[[Mapping[str, Any]], Iterable[Any]]]] = {
  "num_kv_heads_for_linear_attn": ("num_attention_heads, or 0", lambda c: (c["num_attention_heads"], 0)),
  # The official code takes moe_intermediate_size * num_shared_experts. vLLM 0.33 multiplies this key by
  # num_shared_experts, mlx-lm 0.32 takes it for the whole width.
  "moe_shared_expert_intermediate_size": ("moe_intermediate_size, or that times num_shared_experts", _shared_widths),
}
"""Keys that must have one of several values derived from others: the names of these, and the values. Null is allowed."""

_CORRECT = "which is what LING2 computes; correct config.json, or remove the key"
_OTHER_ATTENTION = ("kda", "linear_att", "short_conv", "linear_key_value_heads", "linear_num_", "linear_head_dim")
_KNOWN = {*SAME, *TRANSLATED, *ONLY, *INERT, *EQUAL, *ONE_OF, "architectures"}


def is_known(key: str) -> bool:
  """Whether a key is in one of the tables."""
  return key in _KNOWN


def validate(config: Mapping[str, Any]) -> Iterator[str]:
  """Yields a sentence per key that is unknown, has a value LING2 does not implement, or contradicts another key.

  Args:
    config: a config.json that has the keys of `SAME`, with the right types.
  """
  yield from _unknown(config)
  for key, allowed in ONLY.items():
    if key in config and config[key] not in allowed:
      yield _refused(key, config[key], allowed)
  for key, (other, value) in EQUAL.items():
    if config.get(key) is not None and config[key] != value(config):
      yield f"{key}={config[key]!r}: not {other}={value(config)!r}, {_CORRECT}"
  for key, (others, values) in ONE_OF.items():
    right = sorted(set(values(config)))
    if config.get(key) is not None and config[key] not in right:
      yield f"{key}={config[key]!r}: not {others}={' or '.join(map(repr, right))}, {_CORRECT}"


def _refused(key: str, value: Any, allowed: tuple[Any, ...]) -> str:
  if key in ("quantization_config", "quantization", "compression_config"):
    return f"{key} is set: the weights are quantized, which LING2 does not load; take the bfloat16 weights"
  return (
    f"{key}={value!r}: not {allowed[0]!r}, the only value LING2 computes; use another model's trainer for it, or correct "
    "config.json"
  )


def _unknown(config: Mapping[str, Any]) -> Iterator[str]:
  ignored = {key.strip() for key in os.environ.get(IGNORE, "").split(",") if key.strip()}
  for key in sorted(set(config) - _KNOWN):
    if any(part in key for part in _OTHER_ATTENTION):
      yield (
        f"{key}={config[key]!r}: a key of another linear attention (Ling 3.0 has KDA), but architectures says Ling 2.5; "
        "take the config.json that belongs to these weights"
      )
    elif key in ignored:
      logger.warning("config.json: %s=%r is ignored, as %s says.", key, config[key], IGNORE)
    else:
      yield (
        f"{key}={config[key]!r}: no key that LING2 knows, so it may change what the model computes; if you know that it "
        f"does not, set the environment variable {IGNORE}={key}"
      )
