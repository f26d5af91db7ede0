"""Orbax checkpoints a block at a time: what Orbax writes and reads stays Orbax's own format, but no leaf is held whole.

Orbax hands each leaf of a tree to a type handler, with the TensorStore spec of the array to be written or read. The
handler below writes blocks where Orbax's own writes an array, and returns the opened array where Orbax's own reads it.
"""

import asyncio
import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath
from numpy.typing import NDArray
from orbax.checkpoint import args as ocp_args
from orbax.checkpoint import checkpointers, handlers, type_handlers

from maxtext_ling2.checkpoint import disk
from maxtext_ling2.checkpoint.blocks import BLOCK_BYTES, Box, boxes
from maxtext_ling2.errors import CheckpointError

Array = NDArray[Any]

ITEM = "items"
"""The name under which MaxText keeps a training state in the folder of a step."""

_NO_WEIGHTS = ("opt_state", "optimizer", "step", "inner_state", "outer_opt_state")
"""Of a training state: what holds no weights of the model, or, of DiLoCo, those of each replica."""

_IN_FLIGHT = 4 * BLOCK_BYTES  # handed to TensorStore and not yet on disk


# No wait for the disk at each file (`disk.sync_tree` waits for all), and little memory for old versions of OCDBT's tree,
# of which Orbax keeps 100 MB: with as many layers as it takes to fill that, memory would grow with the model.
_CONTEXT = {"file_io_sync": False, "cache_pool#ocdbt": {"total_bytes_limit": 2**23}}


@dataclasses.dataclass(frozen=True)
class StreamedLeaf:
  """A leaf that exists only a block at a time.

  Attributes:
    shape: of the whole.
    dtype: of the whole.
    block: shape of a block; also how the array is cut on disk.
    make: gives the block at a box.
  """

  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  block: tuple[int, ...]
  make: Callable[[Box], Array]

  @property
  def size(self) -> int:
    """Number of elements; Orbax asks for it."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the whole."""
    return self.size * self.dtype.itemsize

  async def write(self, store: Any, window: "_Window") -> None:
    """Writes all blocks to an opened TensorStore, the next ones being made while the last ones are written."""
    writing: list[Any] = []
    try:
      for box in boxes(self.shape, self.block):
        nbytes = math.prod(part.stop - part.start for part in box) * self.dtype.itemsize
        await window.acquire(nbytes)
        # No name for the block: it would live on while this leaf waits for its next turn.
        written = store[box].write(await window.make(self.make, box), can_reference_source_data_indefinitely=True)
        writing.append(asyncio.ensure_future(window.release(nbytes, written)))
        del written
    finally:
      await asyncio.gather(*writing)


class _Window:
  """The bytes that may be in flight at a time, of all leaves together, and the thread in which blocks are made.

  Attributes:
    failure: the first error of any leaf. From then on no leaf gets room for another block.
  """

  def __init__(self, size: int):
    self._size = self._free = size
    self._changed = asyncio.Condition()
    self._worker = ThreadPoolExecutor(1, "blocks")  # one, because making a block counts tensors
    self.failure: BaseException | None = None

  async def acquire(self, nbytes: int) -> None:
    """Waits until there is room; a block larger than the window has it for itself."""
    async with self._changed:
      await self._changed.wait_for(lambda: self.failure or self._free >= min(nbytes, self._size))
      if self.failure:
        raise self.failure
      self._free -= nbytes

  async def make(self, make: Callable[[Box], Array], box: Box) -> Array:
    """Makes a block in the thread for that."""
    return await asyncio.get_running_loop().run_in_executor(self._worker, make, box)

  async def release(self, nbytes: int, written: Any) -> None:
    """Waits until a block is on the disk."""
    try:
      await written
    except Exception as error:
      self.failure = self.failure or error
    async with self._changed:
      self._free += nbytes
      self._changed.notify_all()

  async def fail(self, error: BaseException) -> None:
    """Keeps the first error, and wakes the leaves that wait for room."""
    async with self._changed:
      self.failure = self.failure or error
      self._changed.notify_all()


