"""Settings of MaxText that no LING2 run reads: any value but the default is refused, since it would have no effect.

The list was observed: `scripts/settings_table` records what is read while tiny LING2 models are built, trained, evaluated
and decoded, and docs/settings.md shows it. `tests/settings/test_settings_table.py` checks that list and page agree.
"""

from collections.abc import Iterator
from typing import Any

_READERS: dict[str, tuple[str, ...]] = {
  "MaxText's other decoders read it": (
    *("attention_output_dim", "global_head_dim", "global_num_kv_heads", "share_kv_projections", "num_kv_shared_layers"),
    *("qk_norm_with_scale", "v_norm_with_scale", "use_double_wide_mlp", "batch_split_factor", "merge_gating_gmm"),
    *("hidden_size_per_layer_input", "vocab_size_per_layer_input", "use_manual_quantization"),
    *("rope_use_scale", "rope_pairwise", "global_rope_max_timescale"),
    *("global_rope_proportion", "local_rope_proportion", "mrope_section", "use_ragged_attention", "ragged_block_size"),
    *("compute_axis_order", "reshape_q"),
  ),
  "mla_interleaved_rope says how MLA pairs rotary dimensions": ("rope_interleave",),
  "LING2's output head has no tied embedding": ("normalize_embedding_logits",),
  "LING2 has no sliding-window or local attention": tuple(
    f"{prefix}local_{name}"
    for prefix, names in {
      "": ("sa_block_q_dkv", "sa_block_kv_dkv", "sa_block_kv_dkv_compute", "sa_block_q_dq", "sa_block_kv_dq")
      + ("sa_use_fused_bwd_kernel", "use_splash_scheduler", "sa_fuse_reciprocal", "sa_use_base2_exp"),
      "eval_": (),
    }.items()
    for name in (
      *names,
      *("sa_block_q", "sa_block_kv", "sa_block_kv_compute", "sa_q_layout", "sa_k_layout", "sa_v_layout"),
    )
  ),
  "LING2 has no mixture of block attention": ("moba_chunk_size", "moba_topk"),
  "LING2 has no attention indexer": (
    "mla_qk_head_chunk_size",
    *("indexer_head_dim", "indexer_n_heads", "indexer_topk", "indexer_sparse_training", "indexer_loss_scaling_factor"),
    *("indexer_use_approx_top_k", "indexer_approx_top_k_recall", "indexer_mask_exact_topk"),
  ),
  "LING2 has no compressed attention": (
    *("o_lora_rank", "o_groups", "compress_ratios", "compressed_rope_max_timescale", "use_csa_streamindex_kernel"),
    "csa_qk_head_chunk_size",
  ),
  "LING2's linear attention is GLA, not a gated delta network": (
    *("gdn_conv_kernel_dim", "gdn_key_head_dim", "gdn_value_head_dim", "gdn_num_key_heads", "gdn_num_value_heads"),
    *("gdn_chunk_size", "use_qk_norm_in_gdn", "gdn_mamba_block_size"),
  ),
  "LING2 has no Engram layers": (
    *("engram_num_heads", "engram_head_dim", "engram_vocab_bases", "engram_max_ngram_size", "engram_kernel_size"),
    "engram_seed",
  ),
  "LING2 has no hyper-connections": (
    *("sinkhorn_iterations", "enable_mhc_lite", "use_mhc_pallas_kernel", "mhc_pallas_kernel_fwd_block_size"),
    *("mhc_pallas_kernel_bwd_block_size", "mhc_pallas_kernel_bwd_feature_block_size"),
  ),
  "LING2 has no pipeline stages": (
    *("num_layers_per_pipeline_stage", "num_pipeline_repeats", "num_pipeline_microbatches"),
    *("pipeline_delay_activation_forwarding", "pipeline_fsdp_ag_once", "pipeline_fsdp_ag_per_repeat"),
    *("scan_pipeline_iterations", "scan_pipeline_repeats", "scan_layers_per_stage"),
    *("set_remat_policy_on_pipeline_iterations", "set_remat_policy_on_layers_per_stage"),
  ),
  "only vLLM's path through the experts reads it": ("return_routed_experts", "fuse_expert_scales"),
  "only Transformer Engine's path through the experts reads it": (
    *("te_gmm_quantization", "te_ep_overflow_check_every_n_steps"),
  ),
  "MaxText cannot quantise MLA's compressed cache": ("kv_quant_axis", "kv_quant_dtype"),
  "MLA's compressed cache has one order of axes": ("ar_cache_axis_order", "prefill_cache_axis_order"),
  "nothing in MaxText reads it": ("enable_padding_causal_mask",),
  "LING2 reads text only": (
    *("dtype_mm", "attention_for_vit", "vision_encoder_block", "freeze_vision_encoder_params", "posemb_type_for_vit"),
    *("freeze_audio_encoder_params", "image_size_for_vit", "image_path", "image_placeholder", "audio_path"),
    *("max_num_images_per_example", "video_path", "video_placeholder", "audio_placeholder", "use_audio_in_video"),
    *("position_id_per_seconds", "video_max_grid_t", "video_max_grid_h", "video_max_grid_w", "remat_policy_for_vit"),
    *("hidden_size_for_vit", "intermediate_size_for_vit", "num_attention_heads_for_vit", "num_channels_for_vit"),
    *("tile_size_for_vit", "patch_size_for_vit", "conv_stride_for_vit", "num_hidden_layers_for_vit"),
    *("rope_theta_for_vit", "vision_output_dim_for_vit", "spatial_merge_size_for_vit", "out_hidden_size_for_vit"),
    *("temporal_patch_size_for_vit", "num_position_embeddings_for_vit", "deepstack_visual_indexes_for_vit"),
    *("vision_output_length", "projector_input_dim_for_vit", "projector_output_dim_for_vit"),
    *("pixel_shuffle_ratio_for_vit", "projector_dropout_for_vit", "vision_projector_type"),
    *("vision_connector_num_layers", "vision_connector_hidden_size", "vision_connector_activation"),
    *("vision_connector_use_bias", "d_model_for_audio", "encoder_attention_heads_for_audio"),
    *("encoder_ffn_dim_for_audio", "encoder_layers_for_audio", "attention_dropout_for_audio"),
    *("activation_dropout_for_audio", "activation_function_for_audio", "num_mel_bins_for_audio"),
    *("max_source_positions_for_audio", "scale_embedding_for_audio", "n_window_for_audio", "n_window_infer_for_audio"),
    *(
      "conv_chunksize_for_audio",
      "downsample_hidden_size_for_audio",
      "output_dim_for_audio",
      "num_conv_layers_for_audio",
    ),
    *("max_timescale_for_audio", "max_sample_len_for_audio"),
  ),
}

