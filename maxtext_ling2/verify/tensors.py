"""Compares a MaxText checkpoint with a Hugging Face folder: every tensor bit by bit, block by block."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import NDArray

from maxtext_ling2.checkpoint import blocks, stacking, stored_weights
from maxtext_ling2.checkpoint.hf_checkpoint import HfCheckpoint

Array = NDArray[Any]


@dataclasses.dataclass
class TensorReport:
  """Difference of one Hugging Face tensor from its counterpart in a checkpoint.

  Attributes:
    name: of the Hugging Face tensor.
    hf_dtype: its dtype.
    dtype: dtype in the checkpoint; the Hugging Face tensor is rounded to it before the comparison.
    elements: number of elements.
    different: number of elements with different bits.
    max_abs_error: largest absolute difference; NaN if one of the two is NaN and the other is not.
  """

  name: str
  hf_dtype: str
  dtype: str
  elements: int = 0
  different: int = 0
  max_abs_error: float = 0.0

  @property
  def passed(self) -> bool:
    """Whether all bits are equal."""
    return self.different == 0

  def add(self, ours: Array, theirs: Array) -> None:
    """Adds a part of the tensor to the report."""
    unequal = blocks.bits(ours) != blocks.bits(theirs.astype(ours.dtype))
    self.elements += ours.size
    if np.any(unequal):
      self.different += int(np.count_nonzero(unequal))
      error = np.abs(ours[unequal].astype(np.float64) - theirs[unequal].astype(np.float64))
      self.max_abs_error = float(np.maximum(self.max_abs_error, np.max(error)))


def compare(checkpoint: Path, folder: Path, config: Any) -> list[TensorReport]:
  """Compares all tensors of a model.

  Args:
    checkpoint: the MaxText checkpoint: the folder of a step, or its `items`.
    folder: the Hugging Face folder.
    config: MaxText config in the layout of the checkpoint (`scan_layers`).

  Returns:
    A report per Hugging Face tensor, in no particular order.

  Raises:
    CheckpointError: one of the two does not hold the tensors of this model.
  """
  leaves, stores = stored_weights.open_weights(epath.Path(checkpoint), config)
  with HfCheckpoint(folder) as tensors:
    tensors.check(config)
    return [report for leaf in leaves for report in _compare(leaf, stores[leaf.path], tensors)]


def _compare(leaf: stacking.Leaf, store: Any, tensors: HfCheckpoint) -> Iterator[TensorReport]:
  reports: dict[str, TensorReport] = {}
  for block, values in stored_weights.read_blocks(store):
    for entry, name, index, inner in blocks.hf_slices(leaf, block):
      theirs = tensors[name]
      report = reports.setdefault(name, TensorReport(name, theirs.dtype.name, values.dtype.name))
      report.add(values[index], entry.from_hf(theirs)[inner])
  yield from reports.values()
