"""Both passes in plain JAX: rows sorted by expert, and one grouped product (`products.py`) per matrix.

The equations are in README.md. Rows are not scattered, in the backward pass either (`dispatch.py`).
"""

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.devices import device_kind
from maxtext_ling2.ops.experts import dispatch as dispatching
from maxtext_ling2.ops.experts.activation import activate, activate_bwd
from maxtext_ling2.ops.experts.base import Gradients
from maxtext_ling2.ops.experts.products import Products, products_for


def forward(*inputs: jax.Array, activation_in_float32: bool, max_choices: int | None) -> jax.Array:
  """y [N, C] of the arrays of `ExpertsInputs`."""
  x, indices, weights, w_gate, w_up, w_down = inputs
  products, where = _sorted(indices, w_gate, max_choices)
  groups = products.groups(where)
  rows, of_row = dispatching.gather_tokens(x, where), dispatching.gather_weights(weights, where)  # [R, C], [R]
  gate, up = (products.dot(rows, w, groups) for w in (w_gate, w_up))  # [R, F]
  h = activate(gate, up, x.dtype, activation_in_float32)
  y = of_row[:, None] * products.dot(h, w_down, groups)  # [R, C]
  return dispatching.combine(y.astype(x.dtype), where)


def backward(*inputs: jax.Array, activation_in_float32: bool, max_choices: int | None) -> Gradients:
  """All gradients, of the arrays of `ExpertsInputs` and dy [N, C]."""
  x, indices, weights, w_gate, w_up, w_down, dy = inputs
  products, where = _sorted(indices, w_gate, max_choices)
  groups = products.groups(where)
  rows, dy_rows = (dispatching.gather_tokens(a, where) for a in (x, dy))  # [R, C]
  of_row = dispatching.gather_weights(weights, where)[:, None]  # [R, 1]
  gate, up = (products.dot(rows, w, groups) for w in (w_gate, w_up))  # [R, F]
  h = activate(gate, up, x.dtype, activation_in_float32).astype(jnp.float32)
  dh = products.dot(dy_rows, _transposed(w_down), groups)  # [R, F], before the routing weight
  dgate, dup = activate_bwd(gate, up, of_row * dh, x.dtype, activation_in_float32)
  dx = products.dot(dgate, _transposed(w_gate), groups) + products.dot(dup, _transposed(w_up), groups)  # [R, C]
  return Gradients(
    dispatching.combine(dx.astype(x.dtype), where),
    dispatching.choice_values(jnp.sum(h * dh, axis=1), where),
    products.weight_gradient(rows, dgate, groups).astype(w_gate.dtype),
    products.weight_gradient(rows, dup, groups).astype(w_up.dtype),
    products.weight_gradient((of_row * h).astype(x.dtype), dy_rows, groups).astype(w_down.dtype),
  )


def _sorted(indices: jax.Array, w: jax.Array, max_choices: int | None) -> tuple[Products, dispatching.Dispatch]:
  """The products of this device, and the choices sorted by expert as these need it."""
  products = products_for(device_kind(), max_choices or indices.size, w.shape[0])
  return products, dispatching.dispatch(indices, w.shape[0], products.alignment, max_choices)


def _transposed(w: jax.Array) -> jax.Array:
  return w.swapaxes(1, 2)
