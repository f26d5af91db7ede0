"""The entry to the experts of a mixture: checks the arguments, chooses a backend, and holds the gradient rule."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.backends import EXPERTS_BACKENDS
from maxtext_ling2.ops.devices import device_kind
from maxtext_ling2.ops.experts import pallas_tpu, xla
from maxtext_ling2.ops.experts.base import Backward, ExpertsInputs, Forward
from maxtext_ling2.ops.experts.block_sizes import why_not_kernel
from maxtext_ling2.ops.experts.reference import reference
from maxtext_ling2.ops.pallas_utils import vary_alike

_OPERANDS = (jnp.float32, jnp.bfloat16)


def experts(
  x: jax.Array,
  indices: jax.Array,
  weights: jax.Array,
  w_gate: jax.Array,
  w_up: jax.Array,
  w_down: jax.Array,
  *,
  activation_in_float32: bool = False,
  max_choices: int | None = None,
  backend: str = "auto",
) -> jax.Array:
  """Experts with SwiGLU, each applied to the tokens that chose it:

      y_n = sum_j weights[n, j] * (silu(x_n w_gate[e]) * (x_n w_up[e])) w_down[e],    e = indices[n, j]

  over the choices j whose expert is local, 0 <= e < E; the others contribute nothing. So with expert parallelism each
  device calls it with its own experts and indices that count from the first of them, and y is summed over the devices.
  All shapes are static: any distribution of the choices is computed, no token is dropped. Call it under
  `jax.shard_map`, on local arrays: the compiler cannot partition the kernels.

  Products have float32 sums; bfloat16 operands are multiplied as they are, float32 ones with all their bits. h, in the
  brackets above, is rounded to x's dtype, and so is the weighted output of each choice; the sum over j is in float32.

  For the backward pass only the arguments are saved.

  Args:
    x: tokens [N, C], float32 or bfloat16 ("reference" also takes float64).
    indices: [N, k] int32. The experts of one token need not differ.
    weights: routing weights [N, k], float32.
    w_gate: [E, C, F] in x's dtype.
    w_up: [E, C, F] in x's dtype.
    w_down: [E, F, C] in x's dtype.
    activation_in_float32: whether x w_gate and x w_up are left in float32 until h; otherwise they and silu are
      rounded to x's dtype, as in a layer of that dtype.
    max_choices: how many of the N * k choices are local at most, for smaller buffers; the caller sees to it, since a
      surplus would be left out. None: all may be.
    backend: "reference" (every expert on every token, in float32), "xla" (grouped products), "pallas" (TPU
      kernels), or "auto": "pallas" where the program is traced for a TPU (`devices.device_kind`) and the kernels
      support the shapes (`block_sizes.why_not_kernel`), else "xla".

  Returns:
    y [N, C] in x's dtype, differentiable in x, weights and the three matrices.

  Raises:
    ValueError: the backend is unknown, or an argument has a wrong shape or dtype.
  """
  inputs = ExpertsInputs(x, indices, weights, w_gate, w_up, w_down)
  if backend not in EXPERTS_BACKENDS:
    raise ValueError(f"experts: backend is {backend!r}, expected one of {', '.join(map(repr, EXPERTS_BACKENDS))}.")
  _check(inputs, backend)
  if backend == "reference":
    return reference(inputs)
  forward, backward = _passes(backend, inputs)
  static: dict[str, Any] = {"activation_in_float32": activation_in_float32, "max_choices": max_choices}
  return _differentiable(functools.partial(forward, **static), functools.partial(backward, **static))(
    *vary_alike(tuple(inputs))
  )


def _passes(backend: str, inputs: ExpertsInputs) -> tuple[Forward, Backward]:
  """Forward and backward pass of a backend."""
  reason = why_not_kernel(inputs.w_gate.shape[1], inputs.w_gate.shape[2], inputs.x.dtype.itemsize)
  if backend == "pallas" and reason:
    raise ValueError(f"experts: backend is 'pallas', but {reason}; use 'xla', or 'auto', which then takes it.")
  if backend == "xla" or reason or (backend == "auto" and not device_kind().startswith("TPU")):
    return xla.forward, xla.backward
  return pallas_tpu.forward, pallas_tpu.backward


def _differentiable(forward: Any, backward: Any) -> Any:
  """The forward pass with its gradient rule: what is saved are the arguments, so rematerialisation runs no kernel."""
  run = jax.custom_vjp(forward)

  def bwd(inputs: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array | None, ...]:
    dx, dweights, *dmatrices = backward(*inputs, dy)
    return dx, None, dweights, *dmatrices

  run.defvjp(lambda *inputs: (forward(*inputs), inputs), bwd)
  return run


def _check(inputs: ExpertsInputs, backend: str) -> None:
  """Raises ValueError for the first argument that is wrong in itself or does not fit those before it."""
  x, indices, w_gate = inputs.x, inputs.indices, inputs.w_gate
  for name, value, ndim, axes in (
    ("x", x, 2, "[N, C]"),
    ("indices", indices, 2, "[N, k]"),
    ("w_gate", w_gate, 3, "[E, C, F]"),
  ):
    if value.ndim != ndim or 0 in value.shape:
      raise ValueError(f"experts: {name} has shape {value.shape}, expected {axes}, none of size 0.")
  tokens, width = x.shape
  number, _, hidden = w_gate.shape
  operands = (*_OPERANDS, jnp.float64) if backend == "reference" else _OPERANDS
  shapes = (
    (tokens, width),
    (tokens, indices.shape[1]),
    indices.shape,
    *[(number, width, hidden)] * 2,
    (number, hidden, width),
  )
  weight_dtypes = (x.dtype,) if x.dtype == jnp.float64 else (jnp.float32,)
  dtypes = (operands, (jnp.int32,), weight_dtypes, *[(x.dtype,)] * 3)
  because = f"x is {x.dtype}{list(x.shape)}, indices {list(indices.shape)} and w_gate {list(w_gate.shape)}"
  for name, value, shape, allowed in zip(inputs._fields, inputs, shapes, dtypes, strict=True):
    if value.shape != shape:
      raise ValueError(f"experts: {name} has shape {value.shape}, expected {shape}, because {because}.")
    if value.dtype not in allowed:
      choices = " or ".join(jnp.dtype(dtype).name for dtype in allowed)
      raise ValueError(f"experts: {name} has dtype {value.dtype}, expected {choices}, because {because}.")
