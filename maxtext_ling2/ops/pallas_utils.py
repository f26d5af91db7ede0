"""Helpers that all Pallas TPU kernels of this package share: hardware sizes, products, sharding types, derivatives."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import jax
import jax.numpy as jnp

Ref = Any
"""A mutable array in VMEM or SMEM, as a kernel gets it; JAX has no public type for it."""

LANES: Final = 128
"""Lanes of a vector register: the last axis of a block is a multiple of it."""

VMEM_LIMIT: Final = 60 * 2**20
"""Bytes of VMEM that a kernel may use: more than the compiler's default, which is too low for some shapes."""

NN: Final = ((1,), (0,))  # contracted dimensions of x y
NT: Final = ((1,), (1,))  # of x y^T
TN: Final = ((0,), (0,))  # of x^T y


def dot(x: jax.Array, y: jax.Array, contracted: tuple[Sequence[int], Sequence[int]]) -> jax.Array:
  """Product with a float32 sum. float32 operands keep all their bits (the TPU's default would round them to bfloat16)."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def vary_alike(arrays: Any) -> Any:
  """Makes all arrays vary over the same mesh axes, as a kernel within a `jax.shard_map` with `check_vma` requires."""
  varying = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))

  def vary(x: jax.Array) -> jax.Array:
    missing = tuple(varying - jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(vary, arrays)


def like_input(like: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """The shape of an output, varying over the mesh axes of the input `like`."""
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def differentiable[F: Callable[..., Any]](kernel: F, xla_fallback: F) -> F:
  """The kernel with the derivative of the same function in plain JAX.

  Operations call their kernels inside a gradient rule of their own (a `custom_vjp`), which serves first derivatives. The
  rule here, a second `custom_vjp` within the first, is needed for gradients of gradients: JAX then differentiates the
  first rule, kernels included, and a `pallas_call` has no derivative.
  """

  def call(*args: Any, **static: Any) -> Any:
    run = jax.custom_vjp(functools.partial(kernel, **static))
    run.defvjp(
      lambda *args: (kernel(*args, **static), args),
      lambda args, cotangents: jax.vjp(functools.partial(xla_fallback, **static), *args)[1](cotangents),
    )
    return run(*args)

  return cast(F, call)
