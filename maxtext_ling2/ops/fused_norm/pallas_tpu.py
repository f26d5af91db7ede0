"""TPU kernels of what stands around linear attention: norm and rotation of queries and keys, norm and gate of outputs.

Each reads its operands once and writes its results once, in the layout [B, T, H * D] of the projections before and after
it. Left to the compiler, the same few operations on [B, T, H, D] cost several copies from one tiling to another, and
float32 arrays in the HBM. float32 is only in the chip's memory here; the gradients compute the forward values again.
Any T will do: the last block may reach beyond the end, what it finds there counts for no sum, and is not written.
Columns are worked on in parts: whole blocks of 128, or several small heads (or groups) that fill one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxtext_ling2.ops.pallas_utils import LANES, NN, VMEM_LIMIT, Ref, dot, like_input, vary_alike

_ROWS = 256
"""Tokens of a block, if its arrays are not too large."""
_COLUMNS = 2048
"""Columns of a block, if a part is not wider; a part is what one norm sees."""
_SUBLANES = 8
_TILE_ROWS = 16
"""Rows of a tile in bfloat16."""
_BLOCKS = 10 * 2**20
"""Bytes of all blocks of a step, each of them twice, while the next ones are fetched: a v4 has 16 MiB."""


def fits(width: int, total: int) -> bool:
  """Whether there are kernels for norms of `width` columns in arrays of `total`: whole blocks of 128, or whole parts."""
  return width % LANES == 0 or (LANES % width == 0 and total % LANES == 0)


def rotated_norm(
  x: jax.Array, scale: jax.Array | None, cos: jax.Array, sin: jax.Array, *, rotated: int, epsilon: float
) -> jax.Array:
  """`stages.rotated_norm` of heads that fit."""
  dim = cos.shape[-1]
  kernel = functools.partial(_rotated_norm, dim=dim, rotated=rotated, epsilon=epsilon)
  (cos, sin), scale = _repeated(dim, (cos, sin)), _repeated(dim, (scale,))[0]
  return _run(kernel, "rotated_norm", cos.shape[-1], (x,), (cos, sin), scale, _shared, [x.dtype])[0]


def rotated_norm_gradient(
  x: jax.Array, scale: jax.Array | None, cos: jax.Array, sin: jax.Array, dy: jax.Array, *, rotated: int, epsilon: float
) -> tuple[jax.Array, jax.Array | None]:
  """dx [B, T, H * D], and dscale [D] float32."""
  dim = cos.shape[-1]
  kernel = functools.partial(_rotated_norm_gradient, dim=dim, rotated=rotated, epsilon=epsilon, length=x.shape[1])
  (cos, sin), scale = _repeated(dim, (cos, sin)), _repeated(dim, (scale,))[0]
  dx, *sums = _run(
    kernel, "rotated_norm_gradient", cos.shape[-1], (x, dy), (cos, sin), scale, _shared, [x.dtype], scale is not None
  )
  return dx, sums[0].reshape(-1, dim).sum(0) if sums else None


def gated_norm(x: jax.Array, gate: jax.Array, scale: jax.Array, *, groups: int, epsilon: float) -> jax.Array:
  """`stages.gated_norm` of groups that fit."""
  width = x.shape[-1] // groups
  kernel = functools.partial(_gated_norm, width=width, epsilon=epsilon)
  return _run(kernel, "gated_norm", max(width, LANES), (x, gate), (), scale, _own, [gate.dtype])[0]


def gated_norm_gradient(
  x: jax.Array, gate: jax.Array, scale: jax.Array, dy: jax.Array, *, groups: int, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """dx and dgate [B, T, N], and dscale [N] float32."""
  width = x.shape[-1] // groups
  kernel = functools.partial(_gated_norm_gradient, width=width, epsilon=epsilon, length=x.shape[1])
  results = [x.dtype, gate.dtype]
  dx, dgate, sums = _run(
    kernel, "gated_norm_gradient", max(width, LANES), (x, gate, dy), (), scale, _own, results, sums=True
  )
  return dx, dgate, sums.reshape(-1, x.shape[-1]).sum(0)


def _repeated(dim: int, arrays: Sequence[Any]) -> list[Any]:
  """What one head has in its last axis, for all heads of a part; None stays."""
  repeats = max(LANES // dim, 1)
  return [None if array is None else jnp.concatenate([array] * repeats, axis=-1) for array in arrays]


def _shared(b: Any, t: Any, n: Any) -> tuple[Any, ...]:
  """The block of a scale that all parts share."""
  return 0, 0


def _own(b: Any, t: Any, n: Any) -> tuple[Any, ...]:
  """The block of a scale that has a value for each column."""
  return 0, n


def _run(
  kernel: Callable[..., None],
  name: str,
  part: int,
  wide: Sequence[jax.Array],
  narrow: Sequence[jax.Array],
  scale: jax.Array | None,
  place: Callable[..., tuple[Any, ...]],
  results: Sequence[Any],
  sums: bool = False,
) -> list[jax.Array]:
  """Runs a kernel over blocks of tokens and columns; it gets `part`, wide, narrow, scale, and the results.

  Args:
    kernel: the kernel.
    name: its name in the program.
    part: columns that are worked on at a time.
    wide: arrays [B, T, N], cut into blocks of whole parts.
    narrow: arrays [B, T, part], the same for all parts.
    scale: [part] or [N], or None.
    place: the block of the scale.
    results: dtypes of the results [B, T, N].
    sums: whether there is one more result, sums over tokens by columns of the scale, [B, blocks, blocks, 8, columns].
  """
  batch, length, total = wide[0].shape
  parts = max(n for n in range(1, total // part + 1) if total // part % n == 0 and (n == 1 or n * part <= _COLUMNS))
  columns = part * parts
  token = columns * sum(dtype.itemsize for dtype in (*(array.dtype for array in wide), *map(jnp.dtype, results)))
  fitting = max(_BLOCKS // (2 * token) // _TILE_ROWS, 1) * _TILE_ROWS
  rows = min(_ROWS, fitting, -(-length // _TILE_ROWS) * _TILE_ROWS)
  grid = (batch, -(-length // rows), total // columns)
  block = pl.BlockSpec((1, rows, columns), lambda b, t, n: (b, t, n))
  table = pl.BlockSpec((1, rows, part), lambda b, t, n: (b, t, 0))
  width = part if place is _shared else columns  # of the scale, in one block
  arrays = [*wide, *narrow]
  specs = [block] * len(wide) + [table] * len(narrow)
  if scale is not None:
    arrays.append(scale.astype(jnp.float32)[None])
    specs.append(pl.BlockSpec((1, width), place))
  arrays = vary_alike(arrays)
  shapes = [jax.ShapeDtypeStruct((batch, length, total), dtype) for dtype in results]
  out_specs = [block] * len(results)
  if sums:
    shapes.append(jax.ShapeDtypeStruct((batch, grid[1], _SUBLANES, grid[2] * width), jnp.float32))
    out_specs.append(pl.BlockSpec((1, 1, _SUBLANES, width), lambda b, t, n: (b, t, 0, n)))
  return list(
    pl.pallas_call(
      functools.partial(kernel, part=part),
      grid=grid,
      in_specs=specs,
      out_specs=out_specs,
      out_shape=[like_input(arrays[0], shape) for shape in shapes],
      name=name,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True
      ),
    )(*arrays)
  )


def _parts(block: Ref, part: int) -> list[Any]:
  """Where the parts of a block are."""
  return [(0, slice(None), pl.ds(start, part)) for start in range(0, block.shape[2], part)]


def _rotated_norm(x: Ref, cos: Ref, sin: Ref, *refs: Ref, part: int, dim: int, rotated: int, epsilon: float) -> None:
  *scale, y = refs
  scaled_cos, scaled_sin, swap = cos[0], sin[0], _swap(part, dim, rotated, x.dtype)
  if scale:
    scaled_cos *= scale[0][...]
    scaled_sin *= dot(scale[0][...], _swap(part, dim, rotated, jnp.float32), NN)
  for at in _parts(x, part):
    value = x[at].astype(jnp.float32)
    turned = value * scaled_cos + dot(x[at], swap, NN) * scaled_sin
    y[at] = (turned * _root(value, dim, epsilon) if scale else turned).astype(y.dtype)


def _rotated_norm_gradient(
  x: Ref, dy: Ref, cos: Ref, sin: Ref, *refs: Ref, part: int, dim: int, rotated: int, epsilon: float, length: int
) -> None:
  *rest, dx = refs if len(refs) == 1 else refs[:2]
  swap = _swap(part, dim, rotated, dy.dtype)
  swapped_sin = dot(sin[0], _swap(part, dim, rotated, jnp.float32), NN)
  total = jnp.zeros((_SUBLANES, part), jnp.float32)
  for at in _parts(x, part):
    dturned = dy[at].astype(jnp.float32) * cos[0] + dot(dy[at], swap, NN) * swapped_sin
    if rest:
      value = x[at].astype(jnp.float32)
      root = _root(value, dim, epsilon)
      normed = value * root
      total += _over_tokens(normed * dturned, length)
      dturned = _through_norm(normed, root, dturned * rest[0][...], dim)
    dx[at] = dturned.astype(dx.dtype)
  if rest:
    refs[2][0, 0] = total


def _gated_norm(x: Ref, gate: Ref, scale: Ref, y: Ref, *, part: int, width: int, epsilon: float) -> None:
  for at in _parts(x, part):
    value = x[at].astype(jnp.float32)
    open_by = jax.nn.sigmoid(gate[at].astype(jnp.float32))
    y[at] = (value * _root(value, width, epsilon) * scale[at[1:]] * open_by).astype(y.dtype)


def _gated_norm_gradient(
  x: Ref,
  gate: Ref,
  dy: Ref,
  scale: Ref,
  dx: Ref,
  dgate: Ref,
  dscale: Ref,
  *,
  part: int,
  width: int,
  epsilon: float,
  length: int,
) -> None:
  for at in _parts(x, part):
    value, dvalue = x[at].astype(jnp.float32), dy[at].astype(jnp.float32)
    open_by = jax.nn.sigmoid(gate[at].astype(jnp.float32))
    root = _root(value, width, epsilon)
    normed = value * root
    dscaled = dvalue * open_by
    dgate[at] = (dscaled * (1 - open_by) * normed * scale[at[1:]]).astype(dgate.dtype)
    dx[at] = _through_norm(normed, root, dscaled * scale[at[1:]], width).astype(dx.dtype)
    dscale[0, 0, :, at[2]] = _over_tokens(normed * dscaled, length)


def _root(x: jax.Array, width: int, epsilon: float) -> jax.Array:
  """1 / root mean square of each `width` columns, as `_mean`."""
  return jax.lax.rsqrt(_mean(x * x, width) + epsilon)


def _through_norm(normed: jax.Array, root: jax.Array, dnormed: jax.Array, width: int) -> jax.Array:
  """The gradient of x where normed = x * root(x)."""
  return root * (dnormed - normed * _mean(dnormed * normed, width))


def _mean(x: jax.Array, width: int) -> jax.Array:
  """The mean of each `width` columns of x [rows, part]: [rows, 1] if they are all; else in all columns, by a product."""
  part = x.shape[1]
  if width == part:
    return jnp.mean(x, axis=-1, keepdims=True)
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (part, part), axis) for axis in range(2))
  return dot(x, jnp.where((row & -width) == (column & -width), 1 / width, 0.0), NN)


def _swap(part: int, dim: int, rotated: int, dtype: Any) -> jax.Array:
  """The matrix [part, part] by which heads get the halves of their first `rotated` columns swapped, and then zeros.

  The matrix unit has nothing else to do here, and does it exactly; these kernels wait for the unit that moves lanes.
  """
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (part, part), axis) for axis in range(2))
  half, of_head = rotated // 2, column if dim == part else column & (dim - 1)
  from_row = jnp.where(of_head < half, column + half, column - half)
  return ((row == from_row) & (of_head < rotated)).astype(jnp.float32).astype(dtype)


def _over_tokens(x: jax.Array, length: int) -> jax.Array:
  """The sum over the tokens of a block, but for eight that are left: [8, columns]. What is beyond the end is left out."""
  rows = x.shape[0]
  if length % rows:
    row = pl.program_id(1) * rows + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    x = jnp.where(row < length, x, 0.0)
  return x.reshape(rows // _SUBLANES, _SUBLANES, -1).sum(0)
