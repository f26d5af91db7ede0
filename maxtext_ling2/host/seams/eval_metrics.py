"""Seam: metrics of the eval step that MaxText's logger does not know, and would drop.

The logger sums a fixed list of metrics over the batches of an evaluation and writes their means.
"""

from typing import Any

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use

_NAMES = ("evaluation/moe_z_loss", "evaluation/raw_mtp_loss")


class EvalMetricsSeam(Seam):
  """Writes the mean of LING2's metrics over the batches of an evaluation."""

  name = "eval metrics"
  module = "maxtext.common.metric_logger"
  use = Use(
    "eval_interval > 0",
    lambda config: config.eval_interval > 0,
    f"without {' and '.join(_NAMES)}",
    essential=False,
  )
  expectations = expect(
    module, "MetricLogger._accumulate_eval_metrics(metrics)", "MetricLogger._finalize_eval_metrics(train_step)"
  )

  def handlers(self) -> Handlers:
    return {"MetricLogger._accumulate_eval_metrics": _accumulate, "MetricLogger._finalize_eval_metrics": _finalize}


def _accumulate(call: Call) -> Any:
  scalars = call["metrics"].get("scalar", {})
  for name in _NAMES:
    if name in scalars:
      call["self"].cumulative_eval_metrics["scalar"][name] += float(scalars[name])
  return call.original()


def _finalize(call: Call) -> Any:
  logger = call["self"]
  sums = getattr(logger, "cumulative_eval_metrics", {}).get("scalar", {})
  for name in _NAMES:
    if name in sums:
      sums[name] /= logger._pending_eval_step_count
  return call.original()
