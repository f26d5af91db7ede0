"""LING2's rules about a configuration, checked before MaxText uses a device.

A rule is a function of the config that yields one sentence per violation: field, value, reason, what to do. It only reads
attributes, so any object with MaxText's field names will do.
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

from maxtext_ling2.configs import documents, experts, fine_tuning, numbers, tiles, unsupported, without_effect
from maxtext_ling2.configs.fields import FIELDS
from maxtext_ling2.configs.unsupported import rope_type
from maxtext_ling2.ops.backends import GLA_BACKENDS

logger = logging.getLogger("maxtext_ling2")

DECODER_BLOCK = "ling2"
BASE_OVERRIDES = {
  "mla_naive_kvcache": "false",  # see `_mla`
  "moe_use_direct_token_gather": "true",  # no copy of each token for each of its experts
  "router_topk_matmul_vjp": "true",  # a matmul in place of a serial scatter
  **dict.fromkeys(tiles.TILES, str(tiles.BY_CHIP)),
}
"""Values that a LING2 model takes in place of those in MaxText's base.yml, unless the user sets others."""

CUSTOM_MODEL = "ling2-custom"
"""The model whose sizes are in the user's base YAML file."""
DTYPES = ("bfloat16", "float32")
BIAS_DTYPES = ("", "float32", "bfloat16", "float16")


def no_sizes(given: str, instead: str) -> str:
  """The error where the custom model is named without a YAML file.

  Args:
    given: how it is named, as in "model_name=ling2-custom".
    instead: how the file is passed there.
  """
  return (
    f"{given}: this name has no sizes of its own; pass the YAML file that has them, such as `maxtext-ling2 config HF_DIR "
    f"-o my.yml` writes: {instead}"
  )


def is_ling2(config: Any) -> bool:
  """True if a MaxText config (pydantic object or HyperParameters) describes a LING2 model."""
  return bool(getattr(config.decoder_block, "value", config.decoder_block) == DECODER_BLOCK)


def validate(config: Any) -> None:
  """Checks a config against LING2's rules, or, for another model, that it sets no field that only LING2 reads.

  Raises:
    ValueError: all broken rules, one sentence each.
  """
  rules = _RULES if is_ling2(config) else (_unread,)
  problems = [problem for rule in rules for problem in rule(config)]
  if problems:
    raise ValueError("\n".join(problems))
  if is_ling2(config):
    _warn_of_lost_softmax_factor(config)
    for text in (*without_effect.warnings(config), *fine_tuning.warnings(config)):
      _warn_once(text)


def _warn_of_lost_softmax_factor(c: Any) -> None:
  """In the first release MLA's softmax scale had MaxText's factor also without YaRN, unlike LING2's reference."""
  longest, original = c.max_position_embeddings, c.original_max_position_embeddings
  if rope_type(c) != "yarn" and longest > original and c.rope_mscale_all_dim < 0:
    _warn_once(
      f"max_position_embeddings={longest} exceeds original_max_position_embeddings={original} without rope_type=yarn: "
      "MLA's softmax scale has no factor for that any more, as in LING2's reference; a model trained with the first "
      f"release had the factor (0.1 * mscale * ln(rope_factor={c.rope_factor}) + 1)^2, and computes something else now"
    )


@functools.cache
def _warn_once(text: str) -> None:
  logger.warning(text)


def validate_rl(config: Any) -> None:
  """As `validate`, for MaxText's reinforcement learning, whose trainer has its own loss.

  Raises:
    ValueError: all broken rules, one sentence each.
  """
  validate(config)
  if is_ling2(config) and config.moe_z_loss_weight:
    raise ValueError(
      f"moe_z_loss_weight={config.moe_z_loss_weight}: only pre-training adds the router z-loss to its loss, MaxText's "
      "reinforcement learning does not; set it to 0"
    )


