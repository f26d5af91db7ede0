"""Seam: the train and eval step functions, whichever module runs as `__main__`.

`python -m maxtext.trainers.pre_train.train` runs that file as `__main__`, so attributes of the importable module are not
the ones in use. But MaxText hands its step functions to `get_functional_train_with_signature` and
`get_functional_eval_with_signature`; there they can be wrapped, for the plugin's decoder block only.
"""

from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import CommandExpectation, Expectation
from maxtext_ling2.host.patches import bound
from maxtext_ling2.host.seam import Seam

_UTILS = "maxtext.utils.maxtext_utils"
_TRAIN = "maxtext.trainers.pre_train.train"
StepWrapper = Callable[[Callable[..., Any], Any], Callable[..., Any]]


def _calls(*names: str) -> Callable[[Any], bool]:
  """Whether a function of a `CommandExpectation` calls all of these."""
  return lambda function: set(names) <= set(function.__code__.co_names)


class TrainStepSeam(Seam):
  """Wraps the step functions of runs of the plugin's decoder block.

  Args:
    decoder_block: the plugin's value of `decoder_block`.
    train: `train(train_step, config)` returns the train step to use; None: MaxText's own.
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

  def __init__(self, decoder_block: str, train: StepWrapper | None, evaluate: StepWrapper | None):
    super().__init__()
    self.decoder_block = decoder_block
    self.train = train
    self.evaluate = evaluate

  def apply(self) -> None:
    from maxtext.utils import maxtext_utils

    for name, step, wrapper in (
      ("get_functional_train_with_signature", "train_step", self.train),
      ("get_functional_eval_with_signature", "eval_step", self.evaluate),
    ):
      self.patches.wrap(maxtext_utils, name, self._hand_over(step, wrapper))

  def _hand_over(self, step: str, wrapper: StepWrapper | None) -> Callable[..., Any]:
    def hand_over(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
      call = bound(original, args, kwargs)
      config = call.arguments["config"]
      block = getattr(config.decoder_block, "value", config.decoder_block)
      if wrapper is not None and block == self.decoder_block:
        call.arguments[step] = wrapper(call.arguments[step], config)
      return original(*call.args, **call.kwargs)

    return hand_over
