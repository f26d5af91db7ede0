"""Orbax's type handlers for arrays, streaming: they write an array block by block and open one without reading it.

Orbax passes each leaf of a tree to a type handler, with the TensorStore spec of the array to write or read. The format on
disk stays Orbax's own.
"""

import asyncio
import dataclasses
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tensorstore
from numpy.typing import NDArray
from orbax.checkpoint import type_handlers

from maxtext_ling2.checkpoint.blocks import BLOCK_BYTES, Slices, block_slices

Array = NDArray[Any]

_IN_FLIGHT = 4 * BLOCK_BYTES  # bytes handed to TensorStore and not yet written

# No sync per file (`disk.sync_tree` syncs all), and a small cache for old versions of OCDBT's tree, where Orbax has
# 100 MB: until that is full, memory would grow with the number of layers.
_CONTEXT = {"file_io_sync": False, "cache_pool#ocdbt": {"total_bytes_limit": 2**23}}


@dataclasses.dataclass(frozen=True)
class StreamedLeaf:
  """An array that is never held whole.

  Attributes:
    shape: of the array.
    dtype: of the array.
    block: shape of its blocks, which are also its chunks on disk.
    read: returns a block by its slices.
  """

  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  block: tuple[int, ...]
  read: Callable[[Slices], Array]

  @property
  def size(self) -> int:
    """Number of elements; Orbax uses it."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the array."""
    return self.size * self.dtype.itemsize

  async def write(self, store: Any, window: "_Window") -> None:
    """Writes all blocks to an opened TensorStore; the next ones are read while the previous ones are written."""
    writing: list[Any] = []
    try:
      for block in block_slices(self.shape, self.block):
        nbytes = math.prod(part.stop - part.start for part in block) * self.dtype.itemsize
        await window.acquire(nbytes)
        # The values get no name, which would keep them alive while this leaf waits for room.
        written = store[block].write(await window.run(self.read, block), can_reference_source_data_indefinitely=True)
        writing.append(asyncio.ensure_future(window.release(nbytes, written)))
        del written
    finally:
      await asyncio.gather(*writing)


class _Window:
  """Limits the bytes in flight, of all leaves together, and has the thread that reads blocks.

  Attributes:
    failure: the first error of any leaf; after it no leaf starts another block.
  """

  def __init__(self, size: int):
    self._size = self._free = size
    self._changed = asyncio.Condition()
    self._worker = ThreadPoolExecutor(1, "blocks")  # one, because reading a block counts tensors
    self.failure: BaseException | None = None

  async def acquire(self, nbytes: int) -> None:
    """Waits until there is room; a block larger than the window gets all of it."""
    async with self._changed:
      await self._changed.wait_for(lambda: self.failure or self._free >= min(nbytes, self._size))
      if self.failure:
        raise self.failure
      self._free -= nbytes

  async def run(self, read: Callable[[Slices], Array], block: Slices) -> Array:
    """Reads a block in the thread."""
    return await asyncio.get_running_loop().run_in_executor(self._worker, read, block)

  async def release(self, nbytes: int, written: Any) -> None:
    """Waits until a block is written, and gives its bytes back."""
    try:
      await written
    except Exception as error:
      self.failure = self.failure or error
    async with self._changed:
      self._free += nbytes
      self._changed.notify_all()

  async def fail(self, error: BaseException) -> None:
    """Records the first error, and wakes the leaves that wait for room."""
    async with self._changed:
      self.failure = self.failure or error
      self._changed.notify_all()


class _Reader(type_handlers.NumpyHandler):
  """Orbax's handler of arrays that opens them without reading, and writes none."""

  async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
    raise TypeError(f"{type(value).__name__}: only StreamedLeaf is written here")

  async def deserialize(self, infos: Any, args: Any = None) -> list[Any]:
    """Opens arrays without reading them."""
    return [await self._open(info) for info in infos]

  async def _open(self, info: Any) -> Any:
    spec = type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
    return await tensorstore.open(tensorstore.Spec(spec), open=True, read=True, context=info.ts_context)


class StreamingHandler(_Reader):
  """Orbax's handler of `StreamedLeaf`: `_open_and_write` writes blocks where the parent writes an array."""

  def __init__(self) -> None:
    super().__init__(deepcopy_host_arrays=False)
    self._window = _Window(_IN_FLIGHT)
    self._unsynced: Any = None
    self._running = 0  # leaves
    self._idle = threading.Condition()

  async def _open_and_write(self, value: StreamedLeaf, tspec: dict[str, Any], ts_context: Any) -> None:
    """Writes a leaf, or records the error for `raise_failure`.

    Raised here, it would end Orbax's event loop while other leaves are still being written to a folder that is removed.
    """
    self._running += 1
    try:
      await self._write(value, tspec, ts_context)
    except BaseException as error:
      await self._window.fail(error)
    finally:
      with self._idle:
        self._running -= 1
        self._idle.notify_all()

  async def _write(self, value: StreamedLeaf, tspec: dict[str, Any], ts_context: Any) -> None:
    if self._window.failure:
      return
    _set_chunk_shape(tspec["metadata"], value.block)
    if self._unsynced is None:  # one for all leaves: TensorStore shares a database only within a context
      self._unsynced = tensorstore.Context(_CONTEXT, parent=ts_context)
    store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=self._unsynced)
    await value.write(store, self._window)

  def raise_failure(self) -> None:
    """Raises the first error of any leaf, if there is one."""
    if self._window.failure:
      raise self._window.failure

  def stop(self, error: BaseException) -> None:
    """Stops writing because of `error`, and waits until no leaf is being written."""
    self._window.failure = self._window.failure or error
    with self._idle:
      self._idle.wait_for(lambda: not self._running, timeout=60)  # if the event loop has ended, none ever finishes


class _JaxArrays(_Reader):
  """The same for arrays saved from JAX: every leaf of a trainer's checkpoint."""

  _array_metadata_store = None  # Orbax warns if this attribute is missing

  def typestr(self) -> str:
    """Type name in Orbax's metadata."""
    return "jax.Array"


def _set_chunk_shape(metadata: dict[str, Any], block: tuple[int, ...]) -> None:
  """Sets the chunk shape in an array's zarr metadata, version 2 or 3."""
  if "chunks" in metadata:
    metadata["chunks"] = block
    return
  metadata["chunk_grid"]["configuration"]["chunk_shape"] = block
  for codec in metadata["codecs"]:
    if codec["name"] == "sharding_indexed":
      codec["configuration"]["chunk_shape"] = block


def registry(leaves: StreamingHandler) -> Any:
  """Handlers of all types that Orbax saves, so that any trainer's checkpoint can be read; `leaves` streams arrays."""
  scalar = type_handlers.ScalarHandler()
  return type_handlers.create_type_handler_registry(
    (StreamedLeaf, leaves),
    (np.ndarray, _Reader()),
    (jax.Array, _JaxArrays()),
    *((kind, scalar) for kind in (int, float, bytes, np.number)),
    (str, type_handlers.StringHandler()),
  )
