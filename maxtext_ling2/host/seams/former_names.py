"""Seams: checkpoints whose modules have the names of an earlier release.

MaxText loads into an abstract state that has the former names; the result gets today's. This covers weights alone and
whole training states. `from_pretrained` builds the model itself, and DiLoCo's state is not an `nnx.State`: there an error
says what to do.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use
from maxtext_ling2.host.seams.weight_variables import stored_weights


class FormerNamesSeam(Seam):
  """Loads weights and training states that were saved under former names of modules.

  Args:
    names: former name of a module -> its name, which no module of MaxText's models has.
  """

  name = "former names"
  module = "maxtext.common.checkpointing"
  expectations = expect(
    module,
    "load_params_from_path(load_parameters_from_path, abstract_unboxed_params)",
    "load_state_if_possible(checkpoint_manager, load_parameters_from_path, load_full_state_from_path, "
    "abstract_unboxed_pre_state, step)",
    "latest_step(checkpoint_manager)",
  )

  def __init__(self, names: Mapping[str, str]):
    super().__init__()
    self.names = dict(names)

  def apply(self) -> None:
    from maxtext.common import checkpointing

    self.patches.wrap(checkpointing, "load_params_from_path", self._load_params)
    self.patches.wrap(checkpointing, "load_state_if_possible", self._load_state)

  def _load_params(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    call = Call(original, args, kwargs)
    path, abstract = call["load_parameters_from_path"], call["abstract_unboxed_params"]
    if not (self._is_scanned(abstract) and has_former_names(path, self.names)):
      return original(*args, **kwargs)
    call["abstract_unboxed_params"] = self._with_former_names(abstract)
    return _renamed(call.original(), self.names)

  def _load_state(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from flax import nnx

    call = Call(original, args, kwargs)
    abstract = call["abstract_unboxed_pre_state"]
    path = _state_folder(call) if self._is_scanned(abstract) else None
    if path is None or not has_former_names(path, self.names):
      return original(*args, **kwargs)
    if not isinstance(abstract, nnx.State):
      raise CheckpointError(_refusal(path, self.names, "DiLoCo"))
    call["abstract_unboxed_pre_state"] = self._with_former_names(abstract)
    restored, params = call.original()
    if isinstance(restored, dict):
      return restored | {"items": _renamed(restored["items"], self.names)}, params
    return _renamed(restored, self.names), params

  def _is_scanned(self, abstract: Any) -> bool:
    """Whether the model has modules that had other names: a LING2 model whose layers are scanned."""
    return not _words(abstract).isdisjoint(self.names.values())

  def _with_former_names(self, abstract: Any) -> Any:
    return _renamed(abstract, {name: former for former, name in self.names.items()})


class FormerNamesErrorSeam(Seam):
  """Refuses checkpoints with former names where `from_pretrained` loads: MaxEngine, fine-tuning.

  Args:
    names: as for `FormerNamesSeam`.
  """

  name = "former names in from_pretrained"
  module = "maxtext.utils.model_creation_utils"
  use = Use("load_parameters_path", lambda config: config.load_parameters_path, "leave load_parameters_path out")
  expectations = expect(module, "from_pretrained(config)")

  def __init__(self, names: Mapping[str, str]):
    super().__init__()
    self.names = dict(names)

  def handlers(self) -> Handlers:
    return {"from_pretrained": self._load}

  def _load(self, call: Call) -> Any:
    path = call.config.load_parameters_path
    if path and has_former_names(path, self.names):
      raise CheckpointError(_refusal(path, self.names, "from_pretrained"))
    return call.original()


def has_former_names(path: Any, names: Iterable[str]) -> bool:
  """Whether weights of a checkpoint (a step's folder or its `items`) are in modules of these names."""
  try:
    weights = stored_weights(str(path))
  except (OSError, ValueError):  # MaxText says what is wrong with a path that it cannot read
    return False
  return any(not set(names).isdisjoint(map(str, weight)) for weight in weights)


def _refusal(path: Any, names: Iterable[str], reader: str) -> str:
  return (
    f"{path}: its scanned layers have the names of an earlier release of maxtext-ling2 ({', '.join(names)}), which "
    f"{reader} cannot load; convert it: MaxText's to_huggingface reads it, and to_maxtext writes it with today's names"
  )


def _state_folder(call: Call) -> Any:
  """The folder from which MaxText loads a whole training state, or None: it loads weights alone, or nothing."""
  from maxtext.common import checkpointing

  manager, step = call["checkpoint_manager"], call.get("step", -1)
  if manager is not None:
    step = checkpointing.latest_step(manager) if step < 0 else step
    if step is not None:
      return manager.directory / str(step)
  return None if call["load_parameters_from_path"] else call["load_full_state_from_path"] or None


def _words(tree: Any) -> set[str]:
  """All keys and attributes on the way to the leaves of a tree."""
  import jax

  paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(tree))
  return {str(getattr(key, "key", getattr(key, "name", key))) for path in paths for key in path}


def _renamed(state: Any, names: Mapping[str, str]) -> Any:
  """An `nnx.State` with other names of modules."""
  from flax import nnx

  flat = nnx.to_flat_state(state)
  return nnx.from_flat_state([(tuple(names.get(str(word), word) for word in path), leaf) for path, leaf in flat])
