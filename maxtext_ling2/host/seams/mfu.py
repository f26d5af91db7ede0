"""Seam: the share of the device's peak, beside MaxText's TFLOP/s per device, which tells no peak."""

import inspect
from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation, expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use

_LOGGER = "maxtext.common.metric_logger"
_RATE, _SHARE = "perf/per_device_tflops_per_sec", "perf/mfu"


def _records(function: Any) -> bool:
  return _RATE in inspect.unwrap(function).__code__.co_consts


class MfuSeam(Seam):
  """Adds `perf/mfu` to the metrics of LING2's training steps, and names the peak in the log.

  Args:
    peak: gives a device's bfloat16 operations per second at peak, or None where that is not known: then there is no MFU.
  """

  name = "MFU"
  module = _LOGGER
  use = Use(f"the metric {_SHARE}", lambda config: True, f"without {_SHARE}", essential=False)
  expectations = (
    Expectation(
      f"{_LOGGER}:MetricLogger.record_train_metrics",
      parameters=("metrics", "step", "step_time"),
      holds=_records,
      meaning=f"which records {_RATE}",
    ),
    *expect(_LOGGER, "MetricLogger.write_setup_info_to_tensorboard(params)"),
  )

  def __init__(self, peak: Callable[[Any], float | None]):
    super().__init__()
    self.peak = peak

  def handlers(self) -> Handlers:
    return {
      "MetricLogger.record_train_metrics": self._record,
      "MetricLogger.write_setup_info_to_tensorboard": self._name_peak,
    }

  def _record(self, call: Call) -> Any:
    result = call.original()
    peak, scalars = self._peak(), call["metrics"]["scalar"]
    if peak is not None and _RATE in scalars:  # MaxText has no rate while the batch is ramped up
      scalars[_SHARE] = scalars[_RATE] * 1e12 / peak
    return result

  def _name_peak(self, call: Call) -> Any:
    from maxtext.utils import max_logging

    result, peak = call.original(), self._peak()
    if peak is not None:
      max_logging.log(f"LING2: {_SHARE} is the share of {peak / 1e12:g} TFLOP/s, a device's bfloat16 peak")
    return result

  def _peak(self) -> float | None:
    """Of this process's devices."""
    import jax

    return self.peak(jax.local_devices()[0])
