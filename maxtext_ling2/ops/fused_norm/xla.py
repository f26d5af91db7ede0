"""Both operations in plain JAX: for GPUs, CPUs, and head sizes that fill no block of a TPU kernel."""

import jax
import jax.numpy as jnp


def rotated_norm(
  x: jax.Array, scale: jax.Array | None, cos: jax.Array, sin: jax.Array, *, rotated: int, epsilon: float
) -> jax.Array:
  """`api.rotated_norm`."""
  heads = x.astype(jnp.float32).reshape(*x.shape[:2], -1, cos.shape[-1])
  if scale is not None:
    heads = _normed(heads, epsilon) * scale
  first, second, rest = jnp.split(heads, [rotated // 2, rotated], axis=-1)
  swapped = jnp.concatenate([second, first, rest], axis=-1)
  return (heads * cos[:, :, None] + swapped * sin[:, :, None]).reshape(x.shape).astype(x.dtype)


def gated_norm(x: jax.Array, gate: jax.Array, scale: jax.Array, *, groups: int, epsilon: float) -> jax.Array:
  """`api.gated_norm`."""
  normed = _normed(x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1), epsilon).reshape(x.shape)
  return (normed * scale * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(gate.dtype)


def _normed(x: jax.Array, epsilon: float) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
