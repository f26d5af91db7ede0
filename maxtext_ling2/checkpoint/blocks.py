"""Checkpoint tensors in blocks, so that memory use does not depend on the size of the checkpoint.

A block is a slice of a MaxText tensor (`stacking.Leaf`). `read_block` gathers one from Hugging Face tensors and
`write_block` scatters one into them; both copy each element once, from and to memory-mapped files. A whole tensor is
the block that spans it (`stack`, `unstack`).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.checkpoint.mapping import Entry
from maxtext_ling2.checkpoint.safetensors_file import NewTensor
from maxtext_ling2.checkpoint.stacking import Leaf

Array = NDArray[Any]
Slices = tuple[slice, ...]
"""The position of a block in a tensor, one slice per axis."""

BLOCK_BYTES = 8 * 2**20
"""Maximum bytes of a block. The allocator reuses freed blocks of this size; it returns larger ones to the system, which
hands them out again as pages to be cleared (measured: 395 MB/s with 8 MiB, 309 with 16, 193 with 32)."""

_SMALL = 2**16  # bytes below which handing an array to XLA costs more than it saves


def block_shape(leaf: Leaf, itemsize: int, limit: int = BLOCK_BYTES) -> tuple[int, ...]:
  """Returns the shape of a leaf's blocks: whole Hugging Face tensors if they fit, else whole rows of one.

  Args:
    leaf: the tensor.
    itemsize: bytes per element in the checkpoint.
    limit: maximum bytes of a block, unless one row has more.
  """
  shape, entry = list(leaf.shape), leaf.first
  free = [axis for axis in range(len(shape)) if axis not in leaf.stacked_axes]
  rows = free[entry.in_axes :] if entry.linear else free[:1]
  for axis in (*leaf.stacked_axes, *rows):
    rest = math.prod(shape) // shape[axis] * itemsize
    count = -(-shape[axis] // max(1, limit // rest))
    shape[axis] = -(-shape[axis] // count)
  return tuple(shape)


def block_slices(shape: tuple[int, ...], block: tuple[int, ...]) -> Iterator[Slices]:
  """Divides a tensor into blocks of one shape; the last ones along an axis may be smaller."""
  starts = (range(0, size, step) for size, step in zip(shape, block, strict=True))
  for corner in itertools.product(*starts):
    yield tuple(slice(i, min(i + n, end)) for i, n, end in zip(corner, block, shape, strict=True))


def hf_slices(leaf: Leaf, block: Slices) -> Iterator[tuple[Entry, str, tuple[Any, ...], Slices]]:
  """Lists the Hugging Face tensors that a block holds parts of.

  Yields:
    (entry, name of the tensor, its index in the block, the block's slices of the tensor in MaxText's layout).
  """
  stacked = leaf.stacked_axes
  experts = len(stacked) - leaf.num_stacked_axes
  inner = tuple(part for axis, part in enumerate(block) if axis not in stacked)
  for position in itertools.product(*(range(block[axis].start, block[axis].stop) for axis in stacked)):
    at = dict(zip(stacked, position, strict=True))
    index = tuple(at[axis] - part.start if axis in at else slice(None) for axis, part in enumerate(block))
    cycle, layer = (*position[experts:], 0, 0)[:2]
    entry = leaf.entries[cycle][layer]
    yield entry, entry.names[position[0] if experts else 0], index, inner


def read_block(leaf: Leaf, block: Slices, get: Callable[[str], Array], dtype: np.dtype[Any]) -> Array:
  """Gathers a block of a leaf from Hugging Face tensors.

  Args:
    leaf: the MaxText tensor.
    block: its slices.
    get: returns a Hugging Face tensor by name; may return a view of a mapped file.
    dtype: of the result. Values are cast; bits are kept if the tensors have this dtype.
  """
  out = np.empty([part.stop - part.start for part in block], dtype)
  for entry, name, index, inner in hf_slices(leaf, block):
    _copy(out[index], entry.from_hf(get(name))[inner])
  return out


def write_block(leaf: Leaf, block: Slices, values: Array, get: Callable[[str], NewTensor]) -> None:
  """Scatters the values of a block into Hugging Face tensors of new files; the inverse of `read_block`."""
  for entry, name, index, inner in hf_slices(leaf, block):
    target, part = get(name), values[index]
    first = _first_row(entry, inner)
    if first is None:
      _copy(entry.from_hf(target.array)[inner], part)
    else:
      target.write_rows(first, _contiguous(entry.to_hf(part)).astype(target.array.dtype, copy=False))


def stack(leaf: Leaf, get: Callable[[str], Array], dtype: np.dtype[Any] | None = None) -> Array:
  """Builds a whole leaf from Hugging Face tensors.

  Args:
    leaf: the MaxText tensor.
    get: returns a Hugging Face tensor by name.
    dtype: of the result; None: the one that holds the values of all the tensors.
  """
  if dtype is None:
    dtype = np.result_type(*{get(name).dtype for name in leaf.names})
  return read_block(leaf, _whole(leaf), get, dtype)


def unstack(leaf: Leaf, values: Array) -> Iterator[tuple[str, Array]]:
  """Yields the Hugging Face tensors of a whole leaf by name, as views; the inverse of `stack`."""
  for entry, name, index, _ in hf_slices(leaf, _whole(leaf)):
    yield name, entry.to_hf(values[index])


def _whole(leaf: Leaf) -> Slices:
  return tuple(slice(0, size) for size in leaf.shape)


def _first_row(entry: Entry, inner: Slices) -> int | None:
  """Number of the first Hugging Face row that the slices hold; None if they do not hold whole rows."""
  shape = entry.one_shape
  rows = entry.in_axes if entry.linear else 0  # the slowest axis in the number of a row
  if any(
    part.stop - part.start < size for axis, (part, size) in enumerate(zip(inner, shape, strict=True)) if axis != rows
  ):
    return None
  return int(inner[rows].start) * (math.prod(shape[rows + 1 :]) if entry.linear else 1)


def _copy(target: Array, source: Array) -> None:
  """Copies values, as integers where the dtypes agree: faster, and the payload of a NaN survives.

  Both arrays are transposed so that `target` is written in memory order; `_contiguous` then does the expensive part.
  """
  if target.dtype == source.dtype:
    target, source = bits(target), bits(source)
  order = np.argsort([-stride for stride in target.strides], kind="stable")
  target.transpose(order)[...] = _contiguous(source.transpose(order))


def _contiguous(array: Array) -> Array:
  """Returns the array in C order. XLA transposes in cache-sized tiles: 5 GB/s, where numpy's loops reach 0.2."""
  device = None if array.flags.c_contiguous or array.nbytes < _SMALL else _cpu_device()
  if device is None:
    return array
  import jax

  raw = bits(array)  # XLA keeps the bits of integers, whatever floats they represent
  return np.asarray(jax.device_put(raw, device)).view(array.dtype)


@functools.cache
def _cpu_device() -> Any:
  """XLA's CPU device; None if JAX_PLATFORMS excludes it."""
  import jax

  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return None


def bits(array: Array) -> Array:
  """Views an array as unsigned integers of the same size."""
  return array.view(f"u{array.dtype.itemsize}")


def all_finite(array: Array) -> bool:
  """Tells whether a float array has neither NaN nor infinity, from its bits: two reductions, no temporary array."""
  if not array.size:
    return True
  largest = {"float32": 0x7F80_0000, "bfloat16": 0x7F80, "float16": 0x7C00}[array.dtype.name]
  sign = 1 << (8 * array.dtype.itemsize - 1)
  raw = bits(array)
  return bool(raw.view(f"i{array.dtype.itemsize}").max() < largest and raw.max() < largest + sign)