def validation_overrides(config: Any) -> dict[str, Any]:
  """Field -> the value that MaxText's validation sees instead, because its rules know only its own models.

  MaxText allows `routed_bias_update_rate` only for DeepSeek, `partial_rotary_factor` only for Qwen3-Next, and muon only
  for models whose parameters it knows (`host/seams/muon.py` adds LING2's). With cycles of one layer and no dense layer it
  requires the dense width to equal the experts'.
  """
  if not is_ling2(config):
    return {}
  return {
    "opt_type": "adamw" if config.opt_type == "muon" else config.opt_type,
    "routed_bias_update_rate": 0.0,
    "partial_rotary_factor": 1.0,
    "inhomogeneous_layer_cycle_interval": max(2, config.inhomogeneous_layer_cycle_interval),
  }


def _heads(c: Any) -> Iterator[str]:
  if c.base_num_query_heads < 1:
    yield f"base_num_query_heads={c.base_num_query_heads}: attention needs heads; set it to at least 1"
  if c.base_num_kv_heads != c.base_num_query_heads:
    yield (
      f"base_num_kv_heads={c.base_num_kv_heads}: LING2's attention has as many key/value heads as query heads; set it to "
      f"base_num_query_heads={c.base_num_query_heads}"
    )
  width = c.base_num_query_heads * c.head_dim
  if c.group_norm_size < 1 or width % c.group_norm_size:
    yield (
      f"group_norm_size={c.group_norm_size}: it is the number of groups and must divide heads * head_dim = {width}; "
      "choose a divisor, 1 for one RMSNorm over all heads"
    )
  in_range = 0.0 < c.partial_rotary_factor <= 1.0  # False for NaN
  rotary = int(c.head_dim * c.partial_rotary_factor) if in_range else 0
  if rotary < 2 or rotary % 2:
    yield (
      f"partial_rotary_factor={c.partial_rotary_factor}: it rotates int(head_dim * factor) = {rotary} of "
      f"head_dim={c.head_dim} dimensions, which must be an even number from 2 to head_dim; 0.5 is LING2's"
    )


def _layers(c: Any) -> Iterator[str]:
  layers = c.base_num_decoder_layers
  if layers < 2:
    yield f"base_num_decoder_layers={layers}: the decay of linear attention divides by layers - 1; use at least 2"
  if c.inhomogeneous_layer_cycle_interval < 1:
    yield (
      f"inhomogeneous_layer_cycle_interval={c.inhomogeneous_layer_cycle_interval}: every N-th layer is MLA, so it must "
      "be at least 1; 5 is LING2's"
    )
  if not 0 <= c.first_num_dense_layers <= layers:
    yield (
      f"first_num_dense_layers={c.first_num_dense_layers}: it counts layers, so it must lie between 0 and "
      f"base_num_decoder_layers={layers}"
    )
  if c.gla_decay_layer_offset not in (0, 1):
    yield (
      f"gla_decay_layer_offset={c.gla_decay_layer_offset}: it must be 0 (as trained; Megatron, SGLang, vLLM) or 1 (as in "
      "the Hugging Face code)"
    )
  if c.gla_backend not in GLA_BACKENDS:
    yield f"gla_backend={c.gla_backend!r}: use one of {', '.join(GLA_BACKENDS)}; auto picks the fastest for the platform"


def _mla(c: Any) -> Iterator[str]:
  if c.attention_type != "mla":
    yield f"attention_type={c.attention_type}: LING2's softmax attention is MLA; set attention_type=mla"
  for field in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
    if getattr(c, field) <= 0:
      yield f"{field}={getattr(c, field)}: a dimension of MLA must be positive"
  if c.mla_naive_kvcache:
    yield (
      "mla_naive_kvcache=true: that cache needs keys and values of one size, but LING2's are "
      f"{c.qk_nope_head_dim + c.qk_rope_head_dim} and {c.v_head_dim}; leave it out or set it to false: the cache then "
      "holds the latents"
    )
  if c.quantize_kvcache:
    yield "quantize_kvcache=True: MaxText cannot quantise MLA's compressed cache; set it to false"
  if c.use_chunked_prefill:
    yield (
      "use_chunked_prefill=True: MaxText's compressed cache of MLA cannot be filled in chunks; set it to false and "
      "max_prefill_predict_length to the longest prompt"
    )
  if c.qk_rope_head_dim % 2:
    yield f"qk_rope_head_dim={c.qk_rope_head_dim}: RoPE rotates pairs of dimensions, so it must be even"


