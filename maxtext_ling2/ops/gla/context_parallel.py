"""GLA with context parallelism: each device holds a shard of the sequence, forward and backward.

The recurrence is linear, so a shard depends on the shards before it only through its initial state. Each device computes
the final state of its shard from a zero initial state; these states are all-gathered (their size is independent of the
sequence length); a prefix composition gives each shard its initial state, and the normal kernel runs from it. JAX's own
rules give the backward pass: the gradient of each initial state goes back through the composition to the shards before,
again one state per device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxtext_ling2.ops.gla.api import gla
from maxtext_ling2.ops.gla.segments import Segments, count_segments


class _Shards(NamedTuple):
  """What the devices all-gather, N shards."""

  local_state: jax.Array  # [N, B, H, D, Dv] float32: final state of the shard from a zero initial state
  first_document: jax.Array  # [N, B]: document of the first real token, 0 if there is none
  last_document: jax.Array  # [N, B]: document of the last real token, 0 if there is none
  distance: jax.Array  # [N, B] int32: real tokens if they are all of one document, else -1: the state decays to 0


def gla_context_parallel(
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
  """`gla` of a sequence whose shards lie on the devices of a mapped axis, in the order of the axis index.

  To be called under `jax.shard_map` (or a named `jax.vmap`). Arguments and results as of `gla`, with these differences:

  Args:
    q: [B, T, H, D], the device's shard of T tokens, as k, v and segment_ids.
    k: [B, T, H, D].
    v: [B, T, H, Dv].
    g_gamma: [H] float32, log decay per token, the same on all devices.
    axis_name: the axis, or the axes, the slower one first.
    segment_ids: [B, T]; a document may go on across shards.
    initial_state: [B, H, D, Dv] float32, of the whole sequence; the same on all devices.
    output_final_state: whether to return the state after the whole sequence, on all devices.
    scale: as in `gla`.
    backend: as in `gla`.

  Returns:
    o [B, T, H, Dv] of the device's shard, and the final state of the whole sequence or None.
  """
  log_decay = jax.lax.stop_gradient(jnp.asarray(g_gamma))
  device, num_devices = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
  shards = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name), _shard(k, v, log_decay, segment_ids))
  o, final_state = gla(
    q,
    k,
    v,
    g_gamma,
    segment_ids=segment_ids,
    initial_state=_initial_state(shards, log_decay, device, initial_state),
    output_final_state=output_final_state,
    scale=scale,
    backend=backend,
  )
  if final_state is not None:
    final_state = jax.lax.psum(jnp.where(device == num_devices - 1, final_state, 0.0), axis_name)
  return o, final_state


def _shard(k: jax.Array, v: jax.Array, g_gamma: jax.Array, segment_ids: jax.Array | None) -> _Shards:
  """The device's own shard, without the axis N."""
  batch, length = k.shape[:2]
  ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
  segments = count_segments(ids, length, 1)  # the shard as one chunk
  real = ids != 0
  any_real = real.any(axis=1)
  index = jnp.arange(length)
  ends = [jnp.argmax(real, axis=1), jnp.max(jnp.where(real, index, 0), axis=1)]  # first and last real token
  first, last = (jnp.where(any_real, jnp.take_along_axis(ids, end[:, None], axis=1)[:, 0], 0) for end in ends)
  return _Shards(_local_state(k, v, g_gamma, segments), first, last, segments.chunk_distance[:, 0, 0])


def _local_state(k: jax.Array, v: jax.Array, g_gamma: jax.Array, segments: Segments) -> jax.Array:
  """[B, H, D, Dv] float32: the sum over t of exp(g_gamma * distance from t to the end) k_t v_t^T."""
  distance = segments.k_distance[:, 0, :, None]  # [B, T, 1]
  connected = (distance >= 0) & segments.real[:, 0, :, None]
  k_decay = jnp.where(connected, jnp.exp(g_gamma * jnp.maximum(distance, 0)), 0.0)  # [B, T, H]
  bfloat16 = k.dtype == v.dtype == jnp.bfloat16
  decayed_k = jnp.where(connected[..., None], k.astype(jnp.float32), 0.0) * k_decay[..., None]  # padding may hold NaN
  values = jnp.where(connected[..., None], v.astype(jnp.float32), 0.0)
  if bfloat16:
    decayed_k, values = decayed_k.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
  return jnp.einsum(
    "bthd,bthe->bhde",
    decayed_k,
    values,
    precision=None if bfloat16 else jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _initial_state(shards: _Shards, g_gamma: jax.Array, device: jax.Array, initial_state: jax.Array | None) -> jax.Array:
  """The initial state of a device's shard, [B, H, D, Dv] float32: zero where the shard begins another document."""
  # `device >= 0` is always true; it makes the state vary over the axis, as `shard_map` requires.
  start = 0.0 if initial_state is None else initial_state
  state = jnp.where(device >= 0, start, jnp.zeros_like(shards.local_state[0]))
  document = jnp.zeros_like(shards.first_document[0])  # of the state; 0: none yet
  result = state
  for shard in range(shards.local_state.shape[0]):
    local_state, first, last, distance = (x[shard] for x in shards)
    continues = (document == 0) | (first == document) | (first == 0)
    state = jnp.where(continues[:, None, None, None], state, 0.0)
    result = jnp.where(device == shard, state, result)
    decay = jnp.where(distance >= 0, 1.0, 0.0)[:, None] * jnp.exp(g_gamma * jnp.maximum(distance, 0)[:, None])  # [B, H]
    state = decay[..., None, None] * state + local_state
    document = jnp.where(last == 0, document, last)
  return result
