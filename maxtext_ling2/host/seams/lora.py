"""Seam: LoRA. MaxText chooses modules by a pattern per model and adapts what matches; it has none for LING2.

Without one, its default pattern finds the modules whose names LING2 shares with other models, in unscanned layers alone.
"""

import re
from typing import Any

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use
from maxtext_ling2.model import adapters

_FEW = 8


class LoraSeam(Seam):
  """LING2's default pattern; an error if a pattern adapts nothing; and a line in the log of what is adapted."""

  name = "LoRA"
  module = "maxtext.utils.lora_utils"
  use = Use("lora.enable_lora=true", adapters.enabled, "set lora.enable_lora=false")
  expectations = expect(
    module, "_get_lora_module_path(mt_config)", "apply_lora_to_model(model, mesh, mt_config)", "is_lora_enabled(model)"
  )

  def handlers(self) -> Handlers:
    return {"_get_lora_module_path": _pattern, "apply_lora_to_model": _apply}


def _pattern(call: Call) -> str:
  return call.config.lora.lora_module_path or adapters.MODULE_PATH


def _apply(call: Call) -> Any:
  from flax import nnx
  from maxtext.utils import lora_utils, max_logging

  config = call.config
  if config.lora_input_adapters_path or not adapters.enabled(config) or lora_utils.is_lora_enabled(call["model"]):
    return call.original()
  pattern = lora_utils._get_lora_module_path(config)
  modules = {tuple(path): module for path, module in nnx.iter_modules(call["model"])}
  kernels = {path for path, module in modules.items() if _has_kernel(module)}
  matched = {path for path in kernels if re.fullmatch(pattern, "/".join(map(str, path)))}
  _check(pattern, matched, kernels, modules, config)
  model = call.original()
  arrays = dict(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
  adapted = {path[:-1] for path in arrays}
  missed = matched - adapted
  if missed:
    raise ValueError(
      f"lora.lora_module_path={pattern!r}: {_shown(adapters.kind(path, modules) for path in missed)} match, but Qwix "
      "finds no product in them that it can adapt; leave them out of the pattern"
    )
  size = sum(variable.get_value().size for variable in arrays.values())
  max_logging.log(
    f"LING2: LoRA adapts {adapters.counts(adapted, modules, config)} (layers of each kind); {len(arrays)} arrays, "
    f"{size} parameters; all other weights stay as they are"
  )
  return model


def _check(pattern: str, matched: set[Any], kernels: set[Any], modules: Any, config: Any) -> None:
  """Raises ValueError for a pattern that matches nothing, or experts that cannot be adapted."""
  if not matched:
    raise ValueError(
      f"lora.lora_module_path={pattern!r}: it matches no module of this model; the whole path of a module must match, as "
      f"of {_shown('/'.join(map(str, path)) for path in kernels)}; leave it empty for LING2's own"
    )
  if config.sparse_matmul and any(path[-1] == adapters.EXPERTS for path in matched):
    raise ValueError(
      f"lora.lora_module_path={pattern!r}, sparse_matmul=true: Qwix cannot adapt the grouped products of routed experts; "
      f"set sparse_matmul=false, or leave {adapters.EXPERTS} out of the pattern"
    )


def _has_kernel(module: Any) -> bool:
  """Whether a module multiplies by a parameter of its own."""
  from flax import nnx

  return any(isinstance(value, nnx.Param) and value.get_value().ndim > 1 for value in vars(module).values())


def _shown(names: Any) -> str:
  """A few of the names."""
  found = sorted(set(names))
  return ", ".join(found[:_FEW]) + " ..." * (len(found) > _FEW)
