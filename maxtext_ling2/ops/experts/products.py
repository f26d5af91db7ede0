"""Grouped products of the backend "xla": each expert's rows times its matrix, and the gradients of these matrices.

Rows are sorted by expert (`dispatch.py`). On TPUs and CPUs the products are `jax.lax.ragged_dot`. XLA for GPUs makes
that one dense product of all rows with all experts, and an operand of it has E times the rows' bytes (32 GiB for 4096
tokens of `ling2`, jax 0.11.2). There rows are cut into blocks of one expert each, for batched products: with blocks of
as many rows as an expert has on average, about two per expert and twice the rows, however the choices are distributed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.devices import is_gpu
from maxtext_ling2.ops.experts.dispatch import ALIGNMENT, Dispatch, round_up

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Products(NamedTuple):
  """Both products; `groups` [E] int32 tells them where the rows of each expert are."""

  alignment: int  # of the first row of each expert
  groups: Callable[[Dispatch], jax.Array]
  dot: Product  # rows [R, K], w [E, K, N], groups: each expert's rows times its matrix, [R, N] float32
  weight_gradient: Product  # x [R, K], dy [R, N], groups: x^T dy over the rows of each expert, [E, K, N] float32


def products_for(kind: str, choices: int, experts: int) -> Products:
  """The products on a kind of device (`devices.device_kind`), for so many choices of so many local experts."""
  if not is_gpu(kind):
    return Products(1, lambda where: where.sizes, *_with_derivatives(_ragged_dot, _ragged_weight_gradient))
  block = round_up(-(-choices // experts), ALIGNMENT)
  dot, weight_gradient = (functools.partial(f, block=block) for f in (_blocked_dot, _blocked_weight_gradient))
  return Products(block, lambda where: where.starts, *_with_derivatives(dot, weight_gradient))


def _precision(x: jax.Array) -> jax.lax.Precision | None:
  """float32 keeps all its bits."""
  return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _ragged_dot(rows: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  return jax.lax.ragged_dot(rows, w, sizes, precision=_precision(rows), preferred_element_type=jnp.float32)


def _ragged_weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
  dimensions = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
  )
  return jax.lax.ragged_dot_general(x, dy, sizes, dimensions, precision=_precision(x), preferred_element_type=jnp.float32)


def _blocked_dot(rows: jax.Array, w: jax.Array, starts: jax.Array, *, block: int) -> jax.Array:
  of_block = w[_expert_of_block(rows, starts, block)]  # [b, K, N]
  product = _batched("brk,bkn->brn", rows.reshape(-1, block, rows.shape[1]), of_block)  # [b, block, N]
  return product.reshape(rows.shape[0], w.shape[2])


def _blocked_weight_gradient(x: jax.Array, dy: jax.Array, starts: jax.Array, *, block: int) -> jax.Array:
  """Rows of padding, which one of x and dy holds as zeros, add nothing."""
  of_block = _batched("brk,brn->bkn", *(a.reshape(-1, block, a.shape[1]) for a in (x, dy)))  # [b, K, N]
  experts = starts.shape[0]
  return jax.ops.segment_sum(of_block, _expert_of_block(x, starts, block), experts, indices_are_sorted=True)


def _expert_of_block(rows: jax.Array, starts: jax.Array, block: int) -> jax.Array:
  """[b] int32: the last expert that begins at or before each block; an expert without rows begins where the next does."""
  first = jnp.arange(0, rows.shape[0], block, dtype=starts.dtype)
  return jnp.sum(starts <= first[:, None], axis=1, dtype=jnp.int32) - 1


def _batched(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(subscripts, a, b, precision=_precision(a), preferred_element_type=jnp.float32)


def _with_derivatives(dot: Product, weight_gradient: Product) -> tuple[Product, Product]:
  """Each is the other's derivative, so there are gradients of gradients; JAX has none of `ragged_dot_general`."""

  def dot_bwd(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array | None, ...]:
    rows, w, groups = saved
    dy = dy.astype(rows.dtype)
    return dots(dy, w.swapaxes(1, 2), groups).astype(rows.dtype), gradients(rows, dy, groups).astype(w.dtype), None

  def weight_gradient_bwd(saved: tuple[jax.Array, ...], dw: jax.Array) -> tuple[jax.Array | None, ...]:
    x, dy, groups = saved
    dw = dw.astype(x.dtype)
    return dots(dy, dw.swapaxes(1, 2), groups).astype(x.dtype), dots(x, dw, groups).astype(dy.dtype), None

  dots, gradients = jax.custom_vjp(dot), jax.custom_vjp(weight_gradient)
  dots.defvjp(lambda *inputs: (dots(*inputs), inputs), dot_bwd)
  gradients.defvjp(lambda *inputs: (gradients(*inputs), inputs), weight_gradient_bwd)
  return dots, gradients
