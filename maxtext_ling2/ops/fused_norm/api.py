"""What stands around linear attention in a layer: norm and rotation of q and k, grouped norm and gate of the output.

Both work on [B, T, H * D], the layout of a projection: on TPU [B, T, H, D] is tiled in another way, and a reshape between
them is a copy. Both compute in float32 and round once. Like `gla` they are in plain JAX or, for TPUs, Pallas kernels
with a gradient of their own, which keeps the operands and computes all else again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.fused_norm import pallas_tpu, xla
from maxtext_ling2.ops.pallas_utils import differentiable, vary_alike

_PLAIN = ("reference", "chunked")


def rotated_norm(
  x: jax.Array,
  scale: jax.Array | None,
  cos: jax.Array,
  sin: jax.Array,
  *,
  rotated: int,
  epsilon: float,
  backend: str = "auto",
) -> jax.Array:
  """RMSNorm of each head, then half-rotation of its first dimensions (the others pass).

  Args:
    x: [B, T, H * D], float32 or bfloat16.
    scale: [D], of the norm; None: no norm.
    cos: [B, T, D] float32: of the angle for both halves of the rotated dimensions, 1 behind them.
    sin: [B, T, D] float32: minus the sine for the first half, the sine for the second, 0 behind them.
    rotated: number of rotated dimensions, even.
    epsilon: of the norm.
    backend: that of `gla`. Kernels need D and H * D to fill blocks of 128 columns (`pallas_tpu.fits`); else it is
      plain JAX in any case.

  Returns:
    [B, T, H * D] in x's dtype; differentiable in x and scale.

  Raises:
    ValueError: a shape does not fit x's.
  """
  dim = cos.shape[-1]
  if x.shape[-1] % dim:
    raise ValueError(f"rotated_norm: x has {x.shape[-1]} columns, no whole number of heads of {dim}, as cos has them.")
  _check("rotated_norm", x, cos=(cos, (*x.shape[:2], dim)), sin=(sin, (*x.shape[:2], dim)), scale=(scale, (dim,)))
  options: dict[str, Any] = {"rotated": rotated, "epsilon": epsilon}
  plain: Callable[..., jax.Array] = functools.partial(xla.rotated_norm, **options)
  scale = None if scale is None else scale.astype(jnp.float32)
  if backend in _PLAIN or not pallas_tpu.fits(dim, x.shape[-1]):
    return plain(x, scale, cos, sin)
  kernel = functools.partial(pallas_tpu.rotated_norm, **options)
  gradient = functools.partial(pallas_tpu.rotated_norm_gradient, **options)
  return _run(backend, plain, kernel, gradient, (x, scale), (cos, sin))


def gated_norm(
  x: jax.Array, gate: jax.Array, scale: jax.Array, *, groups: int, epsilon: float, backend: str = "auto"
) -> jax.Array:
  """RMSNorm in which each of `groups` equal groups of the last axis has its own mean square, then a sigmoid gate.

  Args:
    x: [B, T, N], float32 or bfloat16.
    gate: [B, T, N], before the sigmoid.
    scale: [N].
    groups: their number, a divisor of N; 1 is a plain RMSNorm. (Source: BailingMoeV2_5's `group_norm_size`.)
    epsilon: of the norm.
    backend: that of `gla`. Kernels need N / groups and N to fill blocks of 128 columns; else it is plain JAX in any case.

  Returns:
    [B, T, N] in the dtype of the gate; differentiable in x, gate and scale.

  Raises:
    ValueError: a shape does not fit x's.
  """
  if x.shape[-1] % groups:
    raise ValueError(f"gated_norm: groups={groups} does not divide the {x.shape[-1]} columns of x.")
  _check("gated_norm", x, gate=(gate, x.shape), scale=(scale, x.shape[-1:]))
  options: dict[str, Any] = {"groups": groups, "epsilon": epsilon}
  plain: Callable[..., jax.Array] = functools.partial(xla.gated_norm, **options)
  scale = scale.astype(jnp.float32)
  if backend in _PLAIN or not pallas_tpu.fits(x.shape[-1] // groups, x.shape[-1]):
    return plain(x, gate, scale)
  kernel = functools.partial(pallas_tpu.gated_norm, **options)
  gradient = functools.partial(pallas_tpu.gated_norm_gradient, **options)
  return _run(backend, plain, kernel, gradient, (x, gate, scale))


def _check(stage: str, x: jax.Array, **others: tuple[jax.Array | None, tuple[int, ...]]) -> None:
  """Raises ValueError for the first array that has not the shape beside it: kernels do not look."""
  for name, (array, shape) in others.items():
    if array is not None and array.shape != shape:
      raise ValueError(f"{stage}: {name} has shape {array.shape}, expected {shape}, because x is {x.shape}.")


def _run(
  backend: str,
  plain: Callable[..., jax.Array],
  kernel: Callable[..., jax.Array],
  kernel_gradient: Callable[..., Any],
  operands: Sequence[jax.Array | None],
  constants: Sequence[jax.Array] = (),
) -> jax.Array:
  """Runs a stage by kernels, or by whatever the platform has.

  Args:
    backend: "pallas" or "auto".
    plain: (*operands, *constants) -> result, in plain JAX.
    kernel: the same.
    kernel_gradient: (*operands, *constants, gradient of the result) -> gradients of the operands.
    operands: arrays.
    constants: arrays without a gradient.
  """
  number = len(operands)

  def plain_gradient(*arrays: Any) -> tuple[jax.Array | None, ...]:
    *given, dy = arrays
    return jax.vjp(lambda *operands: plain(*operands, *given[number:]), *given[:number])[1](dy)

  def choose(tpu: Callable[..., Any], default: Callable[..., Any], *arrays: Any) -> Any:
    tpu = differentiable(tpu, default)
    return tpu(*arrays) if backend == "pallas" else jax.lax.platform_dependent(*arrays, tpu=tpu, default=default)

  @jax.custom_vjp
  def run(*arrays: Any) -> Any:
    return choose(kernel, plain, *arrays)

  def pull_back(arrays: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
    return (*choose(kernel_gradient, plain_gradient, *arrays, dy), *[None] * len(constants))

  run.defvjp(lambda *arrays: (run(*arrays), arrays), pull_back)
  return run(*vary_alike((*operands, *constants)))
