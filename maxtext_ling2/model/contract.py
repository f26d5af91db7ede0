"""What `model/` builds on in MaxText, beside the classes that `ModelClassesSeam` replaces: bases, layers, helpers."""

import inspect
from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation, expect

_COMMON = "maxtext.common.common_types"
_LINEARS = "maxtext.layers.linears"
_MLA = "maxtext.layers.attention_mla"
_MOE = "maxtext.layers.moe"

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
  *expect(_COMMON, "get_weight_dtype(config, module_name)"),
  # Linear attention and the layer
  *expect("maxtext.layers.initializers", "nd_dense_init(scale, mode, distribution)"),
  *expect(
    _LINEARS,
    "DenseGeneral.__init__(in_features_shape, out_features_shape, axis, weight_dtype, dtype, kernel_axes, rngs)",
    "MlpBlock.__init__(config, mesh, in_features, intermediate_dim, activations, weight_dtype, rngs)",
  ),
  Expectation(f"{_LINEARS}:Dropout", holds=_takes("rate", "rngs"), meaning="made from (rate, rngs)"),
  *expect("maxtext.layers.normalizations", "RMSNorm.__init__(num_features, epsilon, rngs)"),
  *expect("maxtext.utils.max_utils", "get_batch_seq_len_for_mode(config, model_mode)"),
  *expect(
    "maxtext.utils.sharding",
    "create_sharding(mesh, logical_names, rules)",
    "get_logical_axis_rules()",
    "logical_to_mesh_axes(logical_names, mesh, rules)",
    "maybe_shard_with_logical(inputs, logical_axes, mesh, shard_mode)",
    "mesh_axes_for_dim(axis_names)",
    "remove_incompatible_mesh_axes_from_partition_spec(pspec, shape, mesh, dims, allow_remove_axes)",
    "remove_mesh_axes_from_partition_spec(pspec, axes_to_remove)",
  ),
  # MLA and its rotary embedding
  Expectation(
    f"{_MLA}:MLA.__init__",
    parameters=(
      *("config", "num_query_heads", "num_kv_heads", "head_dim", "max_target_length", "mesh", "attention_kernel"),
      *("inputs_q_shape", "inputs_kv_shape", "dtype", "weight_dtype", "max_prefill_predict_length", "dropout_rate"),
      *("float32_qk_product", "float32_logits", "quant", "kv_quant", "attention_type", "attn_logits_soft_cap"),
      *("model_mode", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
      *("max_position_embeddings", "original_max_position_embeddings", "mscale", "rope_factor", "rngs"),
    ),
  ),
  Expectation(
    f"{_MLA}:MLA.__call__",
    parameters=("inputs_q", "inputs_kv", "inputs_positions", "decoder_segment_ids"),
    holds=lambda function: inspect.unwrap(function).__qualname__ == "MLA.__call__",
    meaning="not inherited",
  ),
  *expect(
    _MLA,
    "MLA.init_rotary_embedding()",
    "MLA.mla_query_projection(inputs_q, inputs_positions, model_mode)",
  ),
  *expect("maxtext.layers.quantizations", "configure_kv_quant(config)"),
  *expect(
    "maxtext.layers.embeddings",
    "RotaryEmbedding.__init__(min_timescale, max_timescale, mesh, embedding_dims, fprop_dtype, rngs)",
    "RotaryEmbedding.__call__(inputs, position)",
    "RotaryEmbedding.timescale",
  ),
  # Experts
  Expectation(
    f"{_MOE}:RoutedMoE.__init__",
    parameters=(
      *("config", "num_experts", "num_experts_per_tok", "mesh", "kernel_init", "kernel_axes", "rngs"),
      *("intermediate_dim", "weight_dtype", "dtype", "quant"),
    ),
  ),
  *expect(
    _MOE,
    "RoutedMoE.reshape_and_update_weights(weights, indices)",
    "RoutedMoE.should_update_load_balance()",
    "RoutedMoE.deepseek_scale_weights(weights)",
    "RoutedMoE.deepseek_routing(gate_logits, pre_bias_logits)",
    "RoutedMoE.get_topk(gate_logits, pre_bias_logits)",
    "RoutedMoE.apply_ffn_activation(layer_w0, layer_w1)",
    "RoutedMoE.load_balance_loss(top_k_indices, logits)",
    "RoutedMoE.sparse_matmul(inputs, gate_logits, pre_bias_logits, w0_kernel, w1_kernel, wo_kernel, w0_bias, w1_bias, "
    "wo_bias, input_ids, forced_routed_experts)",
    "RoutedMoE.get_expert_parallelism_size()",
    "RoutedMoE.get_tensor_parallelism_size()",
    "RoutedMoE.get_dropless_fallback_num_chunks(seq_len, n_chunks)",
    "RoutedMoE.get_ragged_buffer_factor()",
    "RoutedMoE.get_ragged_buffer_size(local_batch, ep_degree, global_experts, top_k, ragged_buffer_factor)",
    "RoutedMoE._check_ragged_overflow(logits, pre_bias_logits, rngs, input_ids, forced_routed_experts, n_chunks)",
    "RoutedMoE._logical_to_mesh_axes(logical_name)",
    "RoutedMoE._maybe_shard_with_pspec(inputs, pspec)",
    "calculate_expert_counts(top_k_indices, num_experts)",
    "megatron_aux_loss_inputs(scores, num_experts_per_tok)",
    "uses_megatron_seq_aux_loss(config)",
    "MoEBiasVar",
  ),
  # MTP
  *expect(
    "maxtext.layers.multi_token_prediction",
    "MultiTokenPredictionBlock.__init__(config, mesh, transformer_layer_module, decoder, rngs)",
    "MultiTokenPredictionBlock.__call__(shared_embedding, main_hidden_state)",
    "MultiTokenPredictionLayer.__call__(prev_hidden_state, target_token_embedding)",
    "mtp_acceptance",
    "mtp_losses",
    "roll_and_mask(x)",
    "roll_and_mask_by_segment(x, segment_ids)",
  ),
  Expectation("maxtext.utils.globals:EPS", holds=lambda value: 0 < value < 1e-3, meaning="a small number"),
  # The decoder and its scans
  *expect(
    "maxtext.layers.nnx_decoders",
    "NNXDecoder._apply_layers_sequentially(layers, x_in)",
    "NNXDecoder._create_scanned_layers(decoder_layer_class, length)",
  ),
  *expect(
    "maxtext.layers.nnx_scan",
    "create_scanned_layers(layer_factory, length, param_scan_axis, metadata_axis_name, rngs)",
    "apply_scanned_layers(layers, carry, length, param_scan_axis, apply_fn, remat, remat_policy, prevent_cse)",
  ),
  *expect("maxtext.utils.maxtext_utils", "should_prevent_cse_in_remat(config)"),
  # The step: QK-clip
  *expect("maxtext.utils.max_utils", "l2norm_pytree(x)"),
)
