"""Seam: the train and eval step functions, whichever module runs as `__main__`.

`python -m maxtext.trainers.pre_train.train` runs that file as `__main__`, so attributes of the importable module are not
the ones in use. But MaxText hands its step functions to `get_functional_train_with_signature` and
`get_functional_eval_with_signature`; there they can be wrapped.
"""

from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import CommandExpectation, Expectation
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Seam

_UTILS = "maxtext.utils.maxtext_utils"
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
  module = _UTILS
  expectations = (
    Expectation(
      f"{_UTILS}:get_functional_train_with_signature",
      parameters=("train_step", "data_sharding", "state_mesh_shardings", "model", "config"),
    ),
    Expectation(
      f"{_UTILS}:get_functional_eval_with_signature",
      parameters=("eval_step", "data_sharding", "state_mesh_shardings", "model", "config"),
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
    CommandExpectation(f"{_TRAIN}:loss_fn", parameters=("model", "config", "data", "dropout_rng", "params")),
  )

  def __init__(self, train: StepWrapper, evaluate: StepWrapper):
    super().__init__()
    self.train = train
    self.evaluate = evaluate

  def apply(self) -> None:
    from maxtext.utils import maxtext_utils

    self.patches.wrap_for_ling2(maxtext_utils, "get_functional_train_with_signature", self._hand_over_train_step)
    self.patches.wrap_for_ling2(maxtext_utils, "get_functional_eval_with_signature", self._hand_over_eval_step)

  def _hand_over_train_step(self, call: Call) -> Any:
    call["train_step"] = self.train(call["train_step"], call.config)
    return call.original()

  def _hand_over_eval_step(self, call: Call) -> Any:
    call["eval_step"] = self.evaluate(call["eval_step"], call.config)
    return call.original()
