"""GLA and the norms around it on a mesh: each device computes its own sequences, heads and shard of the sequence.

The compiler cannot partition a TPU kernel, so `shard_map` does it here, along the mesh axes that MaxText's logical axis
rules give to batch, sequence and heads.
"""

import functools
import math
from typing import Any

import jax
from maxtext.common import common_types as ct
from maxtext.utils.sharding import get_logical_axis_rules, logical_to_mesh_axes

from maxtext_ling2.ops.fused_norm import grouped_rms_norm_gated, qk_norm_rope
from maxtext_ling2.ops.gla import gla, gla_context_parallel

FLAT = (ct.KV_BATCH, ct.LENGTH, ct.KV_HEAD)
"""Logical axes of q, k, v and o, [B, T, H * D]."""

_Axes = tuple[str, ...] | None


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
  batch, length, heads = _axes_of(q.shape[:3], mesh)
  operation = functools.partial(gla_context_parallel, axis_name=length) if length else gla
  tokens = jax.P(batch, length, heads, None)  # of [B, T, H, D]
  ids, states = jax.P(batch, length), jax.P(batch, heads, None, None)  # of [B, T], [B, H, D, D]

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    check_vma=_checks_vma(mesh),
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


def sharded_rotated_norm(
  x: jax.Array,
  scale: jax.Array | None,
  cos: jax.Array,
  sin: jax.Array,
  *,
  mesh: jax.sharding.Mesh,
  heads: int,
  **options: Any,
) -> jax.Array:
  """`ops.fused_norm.qk_norm_rope` of x [B, T, H * D], sharded over batch, sequence and `heads`, H."""
  batch, length, over_heads = _axes_of((*x.shape[:2], heads), mesh)
  tokens, tables = jax.P(batch, length, over_heads), jax.P(batch, length, None)  # of [B, T, H * D], [B, T, D]

  @functools.partial(
    jax.shard_map, mesh=mesh, check_vma=_checks_vma(mesh), in_specs=(tokens, jax.P(), tables, tables), out_specs=tokens
  )
  def run(x: jax.Array, scale: jax.Array | None, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return qk_norm_rope(x, scale, cos, sin, **options)

  return run(x, scale, cos, sin)


def sharded_gated_norm(
  x: jax.Array,
  gate: jax.Array,
  scale: jax.Array,
  *,
  mesh: jax.sharding.Mesh,
  heads: int,
  groups: int,
  epsilon: float,
  backend: str,
) -> jax.Array:
  """`ops.fused_norm.grouped_rms_norm_gated` of x [B, T, H * D], sharded over batch, sequence and `heads`, H."""
  batch, length, over_heads = _axes_of((*x.shape[:2], heads), mesh)
  shards = math.prod(mesh.shape[name] for name in over_heads or ())
  if groups % shards:  # a group spans several devices: leave its sum to the compiler
    return grouped_rms_norm_gated(x, gate, scale, groups=groups, epsilon=epsilon, backend="chunked")
  tokens = jax.P(batch, length, over_heads)  # of [B, T, H * D]
  run = functools.partial(grouped_rms_norm_gated, groups=groups // shards, epsilon=epsilon, backend=backend)
  specs = (tokens, tokens, jax.P(over_heads))
  return jax.shard_map(run, mesh=mesh, check_vma=_checks_vma(mesh), in_specs=specs, out_specs=tokens)(x, gate, scale)


def _checks_vma(mesh: jax.sharding.Mesh) -> bool:
  """True if `shard_map` tracks which values vary over which axes; then gradients are summed only over axes that need it.

  Not with DiLoCo, whose replicas are a `vmap` over a mesh axis: mapped values vary over that axis and others, such as
  g_gamma, do not, which the check refuses.
  """
  return mesh.shape.get("diloco", 1) == 1


def _axes_of(shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> tuple[_Axes, _Axes, _Axes]:
  """The mesh axes over which batch, sequence and heads of a shape (B, T, H) are sharded."""
  axes = logical_to_mesh_axes(FLAT, mesh=mesh, rules=get_logical_axis_rules()) or (None,) * 3
  batch, length, heads = (_dividing(names, size, mesh) for names, size in zip(axes, shape, strict=True))
  return batch, length, heads


def _dividing(axes: Any, size: int, mesh: jax.sharding.Mesh) -> _Axes:
  """The mesh axes over which one dimension is sharded; None if they do not divide it (one sequence, a few heads)."""
  if axes is None or axes is jax.P.UNCONSTRAINED:
    return None
  names = [name for name in ((axes,) if isinstance(axes, str) else axes) if mesh.shape[name] > 1]
  divided = names and size % math.prod(mesh.shape[name] for name in names) == 0
  return tuple(names) if divided else None
