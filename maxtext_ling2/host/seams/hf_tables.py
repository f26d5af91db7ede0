"""Seam: MaxText's tables for Hugging Face checkpoints, plain dicts keyed by model name, extended in place."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.seam import Seam

_PACKAGE = "maxtext.checkpoint_conversion.utils"
TABLES = {
  "HF_IDS": "maxtext.utils.globals",
  "PARAM_MAPPING": f"{_PACKAGE}.param_mapping",
  "HOOK_FNS": f"{_PACKAGE}.param_mapping",
  "HF_SHAPE": f"{_PACKAGE}.hf_shape",
  "HF_MODEL_CONFIGS": f"{_PACKAGE}.hf_model_configs",
}


class HfTablesSeam(Seam):
  """Adds entries to the conversion tables.

  Only processes that convert have them: in others MaxText would take HF_IDS for the place of a tokenizer.

  Args:
    entries: gives, for a model name -> its yml, table name (a key of `TABLES`) -> model name -> entry.
    ymls: the ymls of LING2's models by name.
  """

  name = "Hugging Face tables"
  module = f"{_PACKAGE}.param_mapping"
  needed_for_training = False
  expectations = tuple(
    Expectation(f"{module}:{table}", holds=lambda value: isinstance(value, dict), meaning="a dict")
    for table, module in TABLES.items()
  )

  def __init__(self, entries: Callable[[Mapping[str, Path]], Mapping[str, Mapping[str, Any]]], ymls: Mapping[str, Path]):
    super().__init__()
    self.entries = entries
    self.ymls = ymls

  def apply(self) -> None:
    for table, additions in self.entries(self.ymls).items():
      mapping = getattr(importlib.import_module(TABLES[table]), table)
      for model_name, entry in additions.items():
        self.patches.entry(mapping, model_name, entry)
