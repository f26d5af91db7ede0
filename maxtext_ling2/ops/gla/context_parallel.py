"""GLA over a sequence that is cut into pieces, one a rank: context parallelism, forward and backward.

The recurrence is linear, so a piece needs nothing of those before it but the state that enters it. Each rank computes the
state its own piece makes out of nothing, all ranks exchange these states (one a rank, however long the sequence), each
composes those before it in order, and runs its piece from the result. JAX's own rules give the backward pass: the
gradient of the state that enters goes back through the composition to the pieces it came from, again one state a rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxtext_ling2.ops.gla.api import gla
from maxtext_ling2.ops.gla.segments import Segments, count_segments


class _Pieces(NamedTuple):
  """What the ranks tell each other of their pieces, N ranks."""

  state: jax.Array  # [N, B, H, D, Dv] float32: what the piece makes out of a zero state
  first: jax.Array  # [N, B]: document of its first real token, 0 if it has none
  last: jax.Array  # [N, B]: document of its last real token, 0 if it has none
  whole: jax.Array  # [N, B] int32: real tokens, if they are all of one document; else -1


def gla_over_ranks(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array | np.ndarray,
  *,
  axis_name: str | Sequence[str],
  segment_ids: jax.Array | None = None,
  initial_state: jax.Array | None = None,
  output_final_state: bool = False,
  scale: float | None = None,
  backend: str = "auto",
) -> tuple[jax.Array, jax.Array | None]:
  """`gla` of a sequence of which each rank of a mapped axis holds a piece, in the order of the ranks.

  To be called under `jax.shard_map` (or a named `jax.vmap`). Arguments and results as of `gla`, with these differences:

  Args:
    q: [B, T, H, D], the rank's piece of T tokens; as k [B, T, H, D], v [B, T, H, Dv] and segment_ids [B, T].
    k: see q.
    v: see q.
    g_gamma: [H] float32, the same on all ranks.
    axis_name: the axis, or the axes, the slower one first.
    segment_ids: see q; ids count across ranks.
    initial_state: [B, H, D, Dv] float32, of the whole sequence; the same on all ranks.
    output_final_state: whether to return the state after the whole sequence, on all ranks.
    scale: see `gla`.
    backend: see `gla`.

  Returns:
    o [B, T, H, Dv] of the rank's piece, and the final state of the whole sequence or None.
  """
  decay = jax.lax.stop_gradient(jnp.asarray(g_gamma))
  rank, ranks = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
  pieces = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name), _piece(k, v, decay, segment_ids))
  entering = _entering(pieces, decay, rank, initial_state)
  o, final = gla(
    q,
    k,
    v,
    g_gamma,
    segment_ids=segment_ids,
    initial_state=entering,
    output_final_state=output_final_state,
    scale=scale,
    backend=backend,
  )
  if final is not None:
    final = jax.lax.psum(jnp.where(rank == ranks - 1, final, 0.0), axis_name)
  return o, final


def _piece(k: jax.Array, v: jax.Array, decay: jax.Array, segment_ids: jax.Array | None) -> _Pieces:
  """The rank's own piece, without the axis N."""
  batch, length = k.shape[:2]
  ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
  counted = count_segments(ids, length, 1)
  real = ids != 0
  any_real = real.any(axis=1)
  place = jnp.arange(length)
  ends = [jnp.argmax(real, axis=1), jnp.max(jnp.where(real, place, 0), axis=1)]
  first, last = (jnp.where(any_real, jnp.take_along_axis(ids, end[:, None], axis=1)[:, 0], 0) for end in ends)
  return _Pieces(_own_state(k, v, decay, counted), first, last, counted.whole[:, 0, 0])


def _own_state(k: jax.Array, v: jax.Array, decay: jax.Array, counted: Segments) -> jax.Array:
  """What a piece makes out of a zero state, [B, H, D, Dv] float32: the sum over t of decay^(until end) k_t v_t^T."""
  distance = counted.until_end[:, 0, :, None]  # [B, T, 1]
  flows = (distance >= 0) & counted.real[:, 0, :, None]
  weight = jnp.where(flows, jnp.exp(decay * jnp.maximum(distance, 0)), 0.0)  # [B, T, H]
  both = k.dtype == v.dtype == jnp.bfloat16
  weighted = jnp.where(flows[..., None], k.astype(jnp.float32), 0.0) * weight[..., None]  # what does not flow may be NaN
  values = jnp.where(flows[..., None], v.astype(jnp.float32), 0.0)
  if both:
    weighted, values = weighted.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
  return jnp.einsum(
    "bthd,bthe->bhde",
    weighted,
    values,
    precision=None if both else jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _entering(pieces: _Pieces, decay: jax.Array, rank: jax.Array, initial_state: jax.Array | None) -> jax.Array:
  """The state that enters the piece of a rank, [B, H, D, Dv] float32, zero where another document begins there."""
  state = jnp.where(rank >= 0, 0.0 if initial_state is None else initial_state, jnp.zeros_like(pieces.state[0]))
  document = jnp.zeros_like(pieces.first[0])  # of the state; 0: whatever comes
  entering = state
  for piece in range(pieces.state.shape[0]):
    own, first, last, whole = (x[piece] for x in pieces)
    goes_on = (document == 0) | (first == document) | (first == 0)
    state = jnp.where(goes_on[:, None, None, None], state, 0.0)
    entering = jnp.where(rank == piece, state, entering)
    kept = jnp.where(whole >= 0, 1.0, 0.0)[:, None] * jnp.exp(decay * jnp.maximum(whole, 0)[:, None])  # [B, H]
    state = kept[..., None, None] * state + own
    document = jnp.where(last == 0, document, last)
  return entering
