"""The weights of a model in a MaxText checkpoint: where checkpoints keep them, and how they are read block by block."""

import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from numpy.typing import NDArray

from maxtext_ling2.checkpoint import blocks, mapping, orbax_store, stacking
from maxtext_ling2.checkpoint.stacking import Leaf
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.model.layer_layout import FORMER_NAMES

logger = logging.getLogger("maxtext_ling2")
Array = NDArray[Any]

ROOT = ("params", "params")
"""Where converted checkpoints and training states keep the model, router biases included
(`host/seams/weight_variables.py`)."""

_ROOTS = (ROOT, ("params", "MoEBiasVar"), ("nnx_aux", "model"), ("params",), ("model",), ("base",), ())
"""All such places: a training state saved without that seam keeps router biases with the variables that are not
parameters; a model saved on its own has another root."""

_READ_AHEAD = 4 * blocks.BLOCK_BYTES


def open_weights(checkpoint: epath.Path, config: Any) -> tuple[list[Leaf], dict[mapping.Path, Any]]:
  """Opens a checkpoint and finds each tensor of a model in it.

  Args:
    checkpoint: folder of a step, or its `items`.
    config: MaxText config of the model, in the layout of the checkpoint (`scan_layers`).

  Returns:
    The model's tensors, and {path: opened array}.

  Raises:
    CheckpointError: tensors are missing, unexpected or of another shape; they are named. Only MTP layers may be skipped,
      which is logged.
  """
  leaves, opened = stacking.leaves(config), orbax_store.open_arrays(checkpoint)
  arrays = {tuple(FORMER_NAMES.get(word, word) for word in path): array for path, array in opened.items()}
  stores, problems = {}, []
  for leaf in leaves:
    store = _find(leaf, arrays)
    if store is None:
      problems.append(f"{'/'.join(leaf.path)} is missing")
    elif tuple(store.shape) != leaf.shape:
      problems.append(f"{'/'.join(leaf.path)} is {tuple(store.shape)}, expected {leaf.shape}")
    stores[leaf.path] = store
  left_over = sorted({path for path in map(in_model, arrays) if "rngs" not in path} - set(stores))
  mtp = [path for path in left_over if path[0] == "mtp_block"]
  if mtp and len(mtp) < len(left_over) or not config.mtp_num_layers < _mtp_layers(mtp):
    mtp = []
  problems += [f"{'/'.join(path)} is in the checkpoint, but not in the model" for path in left_over if path not in mtp]
  if problems:
    raise CheckpointError(
      f"{checkpoint}: not a checkpoint of this model, because {len(problems)} tensors do not fit: "
      f"{'; '.join(problems[:8])}{' ...' * (len(problems) > 8)}; pass the settings it was saved with"
    )
  if mtp:
    logger.warning(
      "%s: %d tensors of MTP (%s ...) are left out, as mtp_num_layers=%d says.",
      *(checkpoint, len(mtp), "/".join(mtp[0]), config.mtp_num_layers),
    )
  return leaves, stores


def _mtp_layers(paths: list[mapping.Path]) -> int:
  """Number of MTP layers of a checkpoint, from paths such as mtp_block/mtp_layer_1/..."""
  numbers = [int(path[1].rpartition("_")[2]) for path in paths if path[1].startswith("mtp_layer_")]
  return max(numbers, default=0)


def in_model(path: tuple[str, ...]) -> mapping.Path:
  """Path of an array in the model: without the checkpoint's root, and without "value" at its end."""
  root = next(root for root in _ROOTS if path[: len(root)] == root)
  rest = path[len(root) :]
  return rest[:-1] if rest[-1:] == ("value",) else rest


def _find(leaf: Leaf, arrays: Mapping[tuple[str, ...], Any]) -> Any:
  for start in _ROOTS:
    for end in ((), ("value",)):
      if (*start, *leaf.path, *end) in arrays:
        return arrays[*start, *leaf.path, *end]
  return None


def read_blocks(store: Any) -> Iterator[tuple[blocks.Slices, Array]]:
  """Reads an opened array chunk by chunk as it is stored, prefetching the next ones while one is used."""
  chunk = tuple(min(size, step) for size, step in zip(store.shape, store.chunk_layout.read_chunk.shape, strict=True))
  itemsize = store.dtype.numpy_dtype.itemsize
  ahead = max(1, _READ_AHEAD // (math.prod(chunk) * itemsize))
  reading: deque[tuple[blocks.Slices, Any]] = deque()
  for block in blocks.block_slices(tuple(store.shape), chunk):
    reading.append((block, store[block].read()))
    if len(reading) > ahead:
      block, values = reading.popleft()
      yield block, values.result()
  while reading:
    block, values = reading.popleft()
    yield block, values.result()
