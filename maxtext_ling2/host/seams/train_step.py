"""Seam: the train and eval step functions, whichever module runs as `__main__`.

`python -m maxtext.trainers.pre_train.train` runs that file as `__main__`, so attributes of the importable module are not
the ones in use. But MaxText hands its step functions to `get_functional_train_with_signature` and
`get_functional_eval_with_signature`; there they can be wrapped.
"""

import functools
from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import CommandExpectation, expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam

_TRAIN = "maxtext.trainers.pre_train.train"
StepWrapper = Callable[[Callable[..., Any], Any], Callable[..., Any]]


def _calls(*names: str) -> Callable[[Any], bool]:
  """Whether a function of a `CommandExpectation` calls all of these."""
  return lambda function: set(names) <= set(function.__code__.co_names)


class TrainStepSeam(Seam):
  """Wraps the step functions of LING2 runs.

  Args:
    train: `train(train_step, config)` returns the train step to use.
    evaluate: the same for the eval step.
  """

  name = "train step"
  module = "maxtext.utils.maxtext_utils"
  expectations = (
    *expect(
      module,
      "get_functional_train_with_signature(train_step, data_sharding, state_mesh_shardings, model, config)",
      "get_functional_eval_with_signature(eval_step, data_sharding, state_mesh_shardings, model, config)",
    ),
    CommandExpectation(
      f"{_TRAIN}:train_step",
      parameters=("model", "config", "state_mesh_shardings", "params_shardings", "state", "data"),
      holds=_calls("step_diagnostics", "apply_qk_clip_nnx", "calculate_max_logit_metric"),
      meaning="which calls step_diagnostics and two functions of qk_clip_utils",
    ),
    CommandExpectation(
      f"{_TRAIN}:eval_step",
      parameters=("model", "config", "state", "data"),
      holds=_calls("loss_fn"),
      meaning="which calls loss_fn",
    ),
    CommandExpectation(
      f"{_TRAIN}:loss_fn",
      parameters=("model", "config", "data", "dropout_rng", "params"),
      holds=_calls("cross_entropy_with_logits"),
      meaning="which calls cross_entropy_with_logits",
    ),
    *expect("maxtext.utils.max_utils", "cross_entropy_with_logits(logits, targets, z_loss)"),
  )

  def __init__(self, train: StepWrapper, evaluate: StepWrapper):
    super().__init__()
    self.train = train
    self.evaluate = evaluate

  def handlers(self) -> Handlers:
    return {
      "get_functional_train_with_signature": functools.partial(_hand_over, "train_step", self.train),
      "get_functional_eval_with_signature": functools.partial(_hand_over, "eval_step", self.evaluate),
    }


def _hand_over(name: str, wrapper: StepWrapper, call: Call) -> Any:
  call[name] = wrapper(call[name], call.config)
  return call.original()
