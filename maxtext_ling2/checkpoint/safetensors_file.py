"""safetensors files as memory-mapped arrays: read without a copy, and written in any order.

The library `safetensors` returns copies, and writes a file only from a dict that holds all of it; both need memory for
the whole checkpoint. The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length n, n
bytes of JSON {name: {dtype, shape, data_offsets [begin, end]}}, then the data, row-major, little-endian.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.errors import CheckpointError

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
}
"""The supported dtypes; quantized checkpoints have others."""


_MAX_HEADER = 100_000_000  # the library's own limit
_HINT = "fetch the file again"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Builds a JSON object, as `object_pairs_hook` of json.loads, which would silently keep the last of equal keys.

  Raises:
    ValueError: a key occurs twice; it is named.
  """
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
  return found


def dtype(name: str) -> np.dtype[Any]:
  """Returns the dtype of a name of numpy's, such as bfloat16.

  Raises:
    CheckpointError: the weights cannot have it.
  """
  known = {one.name: one for one in DTYPES.values()}
  if name not in known:
    raise CheckpointError(f"dtype {name}: not one of {', '.join(known)}, which LING2's weights can have; choose one")
  return known[name]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """One tensor of a file.

  Attributes:
    dtype: the format's name, such as BF16.
    shape: its shape.
    begin: first byte, counted from the start of the data.
    end: byte after the last one.
  """

  dtype: str
  shape: tuple[int, ...]
  begin: int
  end: int


def read(path: Path) -> dict[str, Array]:
  """Maps a file and returns its tensors as read-only views.

  Raises:
    CheckpointError: the file is not a whole safetensors file of float32, bfloat16 or float16 tensors.
  """
  specs, start = read_header(path)
  unknown = sorted({spec.dtype for spec in specs.values()} - set(DTYPES))
  if unknown:
    name = next(name for name, spec in specs.items() if spec.dtype == unknown[0])
    raise CheckpointError(
      f"{path}: {name} is {unknown[0]}, which is none of {', '.join(DTYPES)}; use an unquantized checkpoint"
    )
  data = np.memmap(path, np.uint8, mode="r") if specs else np.empty(0, np.uint8)
  return {name: _view(data, spec, start) for name, spec in specs.items()}


def read_header(path: Path) -> tuple[dict[str, TensorSpec], int]:
  """Reads the header of a file: its tensors, and the byte where the data starts.

  Raises:
    CheckpointError: the header is invalid, or does not fit the size of the file.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
      raise CheckpointError(
        f"{path}: not a safetensors file, because its {size} bytes cannot hold a header of {length}; {_HINT}"
      )
    text = file.read(length)
  try:
    header = json.loads(text, object_pairs_hook=unique_keys)
    header.pop("__metadata__", None)
    specs = {name: _spec(entry) for name, entry in header.items()}
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise CheckpointError(f"{path}: its safetensors header is not valid ({error!r}); {_HINT}") from error
  _check_layout(path, specs, size - 8 - length)
  return specs, 8 + length


def _spec(entry: dict[str, Any]) -> TensorSpec:
  begin, end = entry["data_offsets"]
  shape = tuple(entry["shape"])
  if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
    raise ValueError(f"shape {shape} and data_offsets {begin, end} must be non-negative integers")
  return TensorSpec(str(entry["dtype"]), shape, begin, end)


def _check_layout(path: Path, specs: Mapping[str, TensorSpec], size: int) -> None:
  """Raises CheckpointError unless the tensors fill the file without gap or overlap, with the bytes of their shapes."""
  position = 0
  for name, spec in sorted(specs.items(), key=lambda item: (item[1].begin, item[1].end)):
    itemsize = DTYPES[spec.dtype].itemsize if spec.dtype in DTYPES else None
    if itemsize is not None and spec.end - spec.begin != math.prod(spec.shape) * itemsize:
      raise CheckpointError(
        f"{path}: {name} has {spec.end - spec.begin} bytes, but {spec.dtype} {spec.shape} needs "
        f"{math.prod(spec.shape) * itemsize}; {_HINT}"
      )
    if spec.begin != position:
      raise CheckpointError(f"{path}: {name} starts at byte {spec.begin} of the data, expected {position}; {_HINT}")
    position = spec.end
  if position != size:
    what = "truncated" if position > size else "too long"
    raise CheckpointError(f"{path}: {what}, because its header declares {position} bytes, found {size}; {_HINT}")


def _view(data: Array, spec: TensorSpec, start: int) -> Array:
  if spec.begin == spec.end:
    return np.empty(spec.shape, DTYPES[spec.dtype])
  return np.ndarray(spec.shape, DTYPES[spec.dtype], buffer=data, offset=start + spec.begin)


@dataclasses.dataclass(frozen=True)
class NewTensor:
  """A tensor of a file being written.

  Attributes:
    array: a writable view of the mapped file.
    file: the file, open for writing.
    offset: byte of the file at which the tensor starts.
  """

  array: Array
  file: BinaryIO
  offset: int

  def write_rows(self, first: int, rows: Array) -> None:
    """Writes rows of the first axis from row `first` on, in a third of the time that mapped pages take."""
    data = memoryview(np.ascontiguousarray(rows).view(np.uint8).reshape(-1))
    position = self.offset + first * (self.array.nbytes // self.array.shape[0])
    while data:
      written = os.pwrite(self.file.fileno(), data, position)
      data, position = data[written:], position + written


@contextlib.contextmanager
def create(path: Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype[Any]]]) -> Iterator[dict[str, NewTensor]]:
  """Creates a file whose tensors are written later, in any order.

  The space is reserved at once, since writing to a mapped file on a full disk kills the process.

  Args:
    path: of the new file.
    tensors: (name, shape, dtype), in the order of the file.

  Yields:
    The tensors by name, valid within the context. On exit the file is synced.

  Raises:
    CheckpointError: the disk has too little space.
  """
  names = {dtype: name for name, dtype in DTYPES.items()}
  specs, position = {}, 0
  for name, shape, dtype in tensors:
    end = position + math.prod(shape) * dtype.itemsize
    specs[name] = TensorSpec(names[dtype], shape, position, end)
    position = end
  header = _header(specs)
  with path.open("w+b") as file:
    file.write(header)
    file.flush()
    try:
      os.posix_fallocate(file.fileno(), 0, len(header) + position)
    except OSError as error:
      raise CheckpointError(
        f"{path}: {len(header) + position} bytes cannot be written ({error.strerror}); make room, then run it again"
      ) from error
    data = np.memmap(path, np.uint8, mode="r+")
    yield {
      name: NewTensor(_view(data, spec, len(header)), file, len(header) + spec.begin) for name, spec in specs.items()
    }
    os.fsync(file.fileno())


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
  """The length and the JSON, padded so that the data is aligned to 8 bytes."""
  entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
  for name, spec in specs.items():
    entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [spec.begin, spec.end]}
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text
