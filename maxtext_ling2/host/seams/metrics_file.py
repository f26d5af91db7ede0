"""Seam: the lines of `metrics_file` stay.

MaxText empties the file whenever it writes step 0, so that a new run replaces the file of an earlier one. But an
evaluation counts its batches from 0, so each empties the file of what training wrote.
"""

import json

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use

_LOGGER = "maxtext.common.metric_logger"
_BEGUN = "_ling2_metrics_file_begun"


class MetricsFileSeam(Seam):
  """Empties `metrics_file` with a run's first line, if the run begins with step 0, and never afterwards."""

  name = "metrics file"
  module = _LOGGER
  use = Use(
    "metrics_file and eval_interval > 0",
    lambda config: bool(config.metrics_file) and config.eval_interval > 0,
    "but each evaluation empties metrics_file",
    essential=False,
  )
  expectations = expect(
    _LOGGER,
    "MetricLogger.write_metrics_locally(metrics, step)",
    "MetricLogger.__init__(config, learning_rate_schedule, start_step)",
    "_prepare_metrics_for_json(metrics, step, run_name)",
  )

  def handlers(self) -> Handlers:
    return {"MetricLogger.write_metrics_locally": _write}


def _write(call: Call) -> None:
  from maxtext.common import metric_logger

  logger, step = call["self"], call["step"]
  begins = step == 0 and logger.start_step == 0 and not hasattr(logger, _BEGUN)
  setattr(logger, _BEGUN, True)
  line = metric_logger._prepare_metrics_for_json(call["metrics"], step, call.config.run_name)
  with open(call.config.metrics_file, "w" if begins else "a", encoding="utf-8") as file:
    file.write(f"{json.dumps(line)}\n")
