"""A Hugging Face folder as a set of named tensors: views of its memory-mapped safetensors files.

Only `*.safetensors` and JSON files are opened, none outside the folder: no pickles, no code.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.checkpoint import safetensors_file
from maxtext_ling2.checkpoint.json_object import unique
from maxtext_ling2.checkpoint.mapping import Entry
from maxtext_ling2.errors import CheckpointError

INDEX = "model.safetensors.index.json"


class HfFolder:
  """The tensors of a folder's `*.safetensors` files; a context manager.

  All files count, those that no index names too: released checkpoints keep MTP in one of its own.

  Args:
    folder: the Hugging Face folder.

  Raises:
    CheckpointError: no safetensors file, a file that does not parse, a tensor that stands in two files, or an index that
      names a file or a tensor which is not there.
  """

  def __init__(self, folder: Path):
    self.folder = Path(folder)
    self._tensors: dict[str, NDArray[Any]] = {}
    self._files: dict[str, str] = {}

  def __enter__(self) -> "HfFolder":
    indexed = _read_index(self.folder)
    paths = sorted(self.folder.glob("*.safetensors"))
    if not paths:
      raise CheckpointError(f"{self.folder}: no *.safetensors file; pass a Hugging Face folder with its weights")
    for path in paths:
      for name, tensor in safetensors_file.read(_inside(self.folder, path)).items():
        if name in self._files:
          raise CheckpointError(
            f"{path}: holds {name}, which {self._files[name]} holds too; keep one of the two files in the folder"
          )
        self._tensors[name], self._files[name] = tensor, path.name
    for name, file in indexed.items():
      if self._files.get(name) != file:
        raise CheckpointError(
          f"{self.folder / INDEX}: says {name} stands in {file}, but it "
          f"{f'stands in {self._files[name]}' if name in self._files else 'is not there'}; fetch the folder again"
        )
    return self

  def __exit__(self, *exc: Any) -> None:
    self._tensors.clear()

  def check(self, entries: Iterable[Entry], ignored: tuple[str, ...] = ()) -> None:
    """Compares the folder's tensors with what a model needs, by name and shape, before any data is read.

    Args:
      entries: of the model.
      ignored: prefixes of names that may be there and are not needed.

    Raises:
      CheckpointError: names missing, superfluous and misshapen tensors.
    """
    wanted = {name: entry.hf_shape for entry in entries for name in entry.names}
    missing = sorted(set(wanted) - set(self._tensors))
    extra = sorted(name for name in set(self._tensors) - set(wanted) if not name.startswith(ignored or "\0"))
    shapes = {name: self._tensors[name].shape for name in wanted if name in self._tensors}
    wrong = [f"{name} is {shape}, expected {wanted[name]}" for name, shape in shapes.items() if shape != wanted[name]]
    problems = [
      f"{len(names)} {kind} tensor{'s' * (len(names) > 1)}: {'; '.join(names[:8])}{' ...' * (len(names) > 8)}"
      for kind, names in (("missing", missing), ("unexpected", extra), ("misshapen", wrong))
      if names
    ]
    if problems:
      raise CheckpointError(
        f"{self.folder}: the weights are not those of the model, because of {'; '.join(problems)}; take config.json and "
        "weights of one model, and the MaxText settings that `maxtext-ling2 config` prints for it"
      )

  def __getitem__(self, name: str) -> NDArray[Any]:
    """A tensor as a read-only view of its file."""
    return self._tensors[name]

  def __contains__(self, name: str) -> bool:
    return name in self._tensors

  def tensor(self, entry: Entry) -> NDArray[Any]:
    """Reads one MaxText tensor."""
    return entry.to_maxtext([np.asarray(self._tensors[name]) for name in entry.names])


def _read_index(folder: Path) -> dict[str, str]:
  """{tensor: file} of the folder's index; empty without one."""
  path = folder / INDEX
  if not path.exists():
    return {}
  try:
    weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)["weight_map"]
    files = {str(name): str(file) for name, file in weight_map.items()}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsADirectoryError) as error:
    raise CheckpointError(f"{path}: not an index with a weight_map ({error!r}); fetch the file again") from error
  for name, file in files.items():
    if Path(file).name != file or not file.endswith(".safetensors"):
      raise CheckpointError(
        f"{path}: {name} is said to stand in {file!r}, not a *.safetensors file of this folder; fetch the index again"
      )
    if not (folder / file).is_file():
      raise CheckpointError(f"{path}: names {file}, which is not in the folder; fetch the missing file")
  return files


def _inside(folder: Path, path: Path) -> Path:
  """The path, if it is a file of the folder, or of the blobs of the Hugging Face cache that the folder belongs to."""
  real, home = path.resolve(), folder.resolve()
  blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
  if not real.is_file():
    raise CheckpointError(f"{path}: not a file; fetch it again")
  if real.parent not in (home, blobs):
    raise CheckpointError(f"{path}: a link to {real}, out of the folder; put the file itself into {folder}")
  return path
