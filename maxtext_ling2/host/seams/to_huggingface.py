"""Seam: the command `maxtext.checkpoint_conversion.to_huggingface`, for LING2.

MaxText's command loads the checkpoint, maps each tensor through its tables, and saves a dict of all of them. For LING2
these steps only carry placeholders; the last one writes the folder from the opened checkpoint.
The functions are bound by the command when it starts, so they are replaced in the module they come from.
"""

import dataclasses
import gc
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

from maxtext_ling2.configs.validation import is_ling2
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.host.contract import CommandExpectation, expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Seam

_UTILS = "maxtext.checkpoint_conversion.utils.utils"
_COMMAND = "maxtext.checkpoint_conversion.to_huggingface"


class Exporter(Protocol):
  """A checkpoint of the plugin's, opened and checked."""

  def keys(self) -> list[str]:
    """MaxText's keys of its tensors, as in PARAM_MAPPING."""

  def write(self, folder: str, tokenizer: str | None) -> None:
    """Writes the Hugging Face folder."""


@dataclasses.dataclass(frozen=True)
class _Pending:
  """Stands for a tensor on its way through MaxText's command.

  Attributes:
    exporter: what will write it.
  """

  exporter: Exporter


class _Opened(dict[str, _Pending]):
  """Stands for a loaded checkpoint."""


class ToHuggingFaceSeam(Seam):
  """Exports LING2 models.

  Args:
    open_checkpoint: `open_checkpoint(path, config)` returns an `Exporter` of the checkpoint, of its sum with the adapters
      of `lora.lora_restore_path`, or, with an empty path, of these; raises if they do not fit.
  """

  name = "to_huggingface"
  module = _UTILS
  needed_for_training = False
  expectations = (
    *expect(
      _UTILS,
      "load_orbax_checkpoint(config)",
      "detect_and_extract_checkpoint(checkpoint_dict)",
      "process_maxtext_param(maxtext_param_key, maxtext_param_weight, param_map)",
      "save_model_files(weight_arrays, config, tokenizer, processor, output_dir)",
      "save_adapter_files(output_dir, weights, config, found_modules, model_id)",
    ),
    CommandExpectation(f"{_COMMAND}:main", parameters=("argv",)),
  )

  def __init__(self, open_checkpoint: Callable[[str, Any], Exporter]):
    super().__init__()
    self.open_checkpoint = open_checkpoint
    self._alone: Exporter | None = None
    """An adapter that is exported without a checkpoint: MaxText finds no arrays for it and hands over none."""

  def apply(self) -> None:
    from maxtext.checkpoint_conversion.utils import utils

    self.patches.wrap(utils, "load_orbax_checkpoint", self._load)
    self.patches.wrap(utils, "detect_and_extract_checkpoint", self._extract)
    self.patches.wrap(utils, "process_maxtext_param", self._process)
    self.patches.wrap(utils, "save_model_files", self._save)
    self.patches.wrap(utils, "save_adapter_files", self._save_adapter)

  def _load(self, original: Callable[..., Any], config: Any, *rest: Any, **kwargs: Any) -> Any:
    ours = is_ling2(config)
    _replace_tokenizers(ours)
    if not ours:
      return original(config, *rest, **kwargs)
    exporter = self.open_checkpoint(config.load_parameters_path, config)
    # The command collects garbage after each tensor, of which there is none; without this that takes minutes.
    gc.freeze()
    self._alone = None if config.load_parameters_path else exporter
    return _Opened(dict.fromkeys(exporter.keys(), _Pending(exporter)))

  def _extract(self, original: Callable[..., Any], checkpoint_dict: Any, *rest: Any, **kwargs: Any) -> Any:
    if isinstance(checkpoint_dict, _Opened):
      return dict(checkpoint_dict)
    return original(checkpoint_dict, *rest, **kwargs)

  def _process(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not any(isinstance(value, _Pending) for value in (*args, *kwargs.values())):
      return original(*args, **kwargs)
    call = Call(original, args, kwargs)
    return [(call["maxtext_param_key"], call["maxtext_param_weight"])]

  def _save(self, original: Callable[..., Any], weight_arrays: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    first = next(iter(weight_arrays.values()), None)
    if not isinstance(first, _Pending):
      return original(weight_arrays, *args, **kwargs)
    call = Call(original, (weight_arrays, *args), kwargs)
    return _write(first.exporter, call["output_dir"], call["tokenizer"])

  def _save_adapter(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    exporter, self._alone = self._alone, None
    call = Call(original, args, kwargs)
    if exporter is None or call["weights"]:
      return call.original()
    return _write(exporter, call["output_dir"], call["model_id"])


def _write(exporter: Exporter, folder: str, tokenizer: str | None) -> None:
  gc.unfreeze()
  if "://" in folder:
    raise CheckpointError(
      f"base_output_directory={folder}: not a local folder, and LING2 exports into one only; copy it afterwards"
    )
  exporter.write(os.path.abspath(folder), tokenizer)


class _Tokenizers:
  """Stands for transformers' AutoTokenizer in the command, whose tokenizer is loaded only to be saved again.

  For the plugin's models it is the folder whose files are copied, or nothing; for the others it is what it was.
  """

  def __init__(self, original: Any):
    self._original = original
    self.ours = False

  def from_pretrained(self, name: str, *args: Any, **kwargs: Any) -> Any:
    """The folder `name`, or None if there is none."""
    if not self.ours:
      return self._original.from_pretrained(name, *args, **kwargs)
    return name if name and os.path.isdir(name) else None


def _replace_tokenizers(ours: bool) -> None:
  """Puts `_Tokenizers` in the place of AutoTokenizer in the module of the command that is running."""
  frame: Any = sys._getframe(1)
  while frame is not None and frame.f_code.co_name != "main":
    frame = frame.f_back
  if frame is None or "AutoTokenizer" not in frame.f_globals:
    return
  names = frame.f_globals
  if not isinstance(names["AutoTokenizer"], _Tokenizers):
    if not ours:
      return
    names["AutoTokenizer"] = _Tokenizers(names["AutoTokenizer"])
  names["AutoTokenizer"].ours = ours
