"""Seam: the command `maxtext.checkpoint_conversion.to_maxtext`, for LING2.

MaxText's command gives each tensor a lazy stand-in and saves all with `save_weights_to_checkpoint`, which holds the whole
model. That function is replaced. It knows neither the Hugging Face folder nor `--save_dtype`; these are local to the
command's `main`, which runs as `__main__` and calls `pyconfig.initialize`: there they are read off the caller's frame,
and the folder is checked before anything else happens.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from maxtext_ling2.configs.validation import is_ling2
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.host.contract import CommandExpectation, Expectation, expect
from maxtext_ling2.host.patches import Call, running
from maxtext_ling2.host.seam import Seam

_UTILS = "maxtext.checkpoint_conversion.utils.utils"
_TABLES = "maxtext.checkpoint_conversion.utils.param_mapping"
_COMMAND = "maxtext.checkpoint_conversion.to_maxtext"
_ARGUMENTS = ("lazy_load_tensors", "hf_model_path", "save_dtype")


@dataclasses.dataclass(frozen=True)
class Request:
  """What the command was told beside its config.

  Attributes:
    folder: the Hugging Face folder.
    save_dtype: of the weights.
  """

  folder: str
  save_dtype: str


class ToMaxTextSeam(Seam):
  """Streams the weights of LING2 models.

  Args:
    check: `check(folder, config, target, save_dtype)` raises if the Hugging Face folder does not fit.
    convert: `convert(folder, config, target, save_dtype, ocdbt, zarr3)` writes the checkpoint into the folder `target`.
  """

  name = "to_maxtext"
  module = _UTILS
  needed_for_training = False
  expectations = (
    *expect(
      _UTILS,
      "save_weights_to_checkpoint(maxtext_model_path, jax_weights, device_count, use_ocdbt, use_zarr3, config)",
    ),
    *expect("maxtext.configs.pyconfig", "initialize(argv)"),
    CommandExpectation(f"{_COMMAND}:main", parameters=("args", *_ARGUMENTS)),
    # The command looks a model up in the tables before it configures it: without ours it would not get to `RequestHook`.
    Expectation(f"{_TABLES}:PARAM_MAPPING", holds=lambda value: isinstance(value, dict), meaning="a dict"),
    # What the streaming writer (checkpoint/orbax_store.py) overrides; a private method, so that its change must be told.
    *expect("orbax.checkpoint.type_handlers", "NumpyHandler._open_and_write(value, tspec, ts_context)"),
  )

  def __init__(self, check: Callable[..., Any], convert: Callable[..., None]):
    super().__init__()
    self.check = check
    self.convert = convert
    self.request: Request | None = None

  def apply(self) -> None:
    from maxtext.checkpoint_conversion.utils import utils
    from maxtext.configs import pyconfig

    self.patches.wrap(pyconfig, "initialize", self._initialize)
    self.patches.wrap_for_ling2(utils, "save_weights_to_checkpoint", self._save)

  def _initialize(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Configures, and checks the folder if it is the command that asks, for a LING2 model."""
    config = original(*args, **kwargs)
    arguments = running("main", _ARGUMENTS)
    if arguments is not None:
      self.request = self._requested(arguments, config) if is_ling2(config) else None
    return config

  def _requested(self, arguments: dict[str, Any], config: Any) -> Request:
    folder = arguments["hf_model_path"]
    if not folder or not os.path.isdir(folder):
      raise CheckpointError(
        f"--hf_model_path={folder}: not a local folder, and LING2 is converted from one only; fetch the model with "
        "`hf download REPOSITORY --local-dir DIR` and pass --hf_model_path=DIR"
      )
    if not arguments["lazy_load_tensors"]:
      raise CheckpointError(
        "--lazy_load_tensors=false: not possible for LING2, because MaxText's eager path needs PyTorch and holds the "
        "whole model; leave it out"
      )
    if config.hf_lora_adapter_path:
      raise CheckpointError(
        f"hf_lora_adapter_path={config.hf_lora_adapter_path}: not a part of LING2's conversion, which knows no LoRA; "
        "merge the adapter into the Hugging Face folder first"
      )
    request = Request(folder, arguments["save_dtype"])
    output = config.base_output_directory or f"tmp/{config.run_name}"  # MaxText's own rule
    self.check(request.folder, config, _step_folder(output), request.save_dtype)
    return request

  def _save(self, call: Call) -> Any:
    request, self.request = self.request, None
    if request is None:
      return call.original()
    target = _step_folder(call["maxtext_model_path"])
    return self.convert(request.folder, call.config, target, request.save_dtype, call["use_ocdbt"], call["use_zarr3"])


def _step_folder(output: str) -> str:
  """MaxText saves a converted checkpoint as step 0."""
  return os.path.join(output if "://" in output else os.path.abspath(output), "0")
