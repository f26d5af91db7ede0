"""The fused norms around linear attention: RMSNorm and RoPE of q and k, grouped RMSNorm and sigmoid gate of the output.

Both work on [B, T, H * D], the layout of a projection: on TPU [B, T, H, D] has another tiling, and a reshape between the
two is a copy. Both compute in float32 and round once. Like `gla` they run in plain JAX or, on TPUs, as Pallas kernels
with their own gradient, which saves the operands and recomputes the rest.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.fused_norm import pallas_tpu, xla
from maxtext_ling2.ops.pallas_utils import differentiable, vary_alike

_XLA_BACKENDS = ("reference", "chunked")


def qk_norm_rope(
  x: jax.Array,
  scale: jax.Array | None,
  cos: jax.Array,
  sin: jax.Array,
  *,
  rotated: int,
  epsilon: float,
  backend: str = "auto",
) -> jax.Array:
  """RMSNorm of each head, then rotation (RoPE, by halves) of its first dimensions; the others pass unchanged.

  Args:
    x: [B, T, H * D], float32 or bfloat16.
    scale: [D], of the norm; None: no norm.
    cos: [B, T, D] float32: cosine of the angle for both halves of the rotated dimensions, then 1.
    sin: [B, T, D] float32: minus the sine for the first half, the sine for the second, then 0.
    rotated: number of rotated dimensions, even.
    epsilon: of the norm.
    backend: that of `gla`. The kernels need D and H * D to fill blocks of 128 columns (`pallas_tpu.fits`); other sizes
      always run in plain JAX.

  Returns:
    [B, T, H * D] in x's dtype; differentiable in x and scale.

  Raises:
    ValueError: a shape does not fit x's.
  """
  dim = cos.shape[-1]
  if x.shape[-1] % dim:
    raise ValueError(f"qk_norm_rope: x has {x.shape[-1]} columns, not a whole number of heads of {dim}, as cos has them.")
  _check("qk_norm_rope", x, cos=(cos, (*x.shape[:2], dim)), sin=(sin, (*x.shape[:2], dim)), scale=(scale, (dim,)))
  options: dict[str, Any] = {"rotated": rotated, "epsilon": epsilon}
  xla_fallback: Callable[..., jax.Array] = functools.partial(xla.qk_norm_rope, **options)
  scale = None if scale is None else scale.astype(jnp.float32)
  if backend in _XLA_BACKENDS or not pallas_tpu.fits(dim, x.shape[-1]):
    return xla_fallback(x, scale, cos, sin)
  kernel = functools.partial(pallas_tpu.qk_norm_rope, **options)
  kernel_bwd = functools.partial(pallas_tpu.qk_norm_rope_bwd, **options)
  return _run(backend, xla_fallback, kernel, kernel_bwd, (x, scale), (cos, sin))


def grouped_rms_norm_gated(
  x: jax.Array, gate: jax.Array, scale: jax.Array, *, groups: int, epsilon: float, backend: str = "auto"
) -> jax.Array:
  """RMSNorm over each of `groups` equal groups of the last axis, then a sigmoid gate.

  Args:
    x: [B, T, N], float32 or bfloat16.
    gate: [B, T, N], before the sigmoid.
    scale: [N].
    groups: their number, a divisor of N; 1 is a plain RMSNorm. (Source: BailingMoeV2_5's `group_norm_size`.)
    epsilon: of the norm.
    backend: that of `gla`. The kernels need N / groups and N to fill blocks of 128 columns; other sizes always run in
      plain JAX.

  Returns:
    [B, T, N] in the dtype of the gate; differentiable in x, gate and scale.

  Raises:
    ValueError: a shape does not fit x's.
  """
  if x.shape[-1] % groups:
    raise ValueError(f"grouped_rms_norm_gated: groups={groups} does not divide the {x.shape[-1]} columns of x.")
  _check("grouped_rms_norm_gated", x, gate=(gate, x.shape), scale=(scale, x.shape[-1:]))
  options: dict[str, Any] = {"groups": groups, "epsilon": epsilon}
  xla_fallback: Callable[..., jax.Array] = functools.partial(xla.grouped_rms_norm_gated, **options)
  scale = scale.astype(jnp.float32)
  if backend in _XLA_BACKENDS or not pallas_tpu.fits(x.shape[-1] // groups, x.shape[-1]):
    return xla_fallback(x, gate, scale)
  kernel = functools.partial(pallas_tpu.grouped_rms_norm_gated, **options)
  kernel_bwd = functools.partial(pallas_tpu.grouped_rms_norm_gated_bwd, **options)
  return _run(backend, xla_fallback, kernel, kernel_bwd, (x, gate, scale))


def _check(operation: str, x: jax.Array, **others: tuple[jax.Array | None, tuple[int, ...]]) -> None:
  """Raises ValueError for the first array whose shape is not the given one: the kernels do not check."""
  for name, (array, shape) in others.items():
    if array is not None and array.shape != shape:
      raise ValueError(f"{operation}: {name} has shape {array.shape}, expected {shape}, because x is {x.shape}.")


def _run(
  backend: str,
  xla_fallback: Callable[..., jax.Array],
  kernel: Callable[..., jax.Array],
  kernel_bwd: Callable[..., Any],
  operands: Sequence[jax.Array | None],
  constants: Sequence[jax.Array] = (),
) -> jax.Array:
  """Runs an operation by its kernels, or with "auto" by what the platform supports.

  Args:
    backend: "pallas" or "auto".
    xla_fallback: (*operands, *constants) -> result, in plain JAX.
    kernel: the same.
    kernel_bwd: (*operands, *constants, gradient of the result) -> gradients of the operands.
    operands: arrays.
    constants: arrays without a gradient.
  """
  number = len(operands)

  def xla_bwd(*arrays: Any) -> tuple[jax.Array | None, ...]:
    *inputs, dy = arrays
    return jax.vjp(lambda *operands: xla_fallback(*operands, *inputs[number:]), *inputs[:number])[1](dy)

  def choose(tpu: Callable[..., Any], default: Callable[..., Any], *arrays: Any) -> Any:
    tpu = differentiable(tpu, default)
    return tpu(*arrays) if backend == "pallas" else jax.lax.platform_dependent(*arrays, tpu=tpu, default=default)

  @jax.custom_vjp
  def run(*arrays: Any) -> Any:
    return choose(kernel, xla_fallback, *arrays)

  def bwd(arrays: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
    return (*choose(kernel_bwd, xla_bwd, *arrays, dy), *[None] * len(constants))

  run.defvjp(lambda *arrays: (run(*arrays), arrays), bwd)
  return run(*vary_alike((*operands, *constants)))
