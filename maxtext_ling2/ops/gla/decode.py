"""GLA for decoding: the state in, one token or a short prompt on, the state out. Pure functions in plain JAX."""

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla.api import gla


def gla_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array,
  state: jax.Array,
  *,
  active: jax.Array | None = None,
  scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One token of each row, for the recurrence of `gla`.

  Args:
    q: query [B, H, D], float32 or bfloat16.
    k: key [B, H, D].
    v: value [B, H, Dv].
    g_gamma: natural log of the decay per token, [H] float32.
    state: [B, H, D, Dv] float32.
    active: [B] bool; a row that is not active (no request in its place, or one that has ended) keeps its state and
      gives 0. None: all rows are active.
    scale: factor of the outputs; None means D ** -0.5.

  Returns:
    o [B, H, Dv] in v's dtype, and the new state [B, H, D, Dv] float32.

  Raises:
    ValueError: a shape does not fit the others.
  """
  _check(q, k, v, g_gamma, state, active)
  scale = q.shape[2] ** -0.5 if scale is None else scale
  # At one token the time goes into reading and writing the state: sums of products in float32, no matrix unit.
  q, k, v32 = (x.astype(jnp.float32) for x in (q, k, v))
  decay = jnp.exp(g_gamma)[:, None, None]  # [H, 1, 1]
  new = decay * state + k[..., None] * v32[..., None, :]
  o = scale * (q[..., None] * new).sum(axis=2)  # [B, H, Dv]
  if active is not None:
    o = jnp.where(active[:, None, None], o, 0.0)
    new = jnp.where(active[:, None, None, None], new, state)
  return o.astype(v.dtype), new


def gla_prompt(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array,
  state: jax.Array,
  *,
  active: jax.Array | None = None,
  scale: float | None = None,
  backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """A prompt, or a piece of one, of each row, going on from a state.

  Args:
    q: queries [B, T, H, D].
    k: keys [B, T, H, D].
    v: values [B, T, H, Dv].
    g_gamma: natural log of the decay per token, [H] float32.
    state: [B, H, D, Dv] float32; zeros for a new prompt.
    active: [B, T] bool, false for the padding of shorter prompts, wherever it is. None: all tokens are.
    scale: factor of the outputs; None means D ** -0.5.
    backend: that of `gla`.

  Returns:
    o [B, T, H, Dv] in v's dtype, 0 for padding, and the state [B, H, D, Dv] float32 after each row's last token.

  Raises:
    ValueError: an argument has a wrong shape or dtype.
  """
  o, new = gla(
    q,
    k,
    v,
    g_gamma,
    segment_ids=None if active is None else active.astype(jnp.int32),
    initial_state=state,
    output_final_state=True,
    scale=scale,
    backend=backend,
  )
  assert new is not None
  return o, new


def _check(
  q: jax.Array, k: jax.Array, v: jax.Array, g_gamma: jax.Array, state: jax.Array, active: jax.Array | None
) -> None:
  """Raises ValueError for the first argument that does not fit q and v."""
  if q.ndim != 3 or v.ndim != 3:
    raise ValueError(f"gla_step: q has shape {q.shape} and v {v.shape}, expected 3 dimensions [B, H, D].")
  batch, heads, dim = q.shape
  expected = {"k": q.shape, "v": (batch, heads, v.shape[2]), "g_gamma": (heads,)}
  expected |= {"state": (batch, heads, dim, v.shape[2]), "active": (batch,)}
  for name, value in {"k": k, "v": v, "g_gamma": g_gamma, "state": state, "active": active}.items():
    if value is not None and value.shape != expected[name]:
      raise ValueError(
        f"gla_step: {name} has shape {value.shape}, expected {expected[name]}, because q is {q.shape} and v is {v.shape}."
      )
