"""What MaxText's to_maxtext does for LING2: a Hugging Face folder, with an adapter added to it, or an adapter alone."""

import os
from pathlib import Path
from typing import Any

from etils import epath

from maxtext_ling2.checkpoint import lora, progress
from maxtext_ling2.checkpoint.import_hf import COMPRESS, Import
from maxtext_ling2.checkpoint.orbax_store import Storage


def check(folder: str, config: Any, target: str, save_dtype: str, adapter: str) -> Import | lora.Adapters:
  """The conversion that is asked for, checked.

  Args:
    folder: the Hugging Face folder; empty: the adapter alone.
    config: MaxText config of the model, in the layout to write.
    target: folder of the step to write.
    save_dtype: of the weights; an adapter alone is float32.
    adapter: folder of a peft adapter, or empty.

  Raises:
    CheckpointError: see `Import` and `lora.from_peft`.
  """
  adapters = lora.from_peft(Path(adapter), config) if adapter else None
  if not folder:
    assert adapters is not None
    lora.check(adapters, config, epath.Path(target))
    return adapters
  return Import(Path(folder), config, epath.Path(target), save_dtype, adapters.merged if adapters else None)


def run(folder: str, config: Any, target: str, save_dtype: str, adapter: str, ocdbt: bool, zarr3: bool) -> None:
  """Converts what `check` checked, stored as `Storage` says."""
  storage = Storage(ocdbt, zarr3, compress=os.environ.get(COMPRESS, "0") == "1")
  conversion = check(folder, config, target, save_dtype, adapter)
  if isinstance(conversion, lora.Adapters):
    lora.write(conversion, config, epath.Path(target), storage)
  else:
    conversion.run(storage, progress.console())
