"""Rules, in the form of `validation`, against features of MaxText that would not compute LING2 or would fail late."""

from collections.abc import Iterator
from typing import Any

_EXTERNAL_CACHES = ("paged", "vllm_rpa", "vllm_batched_rpa")

OFF = {
  "mhc_expansion_rate": 1,
  "engram_layers": [],
  "use_batch_split_schedule": False,
  "use_gather_mosaic_kernel": False,
  "te_moe_block": False,
  "use_indexer": False,
  "first_num_hash_layers": 0,
  "fused_qkv": False,
  "fused_mlp": False,
  "moe_expert_input_dim": -1,
  "mtp_reuse_input_embedding": False,
  "use_tunix_gradient_accumulation": False,
  "logits_via_embedding": False,
  "attention_sink": False,
  "mlp_bias": False,
  "prefuse_moe_weights": False,  # checkpoints keep gate and up apart
  "padded_base_moe_mlp_dim": None,
  "weight_block_size": None,  # this and the next are about the scales of fp8 weights
  "unquantized_modules": [],
  "use_untrainable_positional_embedding": False,
  "trainable_position_size": -1,
  # Read by MaxText's other decoders only.
  "rope_linear_scaling_factor": 1.0,
  "local_rope_max_timescale": -1,
  "interleave_moe_layer_step": 1,
  "nope_layer_interval": -1,
  "attention_bias": False,
  "sliding_window_size": 0,
  "chunk_attn_window_size": 0,
  "moba": False,
  "temperature_tuning": False,
  "causal_block_size": 32,
  "use_post_attn_norm": False,
  "use_post_ffw_norm": False,
  "mlp_activations_limit": -1.0,  # clips routed experts, never dense and shared ones
}
"""Field -> the value at which the feature is off."""


def rope_type(c: Any) -> str:
  """The name of `rope_type`, of a validated config or a raw one."""
  return str(getattr(c.rope_type, "value", c.rope_type))


def problems(c: Any) -> Iterator[str]:
  """Broken rules about features of MaxText, one sentence each."""
  yield from _of_meshes(c)
  yield from _of_training(c)
  yield from _of_layers(c)


def _of_meshes(c: Any) -> Iterator[str]:
  if c.ici_pipeline_parallelism > 1 or c.dcn_pipeline_parallelism > 1:
    yield (
      f"ici_pipeline_parallelism={c.ici_pipeline_parallelism}, dcn_pipeline_parallelism={c.dcn_pipeline_parallelism}: "
      "pipeline stages must be alike, but LING2's layers are not; use fsdp, tensor, expert or context parallelism"
    )
  if getattr(c.shard_mode, "value", c.shard_mode) == "explicit":
    yield "shard_mode=explicit: LING2's layers are written for automatic sharding; use shard_mode=auto"
  context = c.ici_context_parallelism * c.dcn_context_parallelism
  if context not in (0, 1) and c.context_parallel_load_balance:
    yield (
      f"context_parallel_load_balance=true, ici_context_parallelism={c.ici_context_parallelism}, "
      f"dcn_context_parallelism={c.dcn_context_parallelism}: linear attention passes its state from device to device in "
      "the order of the sequence, which load balancing breaks; set context_parallel_load_balance=false"
    )
  for axis in ("autoregressive", "tensor_sequence"):
    sizes = {f"{kind}_{axis}_parallelism": getattr(c, f"{kind}_{axis}_parallelism", 1) for kind in ("ici", "dcn")}
    if c.sparse_matmul and any(size not in (0, 1) for size in sizes.values()):
      yield (
        f"{', '.join(f'{field}={size}' for field, size in sizes.items())}: MaxText 0.2.5 computes experts wrongly over "
        "this axis with sparse_matmul=true (the loss is off by 3e-4 to 7e-4); set sparse_matmul=false, or use tensor, "
        "fsdp, expert or context parallelism"
      )


def _of_training(c: Any) -> Iterator[str]:
  if c.enable_streaming_diloco:
    yield (
      "enable_streaming_diloco=true: its fragments are synchronised one after the other, and router biases, not being "
      "parameters, are in none of them; set it to false, for plain DiLoCo"
    )
  if c.enable_diloco and c.compile_xla_flags:
    yield (
      f"compile_xla_flags={c.compile_xla_flags!r}, enable_diloco=true: MaxText compiles DiLoCo's step without them; use "
      "the variable XLA_FLAGS (LIBTPU_INIT_ARGS on TPUs)"
    )
  if c.use_qk_clip and c.attention != "dot_product" and not (c.use_tokamax_splash and c.hardware == "tpu"):
    yield (
      f"use_qk_clip=true, attention={c.attention}: of MaxText's attentions only dot_product and, on TPUs, tokamax's "
      "splash attention report the largest logit; set use_tokamax_splash=true, or attention=dot_product"
    )
  if c.adamw_mask and c.opt_type == "muon":
    yield (
      f"adamw_mask={c.adamw_mask}: MaxText 0.2.5 does not pass it to muon, so norms would decay; leave it empty and "
      "set adam_weight_decay=0.0, or use opt_type=adamw"
    )
  if c.scan_layers and c.param_scan_axis not in (0, 1):
    yield (
      f"param_scan_axis={c.param_scan_axis}: the scales of norms have one axis, so layers can only be stacked before or "
      "after it; use 0 or 1"
    )


def _of_layers(c: Any) -> Iterator[str]:
  if c.attention in _EXTERNAL_CACHES:
    yield (
      f"attention={c.attention}: LING2's layers keep caches of their own, not vLLM's pages, so MaxText's vLLM adapter "
      "and its eval framework cannot run them; export with to_huggingface and serve the export, or use "
      "`maxtext-ling2 eval` and `generate`"
    )
  if rope_type(c) not in ("default", "yarn"):
    yield f"rope_type={rope_type(c)!r}: LING2 supports rope_type=default and yarn only; use one of them"
  if adapters := getattr(c, "lora_input_adapters_path", ""):
    yield (
      f"lora_input_adapters_path={adapters!r}: MaxEngine's own adapters are of q_proj, k_proj, v_proj and o_proj, which "
      "LING2 does not have; merge the adapter with to_huggingface or to_maxtext, and leave this empty"
    )
  for field, off in OFF.items():
    if getattr(c, field, off) != off:
      yield f"{field}={getattr(c, field)!r}: LING2 does not have this; leave it at {off!r}"
  if getattr(c, "final_logits_soft_cap", None):  # MaxText makes None of 0
    yield (
      f"final_logits_soft_cap={c.final_logits_soft_cap}: MaxText caps logits only with logits_via_embedding=true, which "
      "LING2 does not have, so it would do nothing; leave it at 0"
    )
