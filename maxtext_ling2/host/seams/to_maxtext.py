"""Seam: the command `maxtext.checkpoint_conversion.to_maxtext`, for the plugin's decoder block.

MaxText's command gives each tensor a lazy stand-in and saves all with `save_weights_to_checkpoint`, which holds the whole
model. That function is replaced. It knows neither the Hugging Face folder nor `--save_dtype`; these are local to the
command's `main`, which runs as `__main__` and calls `pyconfig.initialize`: there they are read off the caller's frame,
and the folder is checked before anything else happens.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.host.contract import CommandExpectation, Expectation
from maxtext_ling2.host.patches import bound, running
from maxtext_ling2.host.seam import Seam

_HANDLERS = "orbax.checkpoint.type_handlers"
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


@dataclasses.dataclass(frozen=True)
class Target:
  """Where and how the checkpoint is to be stored.

  Attributes:
    folder: of the step.
    ocdbt: whether in TensorStore's database.
    zarr3: whether in version 3 of zarr.
  """

  folder: str
  ocdbt: bool
  zarr3: bool


class ToMaxTextSeam(Seam):
  """Lets the plugin convert its own models.

  Args:
    decoder_block: the plugin's value of `decoder_block`.
    check: `check(request, config, target)` raises if the folder does not fit.
    convert: `convert(request, config, target)` writes the checkpoint.
  """

  name = "to_maxtext"
  module = _UTILS
  needed_for_training = False
  expectations = (
    Expectation(
      f"{_UTILS}:save_weights_to_checkpoint",
      parameters=("maxtext_model_path", "jax_weights", "device_count", "use_ocdbt", "use_zarr3", "config"),
    ),
    Expectation("maxtext.configs.pyconfig:initialize", parameters=("argv",)),
    CommandExpectation(f"{_COMMAND}:main", parameters=("args", *_ARGUMENTS)),
    # The command looks a model up in the tables before it configures it: without ours it would not come to the guard.
    Expectation(f"{_TABLES}:PARAM_MAPPING", holds=lambda value: isinstance(value, dict), meaning="a dict"),
    # What the streaming writer (checkpoint/orbax_store.py) overrides; a private method, so that its change must be told.
    Expectation(f"{_HANDLERS}:NumpyHandler._open_and_write", parameters=("value", "tspec", "ts_context")),
  )

  def __init__(
    self,
    decoder_block: str,
    check: Callable[[Request, Any, Target], None],
    convert: Callable[[Request, Any, Target], None],
  ):
    super().__init__()
    self.decoder_block = decoder_block
    self.check = check
    self.convert = convert
    self.request: Request | None = None

  def apply(self) -> None:
    from maxtext.checkpoint_conversion.utils import utils
    from maxtext.configs import pyconfig

    self.patches.wrap(pyconfig, "initialize", self._initialize)
    self.patches.wrap(utils, "save_weights_to_checkpoint", self._save)

  def _initialize(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Configures, and checks the folder if it is the command that asks, for one of the plugin's models."""
    config = original(*args, **kwargs)
    arguments = running("main", _ARGUMENTS)
    if arguments is not None:
      self.request = self._requested(arguments, config) if self._is_ours(config) else None
    return config

  def _is_ours(self, config: Any) -> bool:
    return bool(getattr(config.decoder_block, "value", config.decoder_block) == self.decoder_block)

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
    self.check(request, config, _target(output, config.checkpoint_storage_use_ocdbt, config.checkpoint_storage_use_zarr3))
    return request

  def _save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    call = bound(original, args, kwargs).arguments
    config, request, self.request = call.get("config"), self.request, None
    if config is None or not self._is_ours(config) or request is None:
      return original(*args, **kwargs)
    target = _target(call["maxtext_model_path"], call["use_ocdbt"], call["use_zarr3"])
    return self.convert(request, config, target)


def _target(output: str, ocdbt: bool, zarr3: bool) -> Target:
  """MaxText saves a converted checkpoint as step 0."""
  output = output if "://" in output else os.path.abspath(output)
  return Target(os.path.join(output, "0"), ocdbt, zarr3)
