"""Seam: variables that are no parameters but belong to a checkpoint's weights.

MaxText stores `nnx.Param` under `params/params` and every other variable under `nnx_aux`, where only a full resume looks:
loading the weights of a training checkpoint (fine-tuning, decoding) then misses them. A variable whose metadata has
`MARK` is stored with the weights instead, wherever MaxText writes or reads a training state. Its location on
disk is therefore the same whether or not it is trained, and in training and converted checkpoints alike.

A checkpoint that lacks such a variable can be loaded all the same: it keeps its initial value, and the log says so.
"""

from collections.abc import Callable, Iterable
from typing import Any

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use

MARK = "stored_with_weights"

_SHOWN = 3


class WeightVariablesSeam(Seam):
  """Moves marked variables from `nnx_aux` to `params/params` on disk."""

  name = "weight variables"
  module = "maxtext.common.train_state_nnx"
  expectations = expect(module, "split_for_checkpoint(state)", "to_checkpoint_dict(state)")

  def apply(self) -> None:
    from maxtext.common import train_state_nnx

    self.patches.wrap(train_state_nnx, "split_for_checkpoint", _split)


class WeightLoadingSeam(Seam):
  """Lets a checkpoint without marked variables be loaded."""

  name = "weight loading"
  module = "maxtext.common.checkpointing"
  expectations = expect(
    module,
    "load_params_from_path(load_parameters_from_path, abstract_unboxed_params)",
    "load_state_if_possible",
    "_normalize_checkpoint_root(path_str)",
  )

  def apply(self) -> None:
    from maxtext.common import checkpointing

    self.patches.wrap(checkpointing, "load_params_from_path", _load_params)
    self.patches.wrap(checkpointing, "load_state_if_possible", _load_state)


class PretrainedWeightsSeam(Seam):
  """Lets MaxEngine and the trainers that call `from_pretrained` load a checkpoint without router biases.

  That function cannot leave out a variable of the model, so the model is built without: at zero a bias changes nothing.

  Args:
    ending: the last keys of a bias's path.
  """

  name = "pretrained weights"
  module = "maxtext.utils.model_creation_utils"
  use = Use(
    "load_parameters_path and routed_bias=true",
    lambda config: config.load_parameters_path and config.routed_bias,
    "leave load_parameters_path out",
  )
  expectations = (
    *expect(module, "from_pretrained(config)"),
    *expect("maxtext.configs.pyconfig", "HyperParameters(pydantic_config)"),
  )

  def __init__(self, ending: tuple[str, ...]):
    super().__init__()
    self.ending = ending

  def handlers(self) -> Handlers:
    return {"from_pretrained": self._load}

  def _load(self, call: Call) -> Any:
    config, path = call.config, call.config.load_parameters_path
    if path and config.routed_bias and not self._has(path):
      from maxtext.configs import pyconfig
      from maxtext.utils import max_logging

      max_logging.warning(f"LING2: {path} has no router biases: the model is built without, as if they were 0")
      call["config"] = pyconfig.HyperParameters(config._pydantic_config.model_copy(update={"routed_bias": False}))
    return call.original()

  def _has(self, path: str) -> bool:
    return any(key[-len(self.ending) :] == self.ending for key in stored_weights(path))


def _marked(variable: Any) -> bool:
  get_metadata = getattr(variable, "get_metadata", None)
  return get_metadata is not None and bool(get_metadata().get(MARK))


def _split(original: Callable[..., Any], state: Any, *rest: Any, **kwargs: Any) -> Any:
  """MaxText's (weights and optimizer, others, not stored), with marked variables among the weights."""
  from flax import nnx

  stored, others, ephemeral = original(state, *rest, **kwargs)
  flat = nnx.to_flat_state(others)
  moved = [(path, variable) for path, variable in flat if _marked(variable)]
  if not moved:
    return stored, others, ephemeral
  kept = nnx.from_flat_state([(path, variable) for path, variable in flat if not _marked(variable)])
  return nnx.merge_state(stored, nnx.from_flat_state(moved)), kept, ephemeral


def _load_params(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """MaxText's weights-only load, without the marked variables that the checkpoint does not have."""
  from flax import nnx

  call = Call(original, args, kwargs)
  path, abstract = call["load_parameters_from_path"], call["abstract_unboxed_params"]
  if not isinstance(abstract, nnx.State):
    return original(*args, **kwargs)
  flat = nnx.to_flat_state(abstract)
  marked = {tuple(key) for key, variable in flat if _marked(variable)}
  absent = marked - stored_weights(path) if marked else set()
  if absent:
    _say_initialised(path, absent)
    kept = nnx.from_flat_state([(key, variable) for key, variable in flat if tuple(key) not in absent])
    call["abstract_unboxed_params"] = kept
  return call.original()


def stored_weights(path: str) -> set[tuple[Any, ...]]:
  """Paths of all weights in a checkpoint, in every collection."""
  from etils import epath
  from flax.traverse_util import flatten_dict
  from maxtext.common import checkpointing
  from orbax.checkpoint import v1 as ocp

  root = epath.Path(checkpointing._normalize_checkpoint_root(path))
  tree = ocp.metadata(root, checkpointable_name="items" if (root / "items").exists() else None).metadata
  collections = tree.get("params", {}) if isinstance(tree, dict) else {}
  return {key for collection in collections.values() if isinstance(collection, dict) for key in flatten_dict(collection)}


def _load_state(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """MaxText's load; says which marked variables and optimizer slots it left at their initial values."""
  import jax
  from flax import nnx

  restored, params = original(*args, **kwargs)
  state = restored.get("items") if isinstance(restored, dict) else None
  if isinstance(state, nnx.State):
    flat = nnx.to_flat_state(state)
    if any(_marked(variable) for _, variable in flat):
      left = [
        path
        for path, variable in flat
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct) and not isinstance(variable, nnx.RngState)
      ]
      if left:
        _say_initialised("the checkpoint", left)
  return restored, params


def _say_initialised(source: str, paths: Iterable[tuple[Any, ...]]) -> None:
  from maxtext.utils import max_logging

  names = sorted("/".join(map(str, path)) for path in paths)
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  listed = ", ".join(names[:_SHOWN]) + more
  max_logging.warning(f"LING2: {source} does not have {listed}: {len(names)} variable(s) start at their initial values")
