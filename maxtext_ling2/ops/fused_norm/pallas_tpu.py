"""TPU kernels of the fused norms, forward and backward.

Each reads its operands once and writes its results once, in the layout [B, T, H * D] of the projections before and after
it. Left to the compiler, the same few operations on [B, T, H, D] cost several copies from one tiling to another, and
float32 arrays in HBM. Here float32 is only in VMEM; the backward kernels recompute the forward values. Any T is allowed:
the last block may extend past the end, its rows there are masked in sums and not written.

A kernel works on `columns` at a time: one norm's D (or group), a multiple of 128, or 128 columns of several small ones.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxtext_ling2.ops.pallas_utils import LANES, NN, VMEM_LIMIT, Ref, dot, like_input, vary_alike

_BLOCK_ROWS = 256
"""Tokens of a block, unless its arrays are too large."""
_BLOCK_COLUMNS = 2048
"""Columns of a block, unless those of one norm are more."""
_SUBLANES = 8
_TILE_ROWS = 16
"""Rows of a bfloat16 tile."""
_BLOCK_BYTES = 10 * 2**20
"""Bytes of all blocks of a step, each held twice while the next ones are fetched: a v4 has 16 MiB."""


def fits(width: int, total: int) -> bool:
  """Whether the kernels support norms of `width` columns in arrays of `total` columns."""
  return width % LANES == 0 or (LANES % width == 0 and total % LANES == 0)


def qk_norm_rope(
  x: jax.Array, scale: jax.Array | None, cos: jax.Array, sin: jax.Array, *, rotated: int, epsilon: float
) -> jax.Array:
  """`api.qk_norm_rope`."""
  dim = cos.shape[-1]
  kernel = functools.partial(_qk_norm_rope, dim=dim, rotary_dim=rotated, epsilon=epsilon)
  (cos, sin), scale = _repeated(dim, (cos, sin)), _repeated(dim, (scale,))[0]
  return _call(kernel, "rotated_norm", cos.shape[-1], (x,), (cos, sin), scale, [x.dtype])[0]


def qk_norm_rope_bwd(
  x: jax.Array, scale: jax.Array | None, cos: jax.Array, sin: jax.Array, dy: jax.Array, *, rotated: int, epsilon: float
) -> tuple[jax.Array, jax.Array | None]:
  """dx [B, T, H * D], and dscale [D] float32."""
  dim = cos.shape[-1]
  kernel = functools.partial(_qk_norm_rope_bwd, dim=dim, rotary_dim=rotated, epsilon=epsilon, length=x.shape[1])
  (cos, sin), scale = _repeated(dim, (cos, sin)), _repeated(dim, (scale,))[0]
  sums = scale is not None
  dx, *dscale = _call(kernel, "rotated_norm_gradient", cos.shape[-1], (x, dy), (cos, sin), scale, [x.dtype], sums=sums)
  return dx, dscale[0].reshape(-1, dim).sum(0) if dscale else None


def grouped_rms_norm_gated(x: jax.Array, gate: jax.Array, scale: jax.Array, *, groups: int, epsilon: float) -> jax.Array:
  """`api.grouped_rms_norm_gated`."""
  width = x.shape[-1] // groups
  kernel = functools.partial(_grouped_rms_norm_gated, width=width, epsilon=epsilon)
  return _call(kernel, "gated_norm", max(width, LANES), (x, gate), (), scale, [gate.dtype], scale_per_column=True)[0]


def grouped_rms_norm_gated_bwd(
  x: jax.Array, gate: jax.Array, scale: jax.Array, dy: jax.Array, *, groups: int, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dx and dgate [B, T, N], and dscale [N] float32."""
  width = x.shape[-1] // groups
  kernel = functools.partial(_grouped_rms_norm_gated_bwd, width=width, epsilon=epsilon, length=x.shape[1])
  tokens, dtypes = (x, gate, dy), [x.dtype, gate.dtype]
  dx, dgate, dscale = _call(
    kernel, "gated_norm_gradient", max(width, LANES), tokens, (), scale, dtypes, scale_per_column=True, sums=True
  )
  return dx, dgate, dscale.reshape(-1, x.shape[-1]).sum(0)


