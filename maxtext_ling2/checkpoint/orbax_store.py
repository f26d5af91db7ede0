"""Orbax checkpoints written and read block by block, in Orbax's own format; `orbax_handlers` has the mechanism."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import args as ocp_args
from orbax.checkpoint import checkpointers, handlers, type_handlers

from maxtext_ling2.checkpoint import disk
from maxtext_ling2.checkpoint.orbax_handlers import StreamingHandler, registry
from maxtext_ling2.errors import CheckpointError

ITEM = "items"
"""Name of the training state in the folder of a step."""

_NO_WEIGHTS = ("opt_state", "optimizer", "step", "inner_state", "outer_opt_state")
"""Parts of a training state without weights of the model, or, with DiLoCo, with those of each replica."""


@dataclasses.dataclass(frozen=True)
class Storage:
  """Storage format of a checkpoint; MaxText restores every combination.

  Attributes:
    ocdbt: few files in TensorStore's database, instead of one per block.
    zarr3: version 3 of zarr, instead of 2.
    compress: by zstd, Orbax's default: bfloat16 weights shrink by a quarter, and conversion takes three times as long.
  """

  ocdbt: bool = True
  zarr3: bool = True
  compress: bool = False


def write(target: epath.Path, tree: Mapping[str, Any], metadata: Mapping[str, Any], storage: Storage) -> None:
  """Writes a checkpoint, which appears under its name when it is complete.

  Args:
    target: folder of the step; must not exist.
    tree: nested dict of `StreamedLeaf` and int.
    metadata: custom metadata of the checkpoint, JSON values.
    storage: the format.

  Raises:
    CheckpointError: the target exists, or the disk is full.
  """
  if target.exists():
    raise CheckpointError(f"{target}: already exists; delete it, or choose another")
  leaves = StreamingHandler()
  handler = _durable_handler(storage, leaves)
  checkpointer = checkpointers.Checkpointer(handlers.CompositeCheckpointHandler(**{ITEM: handler}))
  with (
    _cleanup_on_failure(target, leaves),
    contextlib.closing(checkpointer),
    disk.background_fsync(lambda: _data_files(target)),
  ):
    arguments = ocp_args.Composite(**{ITEM: ocp_args.PyTreeSave(tree)})
    checkpointer.save(target, args=arguments, custom_metadata=dict(metadata))


@contextlib.contextmanager
def _cleanup_on_failure(target: epath.Path, leaves: StreamingHandler) -> Iterator[None]:
  """Removes partial checkpoints of this run or an earlier one; turns a full disk into a readable error."""
  try:
    _remove_leftovers(target)
  except OSError as error:
    raise CheckpointError(f"{target}: what an earlier run left cannot be removed ({error}); remove it by hand") from error
  try:
    yield
  except BaseException as error:
    leaves.stop(error)
    with contextlib.suppress(OSError):  # the first error is the one to tell
      _remove_leftovers(target)
    if "No space left" in str(error):
      raise CheckpointError(f"{target}: the disk is full; make room, then run it again") from error
    raise


def _unfinished(target: epath.Path) -> Iterator[epath.Path]:
  """Folders that Orbax writes to before it renames them."""
  yield from target.parent.glob(f"{target.name}.orbax-checkpoint-tmp*")


def _data_files(target: epath.Path) -> Iterator[Path]:
  """Data files of a local checkpoint being written."""
  if _is_local(target):
    for folder in _unfinished(target):
      yield from Path(folder).rglob("d/*")


def _remove_leftovers(target: epath.Path) -> None:
  for folder in _unfinished(target):
    folder.rmtree(missing_ok=True)


def _durable_handler(storage: Storage, leaves: StreamingHandler) -> Any:
  """Orbax's handler of trees, which syncs once, before the folder gets its name, instead of per file."""
  handler: Any = handlers.PyTreeCheckpointHandler(
    use_ocdbt=storage.ocdbt,
    use_zarr3=storage.zarr3,
    use_compression=storage.compress,
    type_handler_registry=registry(leaves),
  )
  finalize = handler.finalize

  def finalize_on_disk(directory: epath.Path) -> None:
    leaves.raise_failure()
    finalize(directory)
    if _is_local(directory):
      disk.sync_tree(Path(directory))

  handler.finalize = finalize_on_disk  # not a subclass: Orbax looks up a handler's arguments by its exact class
  return handler


def open_arrays(folder: epath.Path) -> dict[tuple[str, ...], Any]:
  """Opens the arrays of a MaxText checkpoint, without its optimizer state, by path in the saved tree.

  Args:
    folder: of a step, or its `items`.

  Returns:
    {path: array}, unread; `array[box].read().result()` reads a box.

  Raises:
    CheckpointError: the folder has no readable checkpoint.
  """
  folder = folder / ITEM if (folder / ITEM).is_dir() else folder
  folder = epath.Path(os.path.abspath(folder)) if _is_local(folder) else folder  # Orbax takes no relative paths
  if not folder.is_dir():
    raise CheckpointError(f"{folder}: no such folder; pass the folder of a checkpoint's step, such as DIR/0/items")
  handler = handlers.PyTreeCheckpointHandler(type_handler_registry=registry(StreamingHandler()))
  try:
    # Not a Checkpointer's metadata(), which returns None on failure and hides the reason.
    tree = handler.metadata(folder).tree
    tree = {key: value for key, value in tree.items() if key not in _NO_WEIGHTS}
    request = jax.tree.map(lambda _: type_handlers.RestoreArgs(restore_type=np.ndarray), tree)
    arguments = ocp_args.PyTreeRestore(item=tree, restore_args=request, partial_restore=True)
    opened = checkpointers.Checkpointer(handler).restore(folder, args=arguments)
  except Exception as error:
    raise CheckpointError(
      f"{folder}: Orbax cannot read it as a checkpoint ({type(error).__name__}: {error}); pass the folder of a step that "
      "was saved completely"
    ) from error
  flat, _ = jax.tree_util.tree_flatten_with_path(opened)
  return {tuple(_text(key) for key in path): array for path, array in flat}


def _text(key: Any) -> str:
  """The text of one key of a path in a tree of dicts and lists."""
  return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def _is_local(path: epath.Path) -> bool:
  return "://" not in str(path)
