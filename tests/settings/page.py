"""docs/settings.md: its rows from what was observed, what is refused, and the matrix; and read back again."""

import functools
import re
from pathlib import Path

from maxtext_ling2.configs import unsupported, without_effect
from settings import matrix

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"

MODEL_CLASSES = (
  *("DataTypes", "Quantization", "ModelArchitecture", "Engram", "MTP", "LogitsAndLoss", "Attention", "MlaAttention"),
  *("CompressedAttention", "MoBa", "AttentionIndexer", "Llama4Attention", "SplashAttention", "MoEGeneral", "MoEKernels"),
  *("DeepSeekMoE", "Qwen3Next", "ManifoldConstrainedHyperConnections", "PositionalEmbedding", "Rope", "YarnRope"),
  *("RematAndOffload", "PipelineParallelism", "MultimodalGeneral", "VisionTower", "VisionProjector", "AudioEncoder"),
  "InferenceLayout",
)
"""The config classes whose fields describe the model: one that no LING2 run reads is refused, or its reason is here."""

_SPLASH = (
  *("sa_block_q", "sa_block_kv", "sa_block_kv_compute", "sa_block_q_dkv", "sa_block_kv_dkv", "sa_block_kv_dkv_compute"),
  *("sa_block_q_dq", "sa_block_kv_dq", "sa_use_fused_bwd_kernel", "sa_q_layout", "sa_k_layout", "sa_v_layout"),
  *("use_splash_scheduler", "sa_fuse_reciprocal", "sa_use_base2_exp", "eval_sa_block_q", "eval_sa_block_kv"),
  *("eval_sa_block_kv_compute", "eval_sa_q_layout", "eval_sa_k_layout", "eval_sa_v_layout", "use_tokamax_splash"),
  *("use_jax_splash", "use_max_logit_estimate", "dq_reduction_steps", "cost_estimate_flops_fwd"),
  *("cost_estimate_flops_bwd", "sa_bwd_dkv_megacore", "ring_scan_unroll"),
)
_SPARSE_CORES = (
  *("moe_pin_sparse_core_fsdp_all_gathers_fwd_only", "moe_fsdp_all_gather_sparse_core_id"),
  "moe_ep_all_gather_sparse_core_id",
)
_EVALUATION = (
  *("eval_wi_tile_fwd_batch_seq", "eval_wi_tile_fwd_embed_dim", "eval_wi_tile_fwd_mlp_dim"),
  *("eval_wo_tile_fwd_batch_seq", "eval_wo_tile_fwd_embed_dim", "eval_wo_tile_fwd_mlp_dim"),
)
_BASE = ("base_num_query_heads", "base_num_kv_heads", "base_mlp_dim", "base_moe_mlp_dim", "base_num_decoder_layers")

UNSEEN = {
  **dict.fromkeys(_BASE, "MaxText derives the field without base_ from it, which is read"),
  **dict.fromkeys(_SPLASH, "softmax attention's kernel on TPUs, attention=flash"),
  **dict.fromkeys(_SPARSE_CORES, "MaxText's sparse cores, on TPUs"),
  **dict.fromkeys(_EVALUATION, "an evaluation with rules of its own, custom_mesh_and_rule_for_eval"),
  **{field: "remat_policy=custom" for field in without_effect.CUSTOM_REMAT if field != "moe_routing_maps"},
  "global_parameter_scale": "MaxText multiplies the base_ fields by it",
  "pipeline_parallel_layers": "MaxText derives it; LING2 refuses pipeline stages",
  "replicate_quant_scale": "AQT, without Qwix",
  "quantization_local_shard_count": "Qwix with another quantization than fp8_full",
  "first_phase_ragged_buffer_factor": "MaxText's trainer, for the program of its first steps",
  "norm_topk_prob": "LING2 always normalises the chosen scores: true says the same",
  "float32_gate_logits": "LING2's router computes in float32 either way: true says the same",
  "log_moe_bias_norms": "LING2 logs the norms of its router biases either way",
  "quant_cfg_path": "quantization=intmp",
}
"""Fields of these classes that act though no observed run reads them, each with how."""

HEAD = """# Settings of MaxText in a LING2 run

Made by `scripts/settings_table`: do not edit by hand. "Read by" was observed while tiny LING2 models were trained,
evaluated, saved, restored and decoded (`tests/settings/observe.py`); "-": none of these runs reads it. "Tested" is the
outcome of the matrix of settings (`pytest -m matrix`, `tests/settings/matrix.py`): *equal* to the plain run, *different*
as expected, *refused* by name, *MaxText's* own fault ([Errors](troubleshooting.md) has its text), or a test file that has
it; else the first test file that sets a keyword of that name; "untested": none does.

| setting | read by | tested |
|---|---|---|
"""


@functools.cache
def owners():
  """Field -> the config class that brings it, or LING2."""
  from maxtext.configs import types

  found = {}
  for cls in types.MaxTextConfig.__mro__:
    for field in getattr(cls, "__annotations__", {}):
      if field in types.MaxTextConfig.model_fields:
        found.setdefault(field, cls.__name__)
  return found | {field: "LING2" for field in types.MaxTextConfig.model_fields if field not in found}


def is_refused(field):
  """Whether LING2 refuses every value but the default."""
  return field in without_effect.WITHOUT_EFFECT or field in without_effect.NO_TENSOR or field in unsupported.OFF


def outcome(field):
  """Of the matrix or of a rule; empty where neither has the field."""
  return matrix.outcome_of(field) or ("refused" if is_refused(field) else "")


@functools.cache
def tests_that_set():
  """Field -> the first test file, by path, that sets it."""
  tests, found = Path(__file__).parents[1], {}
  for file in sorted(tests.rglob("*.py")):
    if file.parent.name != "settings":
      for field in set(re.findall(r"\b([a-z]\w+)(?==[^=]|\": )", file.read_text())):
        found.setdefault(field, str(file.relative_to(tests)))
  return found


def tested(field):
  """The last column."""
  file = tests_that_set().get(field)
  return outcome(field) or (f"set in `tests/{file}`" if file else "untested")


def read_by(field, observed):
  """The second column: three modules at most, or how the field acts though nothing was seen to read it."""
  modules = observed.get(field)
  if modules:
    more = [f"{len(modules) - 3} more"] if len(modules) > 3 else []
    return ", ".join([*(f"`{name.removeprefix('maxtext.')}`" for name in modules[:3]), *more])
  return UNSEEN.get(field, "-")


def text(observed):
  """The page."""
  rows = (f"| `{field}` | {read_by(field, observed)} | {tested(field)} |\n" for field in sorted(owners()))
  return HEAD + "".join(rows)


def rows():
  """{field: (read by, tested)} of the page as it is."""
  found = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
  return {field: (readers, outcome) for field, readers, outcome in found}
