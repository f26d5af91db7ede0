"""One decoding step of GLA in plain JAX: state and one token in, output and new state out."""

import jax
import jax.numpy as jnp


def gla_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array,
  state: jax.Array,
  *,
  scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One token per sequence, by the recurrence of `gla`.

  Args:
    q: query [B, H, D], float32 or bfloat16.
    k: key [B, H, D].
    v: value [B, H, Dv].
    g_gamma: [H] float32, natural log of the decay per token.
    state: [B, H, D, Dv] float32.
    scale: factor of the outputs; None means D ** -0.5.

  Returns:
    o [B, H, Dv] in v's dtype, and the new state [B, H, D, Dv] float32.

  Raises:
    ValueError: a shape does not fit the others.
  """
  _check(q, k, v, g_gamma, state)
  scale = q.shape[2] ** -0.5 if scale is None else scale
  # One token is bound by reading and writing the state: elementwise products and sums in float32, not the MXU.
  q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
  decay = jnp.exp(g_gamma)[:, None, None]  # [H, 1, 1]
  new = decay * state + k[..., None] * v32[..., None, :]  # [B, H, D, Dv]
  o = scale * (q[..., None] * new).sum(axis=2)  # [B, H, Dv]
  return o.astype(v.dtype), new


def _check(q: jax.Array, k: jax.Array, v: jax.Array, g_gamma: jax.Array, state: jax.Array) -> None:
  """Raises ValueError for the first argument that does not fit q and v."""
  if q.ndim != 3 or v.ndim != 3:
    raise ValueError(f"gla_step: q has shape {q.shape} and v {v.shape}, expected 3 dimensions [B, H, D].")
  batch, heads, dim = q.shape
  expected = {"k": q.shape, "v": (batch, heads, v.shape[2]), "g_gamma": (heads,)}
  expected |= {"state": (batch, heads, dim, v.shape[2])}
  for name, value in {"k": k, "v": v, "g_gamma": g_gamma, "state": state}.items():
    if value.shape != expected[name]:
      raise ValueError(
        f"gla_step: {name} has shape {value.shape}, expected {expected[name]}, because q is {q.shape} and v is {v.shape}."
      )
