"""A Hugging Face folder as a set of named tensors, read lazily from its safetensors files."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.checkpoint.hf_config import UnsupportedCheckpoint
from maxtext_ling2.checkpoint.mapping import Entry


class HfFolder:
  """The tensors of a folder's `*.safetensors` files; a context manager.

  Args:
    folder: the Hugging Face folder.

  Raises:
    UnsupportedCheckpoint: no safetensors file, a file that does not parse, or a tensor that stands in two files.
  """

  def __init__(self, folder: Path):
    self.folder = Path(folder)
    self._stack = contextlib.ExitStack()
    self._files: dict[str, Any] = {}

  def __enter__(self) -> "HfFolder":
    from safetensors import safe_open

    paths = sorted(self.folder.glob("*.safetensors"))
    if not paths:
      raise UnsupportedCheckpoint(f"{self.folder}: no *.safetensors file; pass a Hugging Face folder with its weights")
    for path in paths:
      try:
        file = self._stack.enter_context(safe_open(path, framework="numpy"))
      except Exception as error:
        raise UnsupportedCheckpoint(f"{path}: not a readable safetensors file ({error}); fetch it again") from error
      names: list[str] = file.keys()  # the file itself is not iterable
      for name in names:
        if name in self._files:
          raise UnsupportedCheckpoint(f"{path}: holds {name}, which another file of the folder holds too")
        self._files[name] = file
    return self

  def __exit__(self, *exc: Any) -> None:
    self._stack.close()

  def check(self, entries: Iterable[Entry]) -> None:
    """Compares the folder's tensors with what a model needs, by name and shape, before anything is read.

    Raises:
      UnsupportedCheckpoint: names missing, superfluous and misshapen tensors.
    """
    wanted = {name: entry.hf_shape for entry in entries for name in entry.names}
    missing = sorted(set(wanted) - set(self._files))
    extra = sorted(set(self._files) - set(wanted))
    shapes = {name: tuple(self._files[name].get_slice(name).get_shape()) for name in wanted if name in self._files}
    wrong = [f"{name} is {shape}, expected {wanted[name]}" for name, shape in shapes.items() if shape != wanted[name]]
    problems = [
      f"{len(names)} {kind} tensor{'s' * (len(names) > 1)}: {'; '.join(names[:8])}{' ...' * (len(names) > 8)}"
      for kind, names in (("missing", missing), ("unexpected", extra), ("misshapen", wrong))
      if names
    ]
    if problems:
      raise UnsupportedCheckpoint(f"{self.folder}: the weights do not fit config.json: " + "\n".join(problems))

  def tensor(self, entry: Entry) -> NDArray[Any]:
    """Reads one MaxText tensor."""
    return entry.to_maxtext([np.asarray(self._files[name].get_tensor(name)) for name in entry.names])
