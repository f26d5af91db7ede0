"""What `model/` builds on in MaxText, beside the classes that `ModelClassesSeam` replaces: bases, layers, helpers."""

import inspect
from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation

_COMMON = "maxtext.common.common_types"
_EMBEDDINGS = "maxtext.layers.embeddings"
_INITIALIZERS = "maxtext.layers.initializers"
_LINEARS = "maxtext.layers.linears"
_MLA = "maxtext.layers.attention_mla:MLA"
_MOE = "maxtext.layers.moe:RoutedMoE"
_MTP = "maxtext.layers.multi_token_prediction"
_DECODER = "maxtext.layers.nnx_decoders:NNXDecoder"
_SCAN = "maxtext.layers.nnx_scan"
_SHARDING = "maxtext.utils.sharding"

_AXES = ("CACHE_BATCH", "CACHE_BATCH_PREFILL", "CACHE_HEADS", "KV_BATCH", "KV_HEAD", "LENGTH")
_MODES = ("MODEL_MODE_AUTOREGRESSIVE", "MODEL_MODE_PREFILL", "MODEL_MODE_TRAIN")


def _is_name(value: object) -> bool:
  return isinstance(value, str)


def _takes(*names: str) -> Callable[[Any], bool]:
  """Whether a class that may inherit its __init__ takes these arguments."""
  return lambda cls: set(names) <= set(inspect.signature(cls.__init__).parameters)


EXPECTATIONS = (
  *(Expectation(f"{_COMMON}:{name}", holds=_is_name, meaning="the name of an axis") for name in _AXES),
  *(Expectation(f"{_COMMON}:{name}", holds=_is_name, meaning="the name of a mode") for name in _MODES),
  Expectation(f"{_COMMON}:AttentionType", holds=lambda value: value("mla"), meaning='an enum with the value "mla"'),
  Expectation(f"{_COMMON}:get_weight_dtype", parameters=("config", "module_name")),
  # Linear attention and the layer
  Expectation(f"{_INITIALIZERS}:nd_dense_init", parameters=("scale", "mode", "distribution")),
  Expectation(
    f"{_LINEARS}:DenseGeneral.__init__",
    parameters=("in_features_shape", "out_features_shape", "axis", "weight_dtype", "dtype", "kernel_axes", "rngs"),
  ),
  Expectation(f"{_LINEARS}:Dropout", holds=_takes("rate", "rngs"), meaning="made from (rate, rngs)"),
  Expectation(
    f"{_LINEARS}:MlpBlock.__init__",
    parameters=("config", "mesh", "in_features", "intermediate_dim", "activations", "weight_dtype", "rngs"),
  ),
  Expectation("maxtext.layers.normalizations:RMSNorm.__init__", parameters=("num_features", "epsilon", "rngs")),
  Expectation("maxtext.utils.max_utils:get_batch_seq_len_for_mode", parameters=("config", "model_mode")),
  Expectation(f"{_SHARDING}:create_sharding", parameters=("mesh", "logical_names", "rules")),
  Expectation(f"{_SHARDING}:get_logical_axis_rules", parameters=()),
  Expectation(f"{_SHARDING}:logical_to_mesh_axes", parameters=("logical_names", "mesh", "rules")),
  Expectation(f"{_SHARDING}:maybe_shard_with_logical", parameters=("inputs", "logical_axes", "mesh", "shard_mode")),
  # MLA and its rotary embedding
  Expectation(
    f"{_MLA}.__init__",
    parameters=(
      *("config", "num_query_heads", "num_kv_heads", "head_dim", "max_target_length", "mesh", "attention_kernel"),
      *("inputs_q_shape", "inputs_kv_shape", "dtype", "weight_dtype", "max_prefill_predict_length", "dropout_rate"),
      *("float32_qk_product", "float32_logits", "quant", "kv_quant", "attention_type", "attn_logits_soft_cap"),
      *("model_mode", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
      *("max_position_embeddings", "original_max_position_embeddings", "mscale", "rope_factor", "rngs"),
    ),
  ),
  Expectation(f"{_MLA}.__call__", parameters=("inputs_q", "inputs_kv", "inputs_positions", "decoder_segment_ids")),
  Expectation("maxtext.layers.quantizations:configure_kv_quant", parameters=("config",)),
  Expectation(
    f"{_EMBEDDINGS}:RotaryEmbedding.__init__",
    parameters=("min_timescale", "max_timescale", "mesh", "embedding_dims", "fprop_dtype", "rngs"),
  ),
  Expectation(f"{_EMBEDDINGS}:RotaryEmbedding.__call__", parameters=("inputs", "position")),
  Expectation(f"{_EMBEDDINGS}:RotaryEmbedding.timescale"),
  # Experts
  Expectation(
    f"{_MOE}.__init__",
    parameters=(
      *("config", "num_experts", "num_experts_per_tok", "mesh", "kernel_init", "kernel_axes", "rngs"),
      *("intermediate_dim", "weight_dtype", "dtype", "quant"),
    ),
  ),
  Expectation(f"{_MOE}.reshape_and_update_weights", parameters=("weights", "indices")),
  Expectation(f"{_MOE}.should_update_load_balance", parameters=()),
  # MTP
  Expectation(f"{_MTP}:_cross_entropy_with_integer_labels", parameters=("logits", "labels")),
  Expectation(f"{_MTP}:mtp_acceptance"),
  Expectation(f"{_MTP}:mtp_losses"),
  Expectation(f"{_MTP}:roll_and_mask", parameters=("x",)),
  Expectation("maxtext.utils.globals:EPS", holds=lambda value: 0 < value < 1e-3, meaning="a small number"),
  # The decoder and its scans
  Expectation(f"{_DECODER}._apply_layers_sequentially", parameters=("layers", "x_in")),
  Expectation(f"{_DECODER}._create_scanned_layers", parameters=("decoder_layer_class", "length")),
  Expectation(
    f"{_SCAN}:create_scanned_layers",
    parameters=("layer_factory", "length", "param_scan_axis", "metadata_axis_name", "rngs"),
  ),
  Expectation(
    f"{_SCAN}:apply_scanned_layers",
    parameters=(
      "layers",
      "carry",
      "length",
      "param_scan_axis",
      "apply_fn",
      "remat",
      "remat_policy",
      "prevent_cse",
    ),
  ),
  Expectation("maxtext.utils.maxtext_utils:should_prevent_cse_in_remat", parameters=("config",)),
  # The step: QK-clip
  Expectation("maxtext.utils.max_utils:l2norm_pytree", parameters=("x",)),
)
