"""Seam: metrics of the eval step that MaxText's logger does not know, and would drop.

The logger sums a fixed list of metrics over the batches of an evaluation and writes their means.
"""

from collections.abc import Callable, Sequence
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.seam import Seam, Use

_LOGGER = "maxtext.common.metric_logger"


class EvalMetricsSeam(Seam):
  """Writes the mean of further metrics over the batches of an evaluation.

  Args:
    names: as the eval step returns them.
  """

  name = "eval metrics"
  module = _LOGGER
  use = Use(
    "eval_interval > 0",
    lambda config: config.eval_interval > 0,
    "without evaluation/moe_z_loss and evaluation/raw_mtp_loss",
    essential=False,
  )
  expectations = (
    Expectation(f"{_LOGGER}:MetricLogger._accumulate_eval_metrics", parameters=("metrics",)),
    Expectation(f"{_LOGGER}:MetricLogger._finalize_eval_metrics", parameters=("train_step",)),
  )

  def __init__(self, names: Sequence[str]):
    super().__init__()
    self.names = tuple(names)

  def apply(self) -> None:
    from maxtext.common.metric_logger import MetricLogger

    self.patches.wrap(MetricLogger, "_accumulate_eval_metrics", self._accumulate)
    self.patches.wrap(MetricLogger, "_finalize_eval_metrics", self._finalize)

  def _accumulate(self, original: Callable[..., Any], logger: Any, metrics: Any, *rest: Any, **kwargs: Any) -> Any:
    scalars = metrics.get("scalar", {})
    for name in self.names:
      if name in scalars:
        logger.cumulative_eval_metrics["scalar"][name] += float(scalars[name])
    return original(logger, metrics, *rest, **kwargs)

  def _finalize(self, original: Callable[..., Any], logger: Any, *args: Any, **kwargs: Any) -> Any:
    sums = getattr(logger, "cumulative_eval_metrics", {}).get("scalar", {})
    for name in self.names:
      if name in sums:
        sums[name] /= logger._pending_eval_step_count
    return original(logger, *args, **kwargs)
