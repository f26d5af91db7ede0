"""Recorded outputs of a reference: an npz file of token ids, logits and gradients, read and checked."""

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.checkpoint import mapping

Array = NDArray[Any]

IGNORED_LABEL = -100
"""Positions with this label are not part of the loss."""

_RECORD_AGAIN = "record the reference again"
_NO_GRADIENTS = ("labels", "input_ids")


@dataclasses.dataclass(frozen=True)
class Recording:
  """The arrays of an npz file. All methods raise ValueError if an array is missing or does not fit; the text says how."""

  path: Path
  arrays: Mapping[str, Array]

  @classmethod
  def read(cls, path: Path) -> Self:
    """Reads a file, without pickles."""
    try:
      with zipfile.ZipFile(path):  # np.load would take other files for pickles
        pass
      with np.load(path, allow_pickle=False) as file:
        return cls(path, {name: file[name] for name in file.files})
    except FileNotFoundError:
      raise ValueError(f"{path}: no such file; name the npz that holds the reference") from None
    except Exception as error:
      raise ValueError(f"{path}: not a readable npz file of plain arrays ({error}); {_RECORD_AGAIN}") from error

  def __contains__(self, key: str) -> bool:
    return key in self.arrays

  def tokens(self, key: str, vocab_size: int) -> Array:
    """Token ids [B, T] int32."""
    return self._in_vocabulary(self._integers(key), key, vocab_size)

  def logits(self, key: str, shape: tuple[int, int, int]) -> Array:
    """Logits of shape [B, T, V]."""
    logits = self._array(key)
    if logits.shape != shape or not np.issubdtype(logits.dtype, np.floating):
      raise ValueError(
        f"{self.path}: {key} is {logits.dtype} {logits.shape}, expected float {shape} as the token ids and the "
        f"vocabulary have; {_RECORD_AGAIN}"
      )
    return logits

  def labels(self, shape: tuple[int, int], vocab_size: int) -> Array:
    """Labels [B, T] int32, token ids or `IGNORED_LABEL`."""
    labels = self._integers("labels")
    if labels.shape != shape:
      raise ValueError(f"{self.path}: labels are {labels.shape}, expected {shape} as the token ids; {_RECORD_AGAIN}")
    valid = labels != IGNORED_LABEL
    checked = self._in_vocabulary(np.where(valid, labels, 0), "labels", vocab_size)
    return np.where(valid, checked, np.int32(IGNORED_LABEL))

  def gradients(self, config: Any) -> dict[str, Array]:
    """Gradients by Hugging Face tensor name, of a model with this MaxText config."""
    shapes = {name: entry.hf_shape for entry in mapping.entries(config) for name in entry.names}
    found = {name: array for name, array in self.arrays.items() if name not in _NO_GRADIENTS}
    if not found:
      raise ValueError(f"{self.path}: holds no gradients; arrays under Hugging Face tensor names are expected")
    for name, array in found.items():
      if name not in shapes:
        raise ValueError(f"{self.path}: the model has no parameter {name}; take the gradients of this model")
      if array.shape != shapes[name] or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
          f"{self.path}: {name} is {array.dtype} {array.shape}, expected float {shapes[name]}; {_RECORD_AGAIN}"
        )
    return found

  def _array(self, key: str) -> Array:
    if key not in self.arrays:
      available = ", ".join(sorted(self.arrays)[:12])
      raise ValueError(f"{self.path}: has no array '{key}'; name one that it has: {available} ...")
    return self.arrays[key]

  def _integers(self, key: str) -> Array:
    ids = self._array(key)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(
        f"{self.path}: {key} is {ids.dtype} {ids.shape}, expected integer token ids [sequences, tokens]; {_RECORD_AGAIN}"
      )
    if not ids.size:
      raise ValueError(f"{self.path}: {key} is {ids.shape} and holds no tokens; {_RECORD_AGAIN}")
    return ids

  def _in_vocabulary(self, ids: Array, key: str, vocab_size: int) -> Array:
    if ids.min() < 0 or ids.max() >= vocab_size:
      raise ValueError(
        f"{self.path}: {key} holds ids from {ids.min()} to {ids.max()}, but the model's vocabulary has {vocab_size}; "
        "take the reference of this model"
      )
    return ids.astype(np.int32)  # after the check, so that no 64-bit id wraps to a valid one
