"""Both operations in plain JAX: for GPUs, CPUs, and head sizes that the TPU kernels do not support."""

import jax
import jax.numpy as jnp


def qk_norm_rope(
  x: jax.Array, scale: jax.Array | None, cos: jax.Array, sin: jax.Array, *, rotated: int, epsilon: float
) -> jax.Array:
  """`api.qk_norm_rope`."""
  heads = x.astype(jnp.float32).reshape(*x.shape[:2], -1, cos.shape[-1])  # [B, T, H, D]
  if scale is not None:
    heads = _rms_norm(heads, epsilon) * scale
  first, second, rest = jnp.split(heads, [rotated // 2, rotated], axis=-1)
  halves_swapped = jnp.concatenate([second, first, rest], axis=-1)
  return (heads * cos[:, :, None] + halves_swapped * sin[:, :, None]).reshape(x.shape).astype(x.dtype)


def grouped_rms_norm_gated(x: jax.Array, gate: jax.Array, scale: jax.Array, *, groups: int, epsilon: float) -> jax.Array:
  """`api.grouped_rms_norm_gated`."""
  normed = _rms_norm(x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1), epsilon).reshape(x.shape)
  return (normed * scale * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(gate.dtype)


def _rms_norm(x: jax.Array, epsilon: float) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
