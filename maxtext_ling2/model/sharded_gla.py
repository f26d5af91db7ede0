"""GLA on a mesh: each device runs the operation on its own batch rows, heads and piece of the sequence.

A TPU kernel cannot be cut by the compiler, so the cut is written here, along the mesh axes that MaxText's logical axis
rules give to batch, sequence and heads.
"""

import functools
import math
from typing import Any

import jax
from maxtext.common import common_types as ct
from maxtext.utils.sharding import get_logical_axis_rules, logical_to_mesh_axes

from maxtext_ling2.ops.gla import gla, gla_over_ranks

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
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """`gla`, sharded over batch, sequence and heads.

  Args:
    q: queries [B, T, H, D].
    k: keys [B, T, H, D].
    v: values [B, T, H, D].
    g_gamma: log decays [H] float32.
    segment_ids: [B, T] int, or None.
    mesh: the device mesh.
    backend: that of `gla`.
    initial_state: [B, H, D, D] float32, or None for zeros.
    output_final_state: whether to return the state after the last token.

  Returns:
    o [B, T, H, D], and the final state [B, H, D, D] float32 or None.
  """
  axes = logical_to_mesh_axes(HEADS, mesh=mesh, rules=get_logical_axis_rules()) or (None,) * 4
  batch, length, heads, _ = (_dividing(part, size, mesh) for part, size in zip(axes, q.shape, strict=True))
  operation = functools.partial(gla_over_ranks, axis_name=length) if length else gla
  tokens, ids, states = jax.P(batch, length, heads, None), jax.P(batch, length), jax.P(batch, heads, None, None)

  # Checked, so that what a mesh axis does not cut needs no sum over that axis in the backward pass.
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(tokens, tokens, tokens, jax.P(heads), ids, states),
    out_specs=(tokens, states if output_final_state else None),
  )
  def run(q: Any, k: Any, v: Any, g_gamma: Any, segment_ids: Any, state: Any) -> tuple[jax.Array, jax.Array | None]:
    return operation(
      q,
      k,
      v,
      g_gamma,
      segment_ids=segment_ids,
      initial_state=state,
      output_final_state=output_final_state,
      backend=backend,
    )

  return run(q, k, v, g_gamma, segment_ids, initial_state)


def _dividing(axes: Any, size: int, mesh: jax.sharding.Mesh) -> tuple[str, ...] | None:
  """The mesh axes that cut one dimension, or none if they do not divide it (a batch of one row, a few heads)."""
  if axes is None or axes is jax.P.UNCONSTRAINED:
    return None
  names = [name for name in ((axes,) if isinstance(axes, str) else axes) if mesh.shape[name] > 1]
  divided = names and size % math.prod(mesh.shape[name] for name in names) == 0
  return tuple(names) if divided else None
