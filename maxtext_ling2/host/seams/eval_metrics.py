"""Seam: metrics of the eval step that MaxText's logger does not know, and would drop.

The logger sums a fixed list of metrics over the batches of an evaluation and writes their means.
"""

from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.seam import Seam, Use

_LOGGER = "maxtext.common.metric_logger"
_NAMES = ("evaluation/moe_z_loss", "evaluation/raw_mtp_loss")


class EvalMetricsSeam(Seam):
  """Writes the mean of LING2's metrics over the batches of an evaluation."""

  name = "eval metrics"
  module = _LOGGER
  use = Use(
    "eval_interval > 0",
    lambda config: config.eval_interval > 0,
    f"without {' and '.join(_NAMES)}",
    essential=False,
  )
  expectations = (
    Expectation(f"{_LOGGER}:MetricLogger._accumulate_eval_metrics", parameters=("metrics",)),
    Expectation(f"{_LOGGER}:MetricLogger._finalize_eval_metrics", parameters=("train_step",)),
  )

  def apply(self) -> None:
    from maxtext.common.metric_logger import MetricLogger

    self.patches.wrap(MetricLogger, "_accumulate_eval_metrics", self._accumulate)
    self.patches.wrap(MetricLogger, "_finalize_eval_metrics", self._finalize)

  def _accumulate(self, original: Callable[..., Any], logger: Any, metrics: Any, *rest: Any, **kwargs: Any) -> Any:
    scalars = metrics.get("scalar", {})
    for name in _NAMES:
      if name in scalars:
        logger.cumulative_eval_metrics["scalar"][name] += float(scalars[name])
    return original(logger, metrics, *rest, **kwargs)

  def _finalize(self, original: Callable[..., Any], logger: Any, *args: Any, **kwargs: Any) -> Any:
    sums = getattr(logger, "cumulative_eval_metrics", {}).get("scalar", {})
    for name in _NAMES:
      if name in sums:
        sums[name] /= logger._pending_eval_step_count
    return original(logger, *args, **kwargs)
