"""What computes the routed experts: MaxText's grouped products, or this package's kernels where the settings allow it."""

from collections.abc import Iterator
from typing import Any, Final

from maxtext_ling2.configs import tiles
from maxtext_ling2.ops.backends import EXPERTS_BACKENDS

MAXTEXT: Final = "maxtext"
"""The backend that is MaxText's own layer."""

BACKENDS: Final = (*EXPERTS_BACKENDS, MAXTEXT)

_READ_BY_MAXTEXT: Final[dict[str, Any]] = {
  # Its grouped products
  **dict.fromkeys(tiles.TILES, tiles.BY_CHIP),
  **dict.fromkeys(("use_tokamax_gmm", "use_gmm_v2", "use_gmm_v2_heuristic_tiling"), False),
  "num_moe_emb_chunks": 0,
  "float32_weight_sum": True,
  "quantization": "",
  "use_qwix_quantization": False,
  # Where weights and tokens are, and how they travel
  **dict.fromkeys(("shard_exp_on_fsdp", "shard_embed_moe_on_fsdp", "use_2d_fsdp_sharding"), False),
  **dict.fromkeys(("moe_fsdp_use_two_stage_all_gather", "moe_quantize_token_all_gather"), False),
  **dict.fromkeys(("moe_pin_sparse_core_all_gathers", "moe_pin_sparse_core_ep_all_gathers"), False),
  "moe_pin_sparse_core_fsdp_all_gathers": False,
  "moe_quantize_combine_bwd_method": "",
  "defer_small_all_reduces": False,
  "custom_mesh_and_rule": "",
  # What it routes and logs by itself
  **dict.fromkeys(("use_random_routing", "moe_log_max_load_ratio", "log_required_ragged_buffer_factor"), False),
}
"""Settings that only MaxText's path reads, each with the value without effect on it."""

_SAVED: Final = ("moe_x_sorted", "moe_mlpwi_0", "moe_mlpwi_1", "moe_mlpwo")
"""Tensors of MaxText's path that remat_policy=custom can keep; the kernels save their arguments alone."""


def only_maxtext(config: Any) -> str | None:
  """Why these settings ask for MaxText's path or need it, as "FIELD=VALUE, reason"; None: the chip decides.

  Args:
    config: MaxText's own. In the view that its layers get, tiles are numbers already.
  """
  if config.experts_backend == MAXTEXT:
    return f"experts_backend={MAXTEXT}"
  return next(_reasons(config), None)


def _reasons(config: Any) -> Iterator[str]:
  if not config.sparse_matmul:
    yield "sparse_matmul=False, which is a product of every token with every expert"
  if getattr(config, "enable_diloco", False):
    yield "enable_diloco=True, under which layers are mapped over the replicas"
  for field, plain in _READ_BY_MAXTEXT.items():
    value = getattr(config, field, plain)
    value = getattr(value, "value", value)
    if (value or "") != (plain or ""):
      yield f"{field}={value}, which only MaxText's grouped products read"
  if getattr(config, "remat_policy", "") == "custom":
    for field in _SAVED:
      if getattr(config, field, "remat") != "remat":
        yield f"{field}={getattr(config, field)}, a tensor that only MaxText's path has"


def problems(config: Any) -> Iterator[str]:
  """Broken rules about `experts_backend`, one sentence each."""
  backend = config.experts_backend
  if backend not in BACKENDS:
    yield f"experts_backend={backend!r}: use one of {', '.join(BACKENDS)}; auto picks the fastest for the platform"
  elif backend not in ("auto", MAXTEXT) and (reason := only_maxtext(config)):
    yield f"experts_backend={backend!r}: it cannot be had with {reason}; use experts_backend=auto or change that"
