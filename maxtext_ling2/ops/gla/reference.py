"""Reference implementation: the GLA recurrence in float32, one token per step.

Slow, and its gradient saves one state per token. The other backends are tested against it.
"""

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla.base import GlaInputs

_Carry = tuple[jax.Array, jax.Array]


def reference(inputs: GlaInputs, *, scale: float, output_final_state: bool) -> tuple[jax.Array, jax.Array | None]:
  """GLA by the recurrence, a `base.Backend`."""
  q, k, v, g_gamma, segment_ids, initial_state = inputs
  decay = jnp.exp(g_gamma)[:, None, None]  # [H, 1, 1]
  ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids

  def step(carry: _Carry, token: tuple[jax.Array, ...]) -> tuple[_Carry, jax.Array]:
    state, document = carry  # [B, H, D, Dv], [B, 1, 1, 1]; document 0: none yet, the first real token sets it
    segment_id, q_t, k_t, v_t = token  # [B, 1, 1, 1], [B, H, 1, D], [B, H, D, 1], [B, H, 1, Dv]
    real = segment_id != 0
    q_t, k_t, v_t = (jnp.where(real, x, 0.0) for x in (q_t, k_t, v_t))
    restart = real & (document != 0) & (segment_id != document)
    state = jnp.where(real, decay * jnp.where(restart, 0.0, state) + k_t * v_t, state)
    # An einsum, because Qwix's quantization rules leave it alone.
    o_t = scale * jnp.einsum("bhxd,bhde->bhxe", q_t, state, precision=jax.lax.Precision.HIGHEST)  # [B, H, 1, Dv]
    return (state, jnp.where(real, segment_id, document)), o_t

  q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
  tokens = (ids[..., None, None, None], q32[..., None, :], k32[..., None], v32[..., None, :])
  if initial_state is None:
    # Zeros made from k and v, so that the state has the sharding (or shard_map's varying axes) that a scan requires.
    initial_state = jnp.zeros_like(k32[:, 0, :, :, None] * v32[:, 0, :, None, :])
  start = (initial_state, jnp.zeros_like(tokens[0][:, 0]))
  (state, _), o = jax.lax.scan(step, start, jax.tree.map(lambda x: x.swapaxes(0, 1), tokens))  # o: [T, B, H, 1, Dv]
  return o.swapaxes(0, 1)[..., 0, :].astype(v.dtype), state if output_final_state else None
