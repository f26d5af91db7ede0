"""Both passes in plain JAX: rows sorted by expert, and one grouped product (`jax.lax.ragged_dot`) per matrix.

The equations are in README.md. Nothing is scattered, in the backward pass either (`dispatch.py`).
"""

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.experts import dispatch as dispatching
from maxtext_ling2.ops.experts.activation import activate, activate_bwd
from maxtext_ling2.ops.experts.base import Gradients


def forward(*inputs: jax.Array, activation_in_float32: bool, max_choices: int | None) -> jax.Array:
  """y [N, C] of the arrays of `ExpertsInputs`."""
  x, indices, weights, w_gate, w_up, w_down = inputs
  where = dispatching.dispatch(indices, w_gate.shape[0], max_choices=max_choices)
  rows, of_row = dispatching.gather_tokens(x, where), dispatching.gather_weights(weights, where)  # [R, C], [R]
  gate, up = (_dot(rows, w, where.sizes) for w in (w_gate, w_up))  # [R, F]
  h = activate(gate, up, x.dtype, activation_in_float32)
  y = of_row[:, None] * _dot(h, w_down, where.sizes)  # [R, C]
  return dispatching.combine(y.astype(x.dtype), where)


def backward(*inputs: jax.Array, activation_in_float32: bool, max_choices: int | None) -> Gradients:
  """All gradients, of the arrays of `ExpertsInputs` and dy [N, C]."""
  x, indices, weights, w_gate, w_up, w_down, dy = inputs
  where = dispatching.dispatch(indices, w_gate.shape[0], max_choices=max_choices)
  rows, dy_rows = (dispatching.gather_tokens(a, where) for a in (x, dy))  # [R, C]
  of_row = dispatching.gather_weights(weights, where)[:, None]  # [R, 1]
  gate, up = (_dot(rows, w, where.sizes) for w in (w_gate, w_up))  # [R, F]
  h = activate(gate, up, x.dtype, activation_in_float32).astype(jnp.float32)
  dh = _dot(dy_rows, _transposed(w_down), where.sizes)  # [R, F], before the routing weight
  dgate, dup = activate_bwd(gate, up, of_row * dh, x.dtype, activation_in_float32)
  dx = _dot(dgate, _transposed(w_gate), where.sizes) + _dot(dup, _transposed(w_up), where.sizes)  # [R, C]
  return Gradients(
    dispatching.combine(dx.astype(x.dtype), where),
    dispatching.choice_values(jnp.sum(h * dh, axis=1), where),
    _weight_gradient(rows, dgate, where.sizes).astype(w_gate.dtype),
    _weight_gradient(rows, dup, where.sizes).astype(w_up.dtype),
    _weight_gradient((of_row * h).astype(x.dtype), dy_rows, where.sizes).astype(w_down.dtype),
  )


def _transposed(w: jax.Array) -> jax.Array:
  return w.swapaxes(1, 2)


def _precision(x: jax.Array) -> jax.lax.Precision | None:
  """float32 keeps all its bits."""
  return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


@jax.custom_vjp
def _dot(rows: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """Each expert's rows [R, K] times its matrix [K, N]: [R, N] float32."""
  return jax.lax.ragged_dot(rows, w, sizes, precision=_precision(rows), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
  """x^T dy over the rows of each expert: [E, K, N] float32; 0 for experts without rows."""
  dimensions = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
  )
  return jax.lax.ragged_dot_general(x, dy, sizes, dimensions, precision=_precision(x), preferred_element_type=jnp.float32)


# Each is the other's derivative, so there are gradients of gradients; JAX has none of `ragged_dot_general`.


def _dot_bwd(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array | None, ...]:
  rows, w, sizes = saved
  dy = dy.astype(rows.dtype)
  return _dot(dy, _transposed(w), sizes).astype(rows.dtype), _weight_gradient(rows, dy, sizes).astype(w.dtype), None


def _weight_gradient_bwd(saved: tuple[jax.Array, ...], dw: jax.Array) -> tuple[jax.Array | None, ...]:
  x, dy, sizes = saved
  dw = dw.astype(x.dtype)
  return _dot(dy, _transposed(dw), sizes).astype(x.dtype), _dot(x, dw, sizes).astype(dy.dtype), None


_dot.defvjp(lambda *inputs: (_dot(*inputs), inputs), _dot_bwd)
_weight_gradient.defvjp(lambda *inputs: (_weight_gradient(*inputs), inputs), _weight_gradient_bwd)