def _repeated(dim: int, arrays: Sequence[Any]) -> list[Any]:
  """Arrays [..., D], repeated for all heads of 128 columns; None stays."""
  repeats = max(LANES // dim, 1)
  return [None if array is None else jnp.concatenate([array] * repeats, axis=-1) for array in arrays]


def _call(
  kernel: Callable[..., None],
  name: str,
  columns: int,
  tokens: Sequence[jax.Array],
  tables: Sequence[jax.Array],
  scale: jax.Array | None,
  out_dtypes: Sequence[Any],
  *,
  scale_per_column: bool = False,
  sums: bool = False,
) -> list[jax.Array]:
  """Runs a kernel over blocks of tokens and columns; it gets `columns`, tokens, tables, scale, and the results.

  Args:
    kernel: the kernel.
    name: its name in the program.
    columns: columns that the kernel works on at a time.
    tokens: arrays [B, T, N].
    tables: arrays [B, T, columns], the same for all columns of N.
    scale: [columns], or [N] with scale_per_column, or None.
    out_dtypes: dtypes of the results [B, T, N].
    scale_per_column: whether the scale has a value for each column of N.
    sums: whether there is one more result: partial sums over tokens [B, row blocks, 8, columns of all scale blocks].
  """
  batch, length, total = tokens[0].shape
  itemsizes = [dtype.itemsize for dtype in (*(array.dtype for array in tokens), *map(jnp.dtype, out_dtypes))]
  rows, block_columns = _block_shape(length, total, columns, sum(itemsizes))
  grid = (batch, -(-length // rows), total // block_columns)
  block = pl.BlockSpec((1, rows, block_columns), lambda b, t, n: (b, t, n))
  table = pl.BlockSpec((1, rows, columns), lambda b, t, n: (b, t, 0))
  scale_columns = block_columns if scale_per_column else columns
  arrays = [*tokens, *tables]
  in_specs = [block] * len(tokens) + [table] * len(tables)
  if scale is not None:
    arrays.append(scale.astype(jnp.float32)[None])
    in_specs.append(pl.BlockSpec((1, scale_columns), lambda b, t, n: (0, n if scale_per_column else 0)))
  arrays = vary_alike(arrays)
  out_shapes = [jax.ShapeDtypeStruct((batch, length, total), dtype) for dtype in out_dtypes]
  out_specs = [block] * len(out_dtypes)
  if sums:
    out_shapes.append(jax.ShapeDtypeStruct((batch, grid[1], _SUBLANES, grid[2] * scale_columns), jnp.float32))
    out_specs.append(pl.BlockSpec((1, 1, _SUBLANES, scale_columns), lambda b, t, n: (b, t, 0, n)))
  return list(
    pl.pallas_call(
      functools.partial(kernel, columns=columns),
      grid=grid,
      in_specs=in_specs,
      out_specs=out_specs,
      out_shape=[like_input(arrays[0], shape) for shape in out_shapes],
      name=name,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True
      ),
    )(*arrays)
  )


def _block_shape(length: int, total: int, columns: int, itemsize: int) -> tuple[int, int]:
  """Rows and columns of a block; `itemsize` is the bytes per element of all arrays together."""
  norms = total // columns
  per_block = max(n for n in range(1, norms + 1) if norms % n == 0 and (n == 1 or n * columns <= _BLOCK_COLUMNS))
  block_columns = columns * per_block
  fitting = max(_BLOCK_BYTES // (2 * block_columns * itemsize) // _TILE_ROWS, 1) * _TILE_ROWS
  return min(_BLOCK_ROWS, fitting, -(-length // _TILE_ROWS) * _TILE_ROWS), block_columns


def _slices(block: Ref, columns: int) -> list[Any]:
  """Indices of a block [1, rows, block columns], `columns` at a time."""
  return [(0, slice(None), pl.ds(start, columns)) for start in range(0, block.shape[2], columns)]


def _qk_norm_rope(
  x: Ref, cos: Ref, sin: Ref, *refs: Ref, columns: int, dim: int, rotary_dim: int, epsilon: float
) -> None:
  *scale, y = refs
  scaled_cos, scaled_sin, swap = cos[0], sin[0], _rotate_half_matrix(columns, dim, rotary_dim, x.dtype)
  if scale:
    scaled_cos *= scale[0][...]
    scaled_sin *= dot(scale[0][...], _rotate_half_matrix(columns, dim, rotary_dim, jnp.float32), NN)
  for at in _slices(x, columns):
    value = x[at].astype(jnp.float32)  # [rows, columns]
    rotated = value * scaled_cos + dot(x[at], swap, NN) * scaled_sin
    y[at] = (rotated * _rstd(value, dim, epsilon) if scale else rotated).astype(y.dtype)


def _qk_norm_rope_bwd(
  x: Ref,
  dy: Ref,
  cos: Ref,
  sin: Ref,
  *refs: Ref,
  columns: int,
  dim: int,
  rotary_dim: int,
  epsilon: float,
  length: int,
) -> None:
  *scale, dx = refs if len(refs) == 1 else refs[:2]
  swap = _rotate_half_matrix(columns, dim, rotary_dim, dy.dtype)
  swapped_sin = dot(sin[0], _rotate_half_matrix(columns, dim, rotary_dim, jnp.float32), NN)
  dscale = jnp.zeros((_SUBLANES, columns), jnp.float32)
  for at in _slices(x, columns):
    dvalue = dy[at].astype(jnp.float32) * cos[0] + dot(dy[at], swap, NN) * swapped_sin  # [rows, columns]
    if scale:
      value = x[at].astype(jnp.float32)
      rstd = _rstd(value, dim, epsilon)
      normed = value * rstd
      dscale += _partial_sum(normed * dvalue, length)
      dvalue = _rms_norm_bwd(normed, rstd, dvalue * scale[0][...], dim)
    dx[at] = dvalue.astype(dx.dtype)
  if scale:
    refs[2][0, 0] = dscale


def _grouped_rms_norm_gated(x: Ref, gate: Ref, scale: Ref, y: Ref, *, columns: int, width: int, epsilon: float) -> None:
  for at in _slices(x, columns):
    value = x[at].astype(jnp.float32)  # [rows, columns]
    sigmoid = jax.nn.sigmoid(gate[at].astype(jnp.float32))
    y[at] = (value * _rstd(value, width, epsilon) * scale[at[1:]] * sigmoid).astype(y.dtype)


def _grouped_rms_norm_gated_bwd(
  x: Ref,
  gate: Ref,
  dy: Ref,
  scale: Ref,
  dx: Ref,
  dgate: Ref,
  dscale: Ref,
  *,
  columns: int,
  width: int,
  epsilon: float,
  length: int,
) -> None:
  for at in _slices(x, columns):
    value, dvalue = x[at].astype(jnp.float32), dy[at].astype(jnp.float32)  # [rows, columns]
    sigmoid = jax.nn.sigmoid(gate[at].astype(jnp.float32))
    rstd = _rstd(value, width, epsilon)
    normed = value * rstd
    dscaled = dvalue * sigmoid
    dgate[at] = (dscaled * (1 - sigmoid) * normed * scale[at[1:]]).astype(dgate.dtype)
    dx[at] = _rms_norm_bwd(normed, rstd, dscaled * scale[at[1:]], width).astype(dx.dtype)
    dscale[0, 0, :, at[2]] = _partial_sum(normed * dscaled, length)


def _rstd(x: jax.Array, width: int, epsilon: float) -> jax.Array:
  """1 / root mean square of each `width` columns, shaped as `_mean`."""
  return jax.lax.rsqrt(_mean(x * x, width) + epsilon)


def _rms_norm_bwd(normed: jax.Array, rstd: jax.Array, dnormed: jax.Array, width: int) -> jax.Array:
  """The gradient of x for normed = x * rstd(x)."""
  return rstd * (dnormed - normed * _mean(dnormed * normed, width))


def _mean(x: jax.Array, width: int) -> jax.Array:
  """The mean of each `width` columns of x [rows, columns]: [rows, 1] if that is all columns, else [rows, columns]."""
  columns = x.shape[1]
  if width == columns:
    return jnp.mean(x, axis=-1, keepdims=True)
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (columns, columns), axis) for axis in range(2))
  return dot(x, jnp.where((row & -width) == (column & -width), 1 / width, 0.0), NN)  # block-diagonal matrix


def _rotate_half_matrix(columns: int, dim: int, rotary_dim: int, dtype: Any) -> jax.Array:
  """The matrix [columns, columns] that swaps the halves of each head's first `rotary_dim` columns and zeros the rest.

  The MXU is idle here and a permutation matmul is exact; the kernels are bound by the cross-lane unit (XLU).
  """
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (columns, columns), axis) for axis in range(2))
  half, of_head = rotary_dim // 2, column if dim == columns else column & (dim - 1)
  from_row = jnp.where(of_head < half, column + half, column - half)
  return ((row == from_row) & (of_head < rotary_dim)).astype(jnp.float32).astype(dtype)


def _partial_sum(x: jax.Array, length: int) -> jax.Array:
  """Partial sum over a block's tokens, kept as 8 sublanes [8, columns]; rows past the end of the sequence are masked."""
  rows = x.shape[0]
  if length % rows:
    row = pl.program_id(1) * rows + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    x = jnp.where(row < length, x, 0.0)
  return x.reshape(rows // _SUBLANES, _SUBLANES, -1).sum(0)
