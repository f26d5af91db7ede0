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
    folder: the Hugging Face folder; empty: an adapter is converted alone.
    save_dtype: of the weights.
    adapter: folder of a LoRA adapter, or empty.
  """

  folder: str
  save_dtype: str
  adapter: str = ""


class ToMaxTextSeam(Seam):
  """Streams the weights of LING2 models.

  Args:
    check: `check(folder, config, target, save_dtype, adapter)` raises if the Hugging Face folders do not fit.
    convert: `convert(folder, config, target, save_dtype, adapter, ocdbt, zarr3)` writes the checkpoint into the folder
      `target`.
  """

  name = "to_maxtext"
  module = _UTILS
  needed_for_training = False
  expectations = (
    *expect(
      _UTILS,
      "save_weights_to_checkpoint(maxtext_model_path, jax_weights, device_count, use_ocdbt, use_zarr3, config)",
      "load_hf_dict_from_safetensors(model_id_or_path)",
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
    self.patches.wrap(utils, "load_hf_dict_from_safetensors", self._adapter)
    self.patches.wrap_for_ling2(utils, "save_weights_to_checkpoint", self._save)

  def _initialize(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Configures, and checks the folder if it is the command that asks, for a LING2 model."""
    config = original(*args, **kwargs)
    arguments = running("main", _ARGUMENTS)
    if arguments is not None:
      self.request = self._requested(arguments, config) if is_ling2(config) else None
    return config

  def _requested(self, arguments: dict[str, Any], config: Any) -> Request:
    folder, adapter = arguments["hf_model_path"], config.hf_lora_adapter_path
    alone = bool(adapter and not config.load_parameters_path)  # MaxText's own rule, as are the folders below
    if adapter and not os.path.isdir(adapter):
      raise CheckpointError(
        f"hf_lora_adapter_path={adapter}: not a local folder, and LING2 is converted from one only; fetch the adapter "
        "with `hf download REPOSITORY --local-dir DIR` and pass hf_lora_adapter_path=DIR"
      )
    if not alone and (not folder or not os.path.isdir(folder)):
      raise CheckpointError(
        f"--hf_model_path={folder}: not a local folder, and LING2 is converted from one only; fetch the model with "
        "`hf download REPOSITORY --local-dir DIR` and pass --hf_model_path=DIR"
      )
    if not alone and not arguments["lazy_load_tensors"]:
      raise CheckpointError(
        "--lazy_load_tensors=false: not possible for LING2, because MaxText's eager path needs PyTorch and holds the "
        "whole model; leave it out"
      )
    request = Request("" if alone else folder, arguments["save_dtype"], adapter)
    output = config.base_output_directory or f"tmp/{config.run_name}"
    if alone:
      output = os.path.join(output, config.model_name, os.path.basename(os.path.normpath(adapter)))
    self.check(request.folder, config, _step_folder(output), request.save_dtype, adapter)
    return request

  def _adapter(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The weights of an adapter, which MaxText's command reads with PyTorch; for LING2 none: `convert` reads them."""
    return {} if self.request is not None else original(*args, **kwargs)

  def _save(self, call: Call) -> Any:
    request, self.request = self.request, None
    if request is None:
      return call.original()
    target = _step_folder(call["maxtext_model_path"])
    given = (request.folder, call.config, target, request.save_dtype, request.adapter)
    return self.convert(*given, call["use_ocdbt"], call["use_zarr3"])


def _step_folder(output: str) -> str:
  """MaxText saves a converted checkpoint as step 0."""
  return os.path.join(output if "://" in output else os.path.abspath(output), "0")