class _Handler(type_handlers.NumpyHandler):
  """Orbax's handler of arrays, for leaves that are streamed.

  What it overrides are `_open_and_write`, where the parent writes an array to a spec it has built, and `deserialize`.
  """

  def __init__(self) -> None:
    super().__init__(deepcopy_host_arrays=False)
    self._window = _Window(_IN_FLIGHT)
    self._unsynced: Any = None
    self._running = 0  # leaves
    self._idle = threading.Condition()

  async def _open_and_write(self, value: StreamedLeaf, tspec: dict[str, Any], ts_context: Any) -> None:
    """Writes a leaf, or keeps the error for `raise_failure`.

    Raised here, it would end Orbax's event loop while other leaves are being written, and these would go on in a folder
    that is being removed.
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
    _cut(tspec["metadata"], value.block)
    if self._unsynced is None:  # one for all leaves: TensorStore shares a database only within a context
      self._unsynced = tensorstore.Context(_CONTEXT, parent=ts_context)
    store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=self._unsynced)
    await value.write(store, self._window)

  def raise_failure(self) -> None:
    """Raises the first error of any leaf."""
    if self._window.failure:
      raise self._window.failure

  def stop(self, error: BaseException) -> None:
    """Stops the leaves that are being written, and waits until none is; `error` is why."""
    self._window.failure = self._window.failure or error
    with self._idle:
      self._idle.wait_for(lambda: not self._running, timeout=60)  # where the event loop has ended, none ever is done

  async def deserialize(self, infos: Any, args: Any = None) -> list[Any]:
    """The opened arrays, unread."""
    return [await self._open(info) for info in infos]

  async def _open(self, info: Any) -> Any:
    spec = type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
    return await tensorstore.open(tensorstore.Spec(spec), open=True, read=True, context=info.ts_context)


class _JaxArrays(_Handler):
  """The same for arrays that were saved from JAX: every leaf of a trainer's checkpoint."""

  _array_metadata_store = None  # Orbax looks for this attribute, and warns where there is none

  def typestr(self) -> str:
    """Under this name Orbax's metadata lists them."""
    return "jax.Array"


def _is_local(path: epath.Path) -> bool:
  return "://" not in str(path)


def _cut(metadata: dict[str, Any], block: tuple[int, ...]) -> None:
  """Sets the chunks of an array's zarr metadata, version 2 or 3, to blocks."""
  if "chunks" in metadata:
    metadata["chunks"] = block
    return
  metadata["chunk_grid"]["configuration"]["chunk_shape"] = block
  for codec in metadata["codecs"]:
    if codec["name"] == "sharding_indexed":
      codec["configuration"]["chunk_shape"] = block


@dataclasses.dataclass(frozen=True)
class Storage:
  """How a checkpoint is stored; all of them restore in MaxText.

  Attributes:
    ocdbt: few files in TensorStore's database, instead of one for each block.
    zarr3: version 3 of zarr, instead of 2.
    compress: by zstd, as Orbax does by default: bfloat16 weights shrink by a quarter, and take three times as long.
  """

  ocdbt: bool = True
  zarr3: bool = True
  compress: bool = False


def write(target: epath.Path, tree: Mapping[str, Any], metadata: Mapping[str, Any], storage: Storage) -> None:
  """Writes a checkpoint that appears under its name only when it is whole.

  Args:
    target: folder of the step; must not exist.
    tree: nested dict of `StreamedLeaf` and int.
    metadata: custom metadata of the checkpoint, JSON values.
    storage: the format.

  Raises:
    CheckpointError: the target exists, or the disk is full.
  """
  if target.exists():
    raise CheckpointError(f"{target}: already there, because something was saved under it; delete it, or choose another")
  leaves = _Handler()
  handler = _durable_handler(storage, leaves)
  checkpointer = checkpointers.Checkpointer(handlers.CompositeCheckpointHandler(**{ITEM: handler}))
  with (
    _nothing_half_written(target, leaves),
    contextlib.closing(checkpointer),
    disk.written_back(lambda: _data_files(target)),
  ):
    arguments = ocp_args.Composite(**{ITEM: ocp_args.PyTreeSave(tree)})
    checkpointer.save(target, args=arguments, custom_metadata=dict(metadata))