WITHOUT_EFFECT = {field: reason for reason, fields in _READERS.items() for field in fields}
"""Field -> why it has no effect on LING2."""

FP8_FULL = (
  *("quantize_mtp", "quantize_logits_proj", "logits_proj_quant_calibration_method", "weight_sparsity_n"),
  *("weight_sparsity_m", "weight_sparsity_update_step", "weight_sparsity_start_step"),
  *("weight_quantization_calibration_method", "act_quantization_calibration_method"),
  *("bwd_quantization_calibration_method", "drhs_grad_quantization_calibration_method"),
)
"""Fields that MaxText reads only with Qwix and quantization=fp8_full (`layers/quantizations.py`)."""

CUSTOM_REMAT = (
  *("context", "mlpwi_0", "mlpwi_1", "mlpwo", "moe_x_sorted", "moe_routing_maps", "moe_mlpwi_0", "moe_mlpwi_1"),
  *("moe_mlpwo", "query_proj", "key_proj", "value_proj", "query_wa_proj", "kv_wa_proj", "mla_q", "mla_kv"),
  *("attention_out", "out_proj", "decoder_layer_input"),
)
"""Fields of MaxText for tensors of LING2's layers, read only with remat_policy=custom."""

NO_TENSOR = ("mlpwi", "kv_proj", "qkv_proj", "indexer_cutoff_threshold", "engram")
"""Fields of MaxText for tensors that LING2 does not have."""


def problems(c: Any) -> Iterator[str]:
  """Settings of a LING2 config that nothing reads, one sentence each; none for a config that is not a pydantic model."""
  for field, reason in WITHOUT_EFFECT.items():
    yield from _unless_default(c, field, reason)
  if not (c.use_qwix_quantization and c.quantization == "fp8_full"):
    for field in FP8_FULL:
      yield from _unless_default(
        c, field, "MaxText reads it with use_qwix_quantization=true and quantization=fp8_full alone"
      )
  if c.sparse_matmul and c.capacity_factor > 0:
    yield (
      f"capacity_factor={c.capacity_factor}: has no effect with sparse_matmul=true, which drops no tokens; set "
      "sparse_matmul=false, or leave it at -1.0"
    )
  if c.opt_type != "muon" or c.muon_type in ("maxtext", "maxtext_muon"):
    yield from _unless_default(
      c, "muon_include_routers", "MaxText reads it with opt_type=muon, muon_type=optax_muon alone"
    )
  for field in NO_TENSOR:
    yield from _unless_default(c, field, "no layer of LING2 has such a tensor")


def warnings(c: Any) -> Iterator[str]:
  """The same as warnings, for settings that MaxText's own YAML files for post-training contain."""
  if c.remat_policy != "custom":
    for field in CUSTOM_REMAT:
      yield from _unless_default(c, field, "MaxText reads it with remat_policy=custom alone")


def _unless_default(c: Any, field: str, reason: str) -> Iterator[str]:
  info = getattr(type(c), "model_fields", {}).get(field)
  if info is None:
    return
  default, value = info.get_default(call_default_factory=True), getattr(c, field)
  if value != default and value != _written_by_maxtext(c, field):
    value_text, default_text = (repr(getattr(x, "value", x)) for x in (value, default))
    yield f"{field}={value_text}: has no effect on LING2: {reason}; leave it at {default_text}"


def _written_by_maxtext(c: Any, field: str) -> Any:
  """The value that MaxText gives to a field that the user has not set, found when a config is validated a second time."""
  return getattr(c, field.replace("local_", ""), None) if "local_" in field else None
