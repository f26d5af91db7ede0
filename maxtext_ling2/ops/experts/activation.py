"""silu(gate) * up and its derivative, in float32, as all backends compute it; used in kernels, too."""

from typing import Any

import jax
import jax.numpy as jnp


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
  """The float32 value nearest to x that the dtype holds."""
  return x.astype(dtype).astype(jnp.float32)


def activate(gate: jax.Array, up: jax.Array, dtype: Any, in_float32: bool) -> jax.Array:
  """h = silu(gate) * up in `dtype`.

  Args:
    gate: float32 sums.
    up: the same.
    dtype: of the result.
    in_float32: whether only the result is rounded; otherwise each step is, as in a layer of that dtype.
  """
  if in_float32:
    return (jax.nn.silu(gate) * up).astype(dtype)
  gate, up = rounded(gate, dtype), rounded(up, dtype)
  return (rounded(jax.nn.silu(gate), dtype) * up).astype(dtype)


def activate_bwd(
  gate: jax.Array, up: jax.Array, dh: jax.Array, dtype: Any, in_float32: bool
) -> tuple[jax.Array, jax.Array]:
  """Gradients of gate and up in `dtype`, from that of h, float32."""
  if not in_float32:
    gate, up = rounded(gate, dtype), rounded(up, dtype)
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  return (dh * up * (sigmoid + silu * (1 - sigmoid))).astype(dtype), (dh * silu).astype(dtype)
