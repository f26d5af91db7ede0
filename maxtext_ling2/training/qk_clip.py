"""QK-clip (MuonClip, arXiv 2507.20534): scales down MLA's query and key weights of heads with too large logits.

A head whose largest logit over the global batch is s gets g = min(1, qk_clip_threshold / s) after the step. Its columns
of the query and key-value weights are scaled so that all its logits are multiplied by g: q and k without rotation by
sqrt(g) each, the rotated part of q by g, since all heads share the rotated k. v is unchanged.

It replaces MaxText 0.2.5's, which takes one maximum over all layers of a scan, adds the maxima of microbatches, makes NaN
for a head whose largest logit is negative, and clips after a step that the optimizer skipped. As in MaxText, padding
positions, which attend to each other, count for the maxima. With DiLoCo each replica clips by its own maxima.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.utils import max_utils

from maxtext_ling2.model.mla import LARGEST_LOGIT, MultiHeadLatentAttention

NOT_MAXTEXTS = types.SimpleNamespace(
  apply_qk_clip_nnx=lambda state, *_: state, calculate_max_logit_metric=lambda *_: None
)
"""Replaces `qk_clip_utils` in MaxText's step: does nothing."""


class LargestLogit(nnx.Variable[jax.Array]):
  """The largest logit of each head over the microbatches of a step, [..., H] float32."""


def attach(model: nnx.Module, config: Any) -> None:
  """Attaches the maxima, -inf, to each MLA layer or stack of them."""
  for _, node in nnx.iter_graph(model):
    if isinstance(node, MultiHeadLatentAttention):
      shape = node.wkv_b.kernel.get_value().shape  # [latent, H, D], with stacked axes at param_scan_axis
      stack = shape[config.param_scan_axis :][: len(shape) - 3]
      setattr(node, LARGEST_LOGIT, LargestLogit(jnp.full((*stack, config.num_query_heads), -jnp.inf, jnp.float32)))


def clip(state: Any, config: Any, skipped: jax.Array | None) -> tuple[Any, jax.Array]:
  """Removes the maxima from a train state that a step returned and scales the weights by them.

  Args:
    state: nnx state.
    config: MaxText config.
    skipped: [] larger than 0 if the optimizer skipped the step; None: it never does.

  Returns:
    (state, the largest logit of all layers and heads, [] float32).
  """
  flat = dict(nnx.to_flat_state(state))
  largest = {path[:-1]: flat.pop(path).get_value() for path in list(flat) if isinstance(flat[path], LargestLogit)}
  for path, logit in largest.items():
    factor = jnp.where(logit > config.qk_clip_threshold, config.qk_clip_threshold / logit, 1.0)  # [..., H]
    if skipped is not None:
      factor = jnp.where(skipped > 0, 1.0, factor)
    # The columns after qk_nope_head_dim are the rotated part of q, and v in wkv_b.
    for name, other_factor in (("wq_b", factor), ("query", factor), ("wkv_b", jnp.ones_like(factor))):
      if (kernel := (*path, name, "kernel")) in flat:
        flat[kernel] = flat[kernel].replace(_scaled(flat[kernel].get_value(), jnp.sqrt(factor), other_factor, config))
  return nnx.from_flat_state(list(flat.items())), jnp.max(jnp.stack([jnp.max(logit) for logit in largest.values()]))


def parameter_norm(state: Any) -> jax.Array:
  """The 2-norm of all parameters of a train state's model, [] float32; MaxText computes its own before the clip."""
  return max_utils.l2norm_pytree(nnx.filter_state(state["model"], nnx.Param))


def _scaled(kernel: jax.Array, nope_factor: jax.Array, other_factor: jax.Array, config: Any) -> jax.Array:
  """A kernel [latent, H, D], stacked axes at param_scan_axis, times factors [..., H]: one for its first qk_nope_head_dim
  columns, one for the others.
  """
  is_nope = jnp.arange(kernel.shape[-1]) < config.qk_nope_head_dim  # [D]
  factor = jnp.where(is_nope, nope_factor[..., None], other_factor[..., None])[None]  # [1, ..., H, D]
  stacked, axis = kernel.ndim - 3, config.param_scan_axis
  factor = jnp.moveaxis(factor, range(1, 1 + stacked), range(axis, axis + stacked))  # broadcasts to the kernel
  return (kernel * factor).astype(kernel.dtype)
