"""Seam: the trainers that load a model by `from_pretrained`: fine-tuning, DPO and distillation with tunix.

They are checked where their config is made (`plugin.py`) and once more here, since a program may make a config first and
call a trainer later.

DPO: tunix keeps a model's graph between steps and takes gradients by a Flax transformation inside another. MaxText
replaces both for fine-tuning, since a model with experts adds to its graph in every forward pass; for DPO it does not.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from maxtext_ling2.configs import post_training
from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use
from maxtext_ling2.host.trainer import running_trainer

_CHECKPOINTER = "_checkpointer"


class PostTrainingSeam(Seam):
  """Refuses what such a trainer would not compute, and lets DPO run."""

  name = "post-training"
  module = "maxtext.utils.model_creation_utils"
  use = Use("load_parameters_path", lambda config: config.load_parameters_path, "leave load_parameters_path out")
  expectations = expect(module, "from_pretrained(config)")

  def handlers(self) -> Handlers:
    return {"from_pretrained": self._load}

  def _load(self, call: Call) -> Any:
    trainer = running_trainer()
    post_training.check(call.config, trainer)
    if trainer == post_training.DPO:
      self._replace_step()
    if trainer == post_training.DISTILLATION:
      _check_checkpoint_manager()
    return call.original()

  def _replace_step(self) -> None:
    """Gives tunix's DPO trainer a step without nested Flax transformations, and a model without what a step leaves."""
    cls: Any = importlib.import_module("tunix.sft.dpo.dpo_trainer").DPOTrainer
    if getattr(cls, "create_train_step_fn", None) is _train_step_function:
      return
    missing = [
      name for name in ("train", "create_train_step_fn", "_prepare_inputs", "_train_step") if not hasattr(cls, name)
    ]
    if missing:
      raise Ling2Error(
        f"tunix's DPOTrainer has no {', '.join(missing)}, which DPO with LING2 needs; install google-tunix 0.1.7"
      )
    self.patches.attribute(cls, "create_train_step_fn", _train_step_function)
    self.patches.wrap(cls, "train", _train)
    self.patches.wrap(cls, "_prepare_inputs", _prepare_inputs)


def _check_checkpoint_manager() -> None:
  """Raises Ling2Error for a tunix whose checkpoint manager is not the one that MaxText's distillation extends."""
  manager: Any = importlib.import_module("tunix.sft.checkpoint_manager").CheckpointManager
  if _CHECKPOINTER not in manager.__init__.__code__.co_names:
    raise Ling2Error(
      f"distillation: tunix's CheckpointManager sets no {_CHECKPOINTER}, which MaxText 0.2.5's reads once the models are "
      f"loaded ('MaxTextCheckpointManager' object has no attribute '{_CHECKPOINTER}', of any model; so with google-tunix "
      "0.1.7); install a tunix that has it"
    )


def _train(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  return original(*args, **{"cache_nnx_graph": False} | kwargs)


def _prepare_inputs(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
  """tunix's, which runs the reference model; what its layers have sown is removed, or it would grow from step to step."""
  from flax import nnx

  result = original(trainer, *args, **kwargs)
  if trainer.ref_model is not None:
    nnx.pop(trainer.ref_model, nnx.Intermediate)
  return result


def _train_step_function(trainer: Any) -> Callable[..., Any]:
  """tunix's step, with the model split into parameters and the rest before JAX takes the gradient."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  def loss(params: Any, rest: Any, graph: Any, inputs: Any) -> Any:
    model = nnx.merge(graph, params, rest, copy=True)  # variables of this trace
    value, aux = trainer.loss_fn(model, **inputs)
    nnx.pop(model, nnx.Intermediate)
    return value, (aux, nnx.state(model, nnx.Not(nnx.Param)))

  def step(model: Any, optimizer: Any, inputs: Any) -> tuple[Any, Any, Any]:
    nnx.pop(model, nnx.Intermediate)
    parts: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = parts
    gradient = jax.value_and_grad(
      functools.partial(loss, graph=graph, inputs=trainer.gen_model_input_fn(inputs)), has_aux=True
    )
    (value, (aux, rest)), grads = gradient(params, rest)
    nnx.update(model, rest)
    optimizer.update(model, grads)
    squares = (jnp.sum(jnp.square(grad.astype(jnp.float32))) for grad in jax.tree.leaves(grads))
    return value, aux, jnp.sqrt(sum(squares))

  return step