@contextlib.contextmanager
def _nothing_half_written(target: epath.Path, leaves: _Handler) -> Iterator[None]:
  """Removes what an interrupted run left, this one or one before; a full disk becomes a readable error."""
  _remove_leftovers(target)
  try:
    yield
  except BaseException as error:
    leaves.stop(error)
    _remove_leftovers(target)
    if "No space left" in str(error):
      raise CheckpointError(f"{target}: the disk is full; make room, then run it again") from error
    raise


def _unfinished(target: epath.Path) -> Iterator[epath.Path]:
  """Folders under the name that Orbax writes to before it renames them."""
  yield from target.parent.glob(f"{target.name}.orbax-checkpoint-tmp*")


def _data_files(target: epath.Path) -> Iterator[Path]:
  """Data files of a local checkpoint that is being written."""
  if _is_local(target):
    for folder in _unfinished(target):
      yield from Path(folder).rglob("d/*")


def _remove_leftovers(target: epath.Path) -> None:
  for folder in _unfinished(target):
    folder.rmtree(missing_ok=True)


def _durable_handler(storage: Storage, leaves: _Handler) -> Any:
  """Orbax's handler of trees, which waits for the disk once, before the folder gets its name, not at each file."""
  handler: Any = handlers.PyTreeCheckpointHandler(
    use_ocdbt=storage.ocdbt,
    use_zarr3=storage.zarr3,
    use_compression=storage.compress,
    type_handler_registry=_handlers(leaves),
  )
  finalize = handler.finalize

  def finalize_on_disk(directory: epath.Path) -> None:
    leaves.raise_failure()
    finalize(directory)
    if _is_local(directory):
      disk.sync_tree(Path(directory))

  handler.finalize = finalize_on_disk  # no subclass: Orbax finds a handler's arguments by its very class
  return handler


def _handlers(leaves: _Handler) -> Any:
  """Handlers of all types that Orbax itself saves, so that any trainer's checkpoint can be read; arrays are streamed."""
  scalar = type_handlers.ScalarHandler()
  return type_handlers.create_type_handler_registry(
    (StreamedLeaf, leaves),
    (np.ndarray, _Handler()),
    (jax.Array, _JaxArrays()),
    *((kind, scalar) for kind in (int, float, bytes, np.number)),
    (str, type_handlers.StringHandler()),
  )


def open_arrays(folder: epath.Path) -> dict[tuple[str, ...], Any]:
  """Opens the arrays of a MaxText checkpoint, without its optimizer state, by path in the saved tree.

  Args:
    folder: of a step, or its `items`.

  Returns:
    {path: array}, unread; `array[box].read().result()` reads a box.

  Raises:
    CheckpointError: there is no readable checkpoint.
  """
  folder = folder / ITEM if (folder / ITEM).is_dir() else folder
  folder = epath.Path(os.path.abspath(folder)) if _is_local(folder) else folder  # Orbax takes no relative paths
  if not folder.is_dir():
    raise CheckpointError(f"{folder}: no such folder; pass the folder of a checkpoint's step, such as DIR/0/items")
  handler = handlers.PyTreeCheckpointHandler(type_handler_registry=_handlers(_Handler()))
  try:
    # The handler's own method: that of a Checkpointer hides the reason where it fails, and returns None.
    tree = handler.metadata(folder).tree
    tree = {key: value for key, value in tree.items() if key not in _NO_WEIGHTS}
    request = jax.tree.map(lambda _: type_handlers.RestoreArgs(restore_type=np.ndarray), tree)
    arguments = ocp_args.PyTreeRestore(item=tree, restore_args=request, partial_restore=True)
    opened = checkpointers.Checkpointer(handler).restore(folder, args=arguments)
  except Exception as error:
    raise CheckpointError(
      f"{folder}: Orbax cannot read it as a checkpoint ({type(error).__name__}: {error}); pass the folder of a step that "
      "was saved whole"
    ) from error
  flat, _ = jax.tree_util.tree_flatten_with_path(opened)
  return {tuple(_word(key) for key in path): array for path, array in flat}


def _word(key: Any) -> str:
  """One step of a path in a tree of dicts and lists."""
  return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
