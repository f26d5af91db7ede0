"""QK-clip (MuonClip, arXiv 2507.20534): after a step, MLA's query and key weights of heads with too large logits shrink.

The largest logit s of a head over the whole global batch gives g = min(1, qk_clip_threshold / s). Its columns of the
query and key-value weights are scaled so that all its logits become g times as large: q and k without rotation by sqrt(g)
each, the rotated part of q by g, as all heads share the rotated k; v stays.

MaxText 0.2.5 records the logits, but of a layer scan takes one maximum over all stacked layers, adds up the maxima of
microbatches, makes NaN of a head whose largest logit is negative, and clips a step that the optimizer skipped.
Positions of padding, which see each other, take part in the maxima, as in MaxText. With DiLoCo each replica has its own.
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
"""What MaxText's step finds in place of its `qk_clip_utils`."""


class LargestLogit(nnx.Variable[jax.Array]):
  """The largest logit of each head over the microbatches of one step, [..., H] float32."""


def attach(model: nnx.Module, config: Any) -> None:
  """Gives each MLA layer, or stack of them, its maxima, at -inf."""
  for _, node in nnx.iter_graph(model):
    if isinstance(node, MultiHeadLatentAttention):
      shape = node.wkv_b.kernel.get_value().shape  # [R, H, D], with stacked axes at param_scan_axis
      stack = shape[config.param_scan_axis :][: len(shape) - 3]
      setattr(node, LARGEST_LOGIT, LargestLogit(jnp.full((*stack, config.num_query_heads), -jnp.inf, jnp.float32)))


def clip(state: Any, config: Any, skipped: jax.Array | None) -> tuple[Any, jax.Array]:
  """Takes the maxima off a train state that a step returned and scales the weights by them.

  Args:
    state: nnx state.
    config: MaxText config.
    skipped: [] larger than 0 where the optimizer skipped the step, or None: it never does.

  Returns:
    (state, the largest logit of all layers and heads, [] float32).
  """
  flat = dict(nnx.to_flat_state(state))
  largest = {path[:-1]: flat.pop(path).get_value() for path in list(flat) if isinstance(flat[path], LargestLogit)}
  for path, logit in largest.items():
    factor = jnp.where(logit > config.qk_clip_threshold, config.qk_clip_threshold / logit, 1.0)  # [..., H]
    if skipped is not None:
      factor = jnp.where(skipped > 0, 1.0, factor)
    for name, of_rest in (("wq_b", factor), ("query", factor), ("wkv_b", jnp.ones_like(factor))):
      if (kernel := (*path, name, "kernel")) in flat:
        flat[kernel] = flat[kernel].replace(_scaled(flat[kernel].get_value(), jnp.sqrt(factor), of_rest, config))
  return nnx.from_flat_state(list(flat.items())), jnp.max(jnp.stack([jnp.max(logit) for logit in largest.values()]))


def parameter_norm(state: Any) -> jax.Array:
  """The 2-norm of all parameters of a train state's model, [] float32: MaxText's was taken before they were clipped."""
  return max_utils.l2norm_pytree(nnx.filter_state(state["model"], nnx.Param))


def _scaled(kernel: jax.Array, of_nope: jax.Array, of_rest: jax.Array, config: Any) -> jax.Array:
  """A kernel [R, H, D], stacked axes at param_scan_axis, times factors [..., H] of its first qk_nope_head_dim columns
  and of the others.
  """
  is_nope = jnp.arange(kernel.shape[-1]) < config.qk_nope_head_dim
  factor = jnp.where(is_nope, of_nope[..., None], of_rest[..., None])[None]  # [1, ..., H, D]
  depth, axis = kernel.ndim - 3, config.param_scan_axis
  factor = jnp.moveaxis(factor, range(1, 1 + depth), range(axis, axis + depth))
  return (kernel * factor).astype(kernel.dtype)
