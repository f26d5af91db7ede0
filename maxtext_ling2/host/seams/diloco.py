"""Seams: the step of DiLoCo, which MaxText builds without `get_functional_train_with_signature`, and its checkpoint."""

import functools
from typing import Any

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use
from maxtext_ling2.host.seams.train_step import StepWrapper


class DilocoSeam(Seam):
  """Gives each replica of a LING2 run LING2's step.

  Args:
    train: `train(train_step, config)` returns the step of a replica; as of `TrainStepSeam`.
    synchronised: `synchronised(step, config)` returns the step of all replicas, made of MaxText's.
  """

  name = "DiLoCo"
  module = "maxtext.trainers.diloco.diloco"
  use = Use("enable_diloco=true", lambda config: config.enable_diloco, "set enable_diloco=false")
  expectations = expect(module, "build_diloco_train_step(config, train_step, mesh)")

  def __init__(self, train: StepWrapper, synchronised: StepWrapper):
    super().__init__()
    self.train = train
    self.synchronised = synchronised

  def handlers(self) -> Handlers:
    return {"build_diloco_train_step": self._build}

  def _build(self, call: Call) -> Any:
    config, step = call.config, call["train_step"]
    if not isinstance(step, functools.partial):
      raise TypeError(f"build_diloco_train_step got {step!r} and not a functools.partial of MaxText's train step")
    call["train_step"] = functools.partial(self.train(step.func, config), *step.args, **step.keywords)
    return self.synchronised(call.original(), config)


class DilocoCheckpointSeam(Seam):
  """Stores router biases once among the weights of all replicas, where an export looks; those of each replica stay.

  MaxText 0.2.5 cannot restore what DiLoCo saved, of no model, so that there is nothing to take off again.

  Args:
    ending: the last keys of a bias's path.
  """

  name = "DiLoCo checkpoint"
  module = "maxtext.trainers.diloco.utils.spmd_diloco_checkpointing"
  use = Use("enable_diloco=true", lambda config: config.enable_diloco, "set enable_diloco=false")
  expectations = expect(module, "to_diloco_checkpoint_dict(state, config)")

  def __init__(self, ending: tuple[str, ...]):
    super().__init__()
    self.ending = ending

  def handlers(self) -> Handlers:
    return {"to_diloco_checkpoint_dict": self._store}

  def _store(self, call: Call) -> Any:
    from flax import traverse_util

    stored = call.original()
    weights = traverse_util.flatten_dict(stored["params"]["params"])
    each = traverse_util.flatten_dict(stored["inner_state"]["params"]["params"])
    biases = {path: _of_all(leaf) for path, leaf in each.items() if path[-len(self.ending) :] == self.ending}
    return stored | {"params": {"params": traverse_util.unflatten_dict(biases | weights)}}


def _of_all(biases: Any) -> Any:
  """The mean [...] of the biases [replicas, ...], which is each of them after a synchronisation; or its shape."""
  import jax
  import jax.numpy as jnp

  if isinstance(biases, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(biases.shape[1:], biases.dtype)
  return jnp.mean(biases.astype(jnp.float32), axis=0).astype(biases.dtype)