def _experts(c: Any) -> Iterator[str]:
  if c.first_num_dense_layers == c.base_num_decoder_layers and c.mtp_num_layers == 0:
    return
  if c.num_experts < 2:
    yield (
      f"num_experts={c.num_experts}: layers from first_num_dense_layers={c.first_num_dense_layers} on, and MTP, are "
      "mixtures of experts; use at least 2 experts, or only dense layers and mtp_num_layers=0"
    )
    return
  if not 1 <= c.num_experts_per_tok <= c.num_experts:
    yield (
      f"num_experts_per_tok={c.num_experts_per_tok}: a token goes to at least 1 and at most num_experts={c.num_experts} "
      "experts"
    )
  if c.routed_score_func != "sigmoid":
    yield f"routed_score_func={c.routed_score_func!r}: LING2 routes by sigmoid scores; set routed_score_func=sigmoid"
  if c.n_routing_groups != -1:
    yield from _groups(c)


def _groups(c: Any) -> Iterator[str]:
  groups, chosen = c.n_routing_groups, c.topk_routing_group
  if groups < 1 or c.num_experts % groups:
    yield (
      f"n_routing_groups={groups}: it must divide num_experts={c.num_experts} into equal groups; choose a divisor, or -1 "
      "for no groups"
    )
    return
  size = c.num_experts // groups
  if size < 2:
    yield (
      f"n_routing_groups={groups}: a group's score is the sum of its two best experts, but num_experts={c.num_experts} "
      f"gives groups of {size}; use fewer groups, or -1 for none"
    )
  if not 1 <= chosen <= groups:
    yield f"topk_routing_group={chosen}: between 1 and n_routing_groups={groups} groups can be chosen"
  elif chosen * size < c.num_experts_per_tok:
    yield (
      f"topk_routing_group={chosen}: {chosen} groups of {size} experts hold fewer than num_experts_per_tok="
      f"{c.num_experts_per_tok}; choose more groups"
    )


def _dtypes(c: Any) -> Iterator[str]:
  dtype = str(getattr(c.dtype, "value", c.dtype))
  if dtype not in DTYPES:
    yield f"dtype={dtype}: linear attention computes in {' and '.join(DTYPES)}; use one of them"
  weights = str(getattr(c.weight_dtype, "value", c.weight_dtype))
  if weights.startswith("float8"):
    yield (
      f"weight_dtype={weights}: only vLLM's adapter reads the scales of such weights, and it cannot run LING2; use "
      "bfloat16 or float32, with quantization=fp8_full and use_qwix_quantization=true for products in fp8"
    )
  if c.routed_bias_dtype not in BIAS_DTYPES:
    yield (
      f"routed_bias_dtype={c.routed_bias_dtype!r}: not a dtype for a router bias; use one of "
      f"{', '.join(BIAS_DTYPES[1:])}, or '' for weight_dtype"
    )


def _unread(c: Any) -> Iterator[str]:
  """Fields that only LING2 reads, in a run of another model."""
  block = getattr(c.decoder_block, "value", c.decoder_block)
  for field in FIELDS:
    value = getattr(c, field.name, field.default)
    if field.ling2_only and value != field.default:
      yield (
        f"{field.name}={value!r}: only decoder_block=ling2 reads this field, this run has decoder_block={block}; "
        f"remove it, or set it to {field.default!r}"
      )


_RULES = (
  _heads,
  _layers,
  _mla,
  _experts,
  _dtypes,
  numbers.problems,
  documents.problems,
  fine_tuning.problems,
  tiles.problems,
  experts.problems,
  unsupported.problems,
  without_effect.problems,
)
