"""What MaxText's conversion commands call for a LING2 model."""

import os
import sys
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Console

from maxtext_ling2.checkpoint.export_hf import Export
from maxtext_ling2.checkpoint.import_hf import Import
from maxtext_ling2.checkpoint.orbax_store import Storage

COMPRESS = "MAXTEXT_LING2_COMPRESS"
"""Environment variable: 1 compresses converted checkpoints, as MaxText does."""


def plan_import(folder: str, config: Any, target: str, save_dtype: str) -> Import:
  """Checks a conversion to MaxText; `import_hf.Import` says what for."""
  return Import(Path(folder), config, epath.Path(target), save_dtype)


def run_import(folder: str, config: Any, target: str, save_dtype: str, ocdbt: bool, zarr3: bool) -> None:
  """Converts a Hugging Face folder to a MaxText checkpoint; `import_hf.Import` describes the arguments."""
  storage = Storage(ocdbt, zarr3, compress=os.environ.get(COMPRESS, "0") == "1")
  plan_import(folder, config, target, save_dtype).run(storage, _console())


class Exporter:
  """An export to Hugging Face, opened and checked.

  Args:
    path: the MaxText checkpoint.
    config: MaxText config of the model.
  """

  def __init__(self, path: str, config: Any):
    self._export = Export(epath.Path(path), config)
    self._dtype = str(getattr(config.weight_dtype, "value", config.weight_dtype))

  def keys(self) -> list[str]:
    """MaxText's keys of the tensors."""
    return [leaf.table_key for leaf in self._export.leaves]

  def write(self, folder: str, tokenizer: str | None) -> None:
    """Writes the Hugging Face folder, in `weight_dtype`, with a copy of a tokenizer's files."""
    self._export.run(Path(folder), self._dtype, Path(tokenizer) if tokenizer else None, _console())


def _console() -> Console:
  """For the progress bar: standard error; wide where it is a file, so that its one line stays one."""
  return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)
