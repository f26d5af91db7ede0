"""Tensors of MaxText in blocks: the unit in which a checkpoint is read and written, so that memory does not grow with it.

A block is a box of a MaxText tensor (`stacking.Leaf`). It is filled from, or spilled into, views of Hugging Face tensors,
which are memory-mapped files; both directions copy each element once.
"""

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
Box = tuple[slice, ...]

BLOCK_BYTES = 8 * 2**20
"""A block has at most as many bytes. Small enough that freed memory is used again: larger blocks are given back to the
system each time, and come back as pages to be cleared (measured: 395 MB/s with 8 MiB, 309 with 16, 193 with 32)."""

_SMALL = 2**16  # bytes below which handing an array to XLA costs more than it saves


def block_shape(leaf: Leaf, itemsize: int, limit: int = BLOCK_BYTES) -> tuple[int, ...]:
  """The shape of a leaf's blocks: whole Hugging Face tensors as long as they fit, else whole rows of one.

  Args:
    leaf: the tensor.
    itemsize: bytes of an element in the checkpoint.
    limit: bytes of a block, unless one row has more.
  """
  shape, first = list(leaf.shape), leaf.members[0][0]
  free = [axis for axis in range(len(shape)) if axis not in leaf.stacked_axes]
  rows = free[first.in_axes :] if first.linear else free[:1]
  for axis in (*leaf.stacked_axes, *rows):
    rest = math.prod(shape) // shape[axis] * itemsize
    parts = -(-shape[axis] // max(1, limit // rest))
    shape[axis] = -(-shape[axis] // parts)
  return tuple(shape)


def boxes(shape: tuple[int, ...], block: tuple[int, ...]) -> Iterator[Box]:
  """Cuts a tensor into boxes of the shape of a block, smaller ones at its far ends."""
  starts = (range(0, size, step) for size, step in zip(shape, block, strict=True))
  for corner in itertools.product(*starts):
    yield tuple(slice(i, min(i + n, end)) for i, n, end in zip(corner, block, shape, strict=True))


def parts(leaf: Leaf, box: Box) -> Iterator[tuple[Entry, str, tuple[Any, ...], Box]]:
  """The Hugging Face tensors that a box is made of.

  Yields:
    (entry, name of the tensor, its index in the box, the box's index in the tensor in MaxText's layout).
  """
  stacked = leaf.stacked_axes
  experts = len(stacked) - leaf.depth
  inner = tuple(part for axis, part in enumerate(box) if axis not in stacked)
  for spot in itertools.product(*(range(box[axis].start, box[axis].stop) for axis in stacked)):
    places = dict(zip(stacked, spot, strict=True))
    index = tuple(places[axis] - part.start if axis in places else slice(None) for axis, part in enumerate(box))
    block, layer = (*spot[experts:], 0, 0)[:2]
    entry = leaf.members[block][layer]
    yield entry, entry.names[spot[0] if experts else 0], index, inner


def fill(leaf: Leaf, box: Box, get: Callable[[str], Array], dtype: np.dtype[Any]) -> Array:
  """Builds a box of a leaf from Hugging Face tensors.

  Args:
    leaf: the MaxText tensor.
    box: the part of it.
    get: gives a Hugging Face tensor by name; may return a view of a mapped file.
    dtype: of the result; the values are cast, bit for bit the same if it is theirs.
  """
  out = np.empty([part.stop - part.start for part in box], dtype)
  for entry, name, index, inner in parts(leaf, box):
    _copy(out[index], entry.view(get(name))[inner])
  return out


def spill(leaf: Leaf, box: Box, block: Array, get: Callable[[str], NewTensor]) -> None:
  """Takes a box apart into Hugging Face tensors of new files; the inverse of `fill`."""
  for entry, name, index, inner in parts(leaf, box):
    target, values = get(name), block[index]
    first = _first_row(entry, inner)
    if first is None:
      _copy(entry.view(target.array)[inner], values)
      continue
    rows = values.reshape(math.prod(values.shape[: entry.in_axes]), -1).T if entry.linear else values
    target.write_rows(first, _contiguous(rows).astype(target.array.dtype, copy=False))


def _first_row(entry: Entry, inner: Box) -> int | None:
  """The first of the Hugging Face tensor's rows, if the box in MaxText's layout is a range of whole rows; else None."""
  shape = entry.one_shape
  rows = entry.in_axes if entry.linear else 0  # the axis that runs slowest in a row's number
  if any(
    part.stop - part.start < size for axis, (part, size) in enumerate(zip(inner, shape, strict=True)) if axis != rows
  ):
    return None
  return int(inner[rows].start) * (math.prod(shape[rows + 1 :]) if entry.linear else 1)


def _copy(target: Array, source: Array) -> None:
  """Copies, as bits where the dtypes agree: that is faster, and no NaN changes its payload.

  Both are transposed so that `target` is written in the order of memory; `_contiguous` then does the hard part.
  """
  if target.dtype == source.dtype:
    target, source = bits(target), bits(source)
  order = np.argsort([-stride for stride in target.strides], kind="stable")
  target.transpose(order)[...] = _contiguous(source.transpose(order))


def _contiguous(array: Array) -> Array:
  """The array in C order. XLA transposes in tiles that fit the CPU's cache: 5 GB/s where numpy's loops reach 0.2."""
  if array.flags.c_contiguous or array.nbytes < _SMALL:
    return array
  import jax

  raw = bits(array)  # an integer is an integer to XLA whatever floats it stands for
  return np.asarray(jax.device_put(raw, jax.local_devices(backend="cpu")[0])).view(array.dtype)


def bits(array: Array) -> Array:
  """A view as unsigned integers of the same size."""
  return array.view(f"u{array.dtype.itemsize}")


def all_finite(array: Array) -> bool:
  """Whether a float array has neither NaN nor infinity, told from its bits: two reductions and no temporary array."""
  if not array.size:
    return True
  largest = {"float32": 0x7F80_0000, "bfloat16": 0x7F80, "float16": 0x7C00}[array.dtype.name]
  sign = 1 << (8 * array.dtype.itemsize - 1)
  raw = bits(array)
  return bool(raw.view(f"i{array.dtype.itemsize}").max() < largest and raw.max() < largest + sign)
