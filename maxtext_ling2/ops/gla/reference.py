"""The truth: GLA as its recurrence, one token a step, everything in float32.

Slow, and its gradient keeps one state a token. The other backends are measured against it.
"""

import jax
import jax.numpy as jnp

_Carry = tuple[jax.Array, jax.Array]


def reference(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array,
  *,
  segment_ids: jax.Array | None,
  initial_state: jax.Array | None,
  scale: float,
  final: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """GLA by the recurrence. Arguments and results as in `api.Backend`."""
  decay = jnp.exp(g_gamma)[:, None, None]  # [H, 1, 1]
  ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids

  def step(carry: _Carry, token: tuple[jax.Array, ...]) -> tuple[_Carry, jax.Array]:
    state, document = carry  # [B, H, D, Dv], [B, 1, 1, 1]; document 0 = that of the first real token, whichever it is
    segment_id, q_t, k_t, v_t = token  # [B, 1, 1, 1], [B, H, 1, D], [B, H, D, 1], [B, H, 1, Dv]
    real = segment_id != 0
    q_t, k_t, v_t = (jnp.where(real, x, 0.0) for x in (q_t, k_t, v_t))
    restart = real & (document != 0) & (segment_id != document)
    state = jnp.where(real, decay * jnp.where(restart, 0.0, state) + k_t * v_t, state)
    # An einsum, which Qwix's rules leave as it is.
    o_t = scale * jnp.einsum("bhxd,bhde->bhxe", q_t, state, precision=jax.lax.Precision.HIGHEST)  # [B, H, 1, Dv]
    return (state, jnp.where(real, segment_id, document)), o_t

  q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
  tokens = (ids[..., None, None, None], q32[..., None, :], k32[..., None], v32[..., None, :])
  if initial_state is None:
    # Like a product, not plain zeros: so the state has the sharding (or shard_map's varying axes) a scan needs to see.
    initial_state = jnp.zeros_like(k32[:, 0, :, :, None] * v32[:, 0, :, None, :])
  start = (initial_state, jnp.zeros_like(tokens[0][:, 0]))
  (state, _), o = jax.lax.scan(step, start, jax.tree.map(lambda x: x.swapaxes(0, 1), tokens))  # o: [T, B, H, 1, Dv]
  return o.swapaxes(0, 1)[..., 0, :].astype(v.dtype), state if final else None
