"""GLA on a mesh: each device runs the operation on its own batch rows and heads, over whole sequences.

A TPU kernel cannot be cut by the compiler, so the cut is written here, along the mesh axes that MaxText's logical axis
rules give to batch and heads.
"""

import functools
import math
from typing import Any

import jax
from maxtext.common import common_types as ct
from maxtext.utils.sharding import get_logical_axis_rules, logical_to_mesh_axes

from maxtext_ling2.ops.gla import gla

HEADS = (ct.KV_BATCH, ct.LENGTH, ct.KV_HEAD, ct.KV_HEAD_DIM)
"""Logical axes of q, k, v and o, [B, T, H, D]."""


def sharded_gla(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array,
  segment_ids: jax.Array | None,
  *,
  mesh: jax.sharding.Mesh,
  backend: str,
) -> jax.Array:
  """`gla` without states, sharded over batch and heads.

  Args:
    q: queries [B, T, H, D].
    k: keys [B, T, H, D].
    v: values [B, T, H, D].
    g_gamma: log decays [H] float32.
    segment_ids: [B, T] int, or None.
    mesh: the device mesh.
    backend: that of `gla`.

  Returns:
    o [B, T, H, D].
  """
  axes = logical_to_mesh_axes(HEADS, mesh=mesh, rules=get_logical_axis_rules()) or (None,) * 4
  batch, _, heads, _ = (_dividing(part, size, mesh) for part, size in zip(axes, q.shape, strict=True))
  # The one place that knows how the sequence is cut: it is not, each rank gets all of it. A rank with a piece of the
  # sequence would need the state that enters it, from the ranks before (`gla` takes and returns states).
  length = None
  tokens, ids = jax.P(batch, length, heads, None), jax.P(batch, length)

  # Checked, so that what a mesh axis does not cut needs no sum over that axis in the backward pass.
  @functools.partial(jax.shard_map, mesh=mesh, in_specs=(tokens, tokens, tokens, jax.P(heads), ids), out_specs=tokens)
  def run(q: jax.Array, k: jax.Array, v: jax.Array, g_gamma: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return gla(q, k, v, g_gamma, segment_ids=segment_ids, backend=backend)[0]

  return run(q, k, v, g_gamma, segment_ids)


def _dividing(axes: Any, size: int, mesh: jax.sharding.Mesh) -> Any:
  """The mesh axes of one dimension, or none if they do not divide it (a batch of one row, a few heads)."""
  if axes is None or axes is jax.P.UNCONSTRAINED:
    return None
  names = (axes,) if isinstance(axes, str) else tuple(axes)
  return names if size % math.prod(mesh.shape[name] for name in names) == 0 else None
