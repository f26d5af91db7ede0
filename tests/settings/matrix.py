"""The matrix: switches that act on a LING2 run, each with what it must do beside a plain run of the same data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

EQUAL, DIFFERENT, REFUSED, MAXTEXT, ELSEWHERE, HARDWARE = (
  *("equal", "different", "refused", "MaxText's", "elsewhere", "hardware"),
)


@dataclasses.dataclass(frozen=True)
class Row:
  """One switch.

  Attributes:
    settings: what is switched; `...` is any value.
    outcome: EQUAL to the plain run; DIFFERENT, as the check of that name in test_matrix.py says; REFUSED by name, with
      the words `note`; MAXTEXT: MaxText's own fault or refusal, whose text `note` is in docs/troubleshooting.md;
      ELSEWHERE: the test file `note` sets it; HARDWARE: what it needs is `note`.
    note: see above.
    on: settings of the plain run and of this one.
    quick: runs with `make test`.
  """

  settings: Mapping[str, Any]
  outcome: str
  note: str = ""
  on: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  quick: bool = False

  @property
  def name(self) -> str:
    shown = ",".join(f"{field}={value}" for field, value in self.settings.items())
    return f"{shown} on {','.join(f'{field}={value}' for field, value in self.on.items())}" if self.on else shown


PLAIN = {
  "base_num_decoder_layers": 3,
  "opt_type": "sgd",
  "learning_rate": 1.0,
  "gradient_clipping_threshold": 0.0,
  "moe_z_loss_weight": 1e-3,
  "load_balance_loss_weight": 1e-2,
}
"""Of all runs: by gradient descent with rate 1, so that weights show gradients."""

DENSE = {"sparse_matmul": False}
SCANNED = {"scan_layers": True, "base_num_decoder_layers": 9}
INT8 = {"quantization": "int8", "use_qwix_quantization": True}
FP8 = {"quantization": "fp8_full", "use_qwix_quantization": True}
MUON = {"opt_type": "muon", "learning_rate": 1e-2}


def equal(*, on=None, quick=False, **settings):
  return Row(settings, EQUAL, on=on or {}, quick=quick)


def different(check, *, on=None, quick=False, **settings):
  return Row(settings, DIFFERENT, check, on or {}, quick)


def refused(words, *, on=None, **settings):
  return Row(settings, REFUSED, words, on or {}, True)


def elsewhere(file, *fields):
  return [Row({field: ...}, ELSEWHERE, file) for field in fields]


def hardware(need, *fields):
  return [Row({field: ...}, HARDWARE, need) for field in fields]


POLICIES = (
  *("none", "minimal", "minimal_with_context", "minimal_offloaded", "save_dot_with_context_except_mlp"),
  *("save_dot_except_mlpwi", "save_dot_except_mlp", "save_qkv_proj", "qkv_proj_offloaded", "save_out_proj"),
)
CUSTOM = {"remat_policy": "custom"}

ROWS = [
  # Rematerialisation and memory
  *(equal(remat_policy=policy) for policy in POLICIES),
  equal(context="device", mla_q="device", moe_mlpwo="device", out_proj="device", on=CUSTOM),
  equal(context="offload", decoder_layer_input="offload", on=CUSTOM),
  equal(moe_x_sorted="device", moe_routing_maps="device", on=CUSTOM),
  equal(num_vocab_tiling=4),
  equal(vocab_tiling_ag_once=True, on={"num_vocab_tiling": 4}),
  # Layers
  equal(scan_layers=True, on={"base_num_decoder_layers": 9}),
  equal(param_scan_axis=0, on=SCANNED),
  refused("use 0 or 1", param_scan_axis=2, on=SCANNED),
  equal(use_iota_embed=True),
  different("dropout", dropout_rate=0.1, enable_dropout=True),
  equal(enable_dropout=True),
  different("soft_cap", attn_logits_soft_cap=5.0),
  refused("has no effect on LING2", rope_interleave=False),
  refused("LING2 does not have this", causal_block_size=4),
  equal(use_sliced_mla_proj=True),
  equal(use_mla_absorbed_mqa=True),
  # Experts
  equal(sparse_matmul=False),
  equal(router_topk_matmul_vjp=False),
  equal(moe_use_direct_token_gather=False),
  equal(use_custom_sort_vjp=False),
  refused("LING2 does not have this", prefuse_moe_weights=True),
  refused("LING2 does not have this", padded_base_moe_mlp_dim=32),
  equal(capacity_factor=8.0, on=DENSE),
  different("dropped_tokens", capacity_factor=1.0, on=DENSE),
  refused("set sparse_matmul=false", capacity_factor=1.0),
  refused("has no effect on LING2", return_routed_experts=True),
  # Dtypes and products
  different("rounded_weights", weight_dtype="bfloat16"),
  different("rounded_gradients", grad_dtype="bfloat16"),
  refused("use bfloat16 or float32", weight_dtype="float8_e4m3fn"),
  refused("LING2 does not have this", weight_block_size=[16, 16]),
  equal(quantize_router_proj=False, on=INT8),
  different("only_mtp", quantize_mtp=True, on=FP8),
  refused("has no effect on LING2", quantize_mtp=True, on=INT8),
  # Optimizer and losses
  different("frozen", trainable_parameters_mask=[".*moe.*"]),
  different("z_loss", z_loss_multiplier=1e-3),
  different("only_routers", muon_include_routers=False, on=MUON),
  refused("muon_type=optax_muon", muon_include_routers=False, on=MUON | {"muon_type": "maxtext"}),
  equal(muon_type="maxtext_muon", on=MUON),
  equal(record_internal_nn_metrics=1),
  equal(log_step_diagnostics=True),
  # Tested where their feature is
  *elsewhere(
    "settings/test_trainer_switches.py",
    *("optimizer_memory_host_offload", "parameter_memory_host_offload", "enable_continuous_checkpointing"),
    *("load_full_state_path", "enable_rampup_batch_size", "shard_optimizer_over_data", "muon_use_all_to_all"),
  ),
  *elsewhere("training/test_diloco.py", "enable_diloco"),
  *elsewhere("training/test_accumulation.py", "gradient_accumulation_steps", "calculate_per_token_loss"),
  *elsewhere("training/test_optimizers.py", "adamw_mask", "skip_step_on_spikes", "gradient_clipping_threshold"),
  *elsewhere("training/test_muon.py", "opt_type"),
  *elsewhere("training/test_qk_clip.py", "use_qk_clip"),
  *elsewhere(
    "training/test_ring_of_experts.py",
    *("use_ring_of_experts", "defer_small_all_reduces", "num_moe_token_chunks", "moe_chunk_barrier", "use_ragged_sort"),
    *("moe_topk_before_ep_all_gather", "moe_dropless_fallback", "ragged_buffer_factor", "moe_log_max_load_ratio"),
    *("log_required_ragged_buffer_factor", "use_random_routing"),
  ),
  *elsewhere("training/test_padding.py", "moe_use_megatron_seq_aux_loss"),
  *elsewhere("model/test_quantization.py", "quantization", "use_qwix_quantization"),
  *elsewhere("model/test_swiglu.py", "activations_in_float32"),
  Row(
    {"grain_worker_count": ...}, MAXTEXT, "Failed to load checkpointable: iter due to incompatible handler", quick=True
  ),
  Row({"expansion_factor_real_data": ...}, MAXTEXT, "please set expansion_factor_real_data accordingly", quick=True),
  Row({"enable_diloco": ...}, MAXTEXT, "PyTree structure mismatch", quick=True),
  *hardware("several slices of accelerators", "enable_emergency_checkpoint", "enable_multi_tier_checkpointing"),
  *hardware("a TPU", "use_tokamax_splash", "use_jax_splash", "sa_block_q", "ragged_gather_fallback"),
]


def outcome_of(field: str) -> str:
  """The last column of docs/settings.md for a field; empty: it is in no row."""
  rows = [row for row in ROWS if field in row.settings]
  words = {
    EQUAL: "equal",
    DIFFERENT: "different as expected",
    REFUSED: "refused",
    MAXTEXT: "MaxText's own fault",
    ELSEWHERE: "`tests/{note}`",
    HARDWARE: "not tested: needs {note}",
  }
  return "; ".join(dict.fromkeys(words[row.outcome].format(note=row.note) for row in rows))
