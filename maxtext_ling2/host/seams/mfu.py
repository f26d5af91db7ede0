"""Seam: the share of the device's peak, beside MaxText's TFLOP/s per device, which tells no peak."""

import inspect
from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.patches import bound
from maxtext_ling2.host.seam import Seam, Use

_LOGGER = "maxtext.common.metric_logger"
_RATE, _SHARE = "perf/per_device_tflops_per_sec", "perf/mfu"


def _records(function: Any) -> bool:
  return _RATE in inspect.unwrap(function).__code__.co_consts


class MfuSeam(Seam):
  """Adds `perf/mfu` to the metrics of training steps of the plugin's decoder block, and names the peak in the log.

  Args:
    decoder_block: the plugin's value of `decoder_block`.
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
    Expectation(f"{_LOGGER}:MetricLogger.write_setup_info_to_tensorboard", parameters=("params",)),
  )

  def __init__(self, decoder_block: str, peak: Callable[[Any], float | None]):
    super().__init__()
    self.decoder_block = decoder_block
    self.peak = peak

  def apply(self) -> None:
    from maxtext.common.metric_logger import MetricLogger

    self.patches.wrap(MetricLogger, "record_train_metrics", self._record)
    self.patches.wrap(MetricLogger, "write_setup_info_to_tensorboard", self._name_peak)

  def _record(self, original: Callable[..., Any], logger: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(logger, *args, **kwargs)
    peak = self._peak(logger.config)
    if peak is None:
      return result
    scalars = bound(original, (logger, *args), kwargs).arguments["metrics"]["scalar"]
    if _RATE in scalars:  # MaxText has none while the batch is ramped up
      scalars[_SHARE] = scalars[_RATE] * 1e12 / peak
    return result

  def _name_peak(self, original: Callable[..., Any], logger: Any, *args: Any, **kwargs: Any) -> Any:
    from maxtext.utils import max_logging

    result = original(logger, *args, **kwargs)
    peak = self._peak(logger.config)
    if peak is not None:
      max_logging.log(f"LING2: {_SHARE} is the share of {peak / 1e12:g} TFLOP/s, a device's bfloat16 peak")
    return result

  def _peak(self, config: Any) -> float | None:
    """Of this process's devices; None for a run of another decoder block."""
    import jax

    if getattr(config.decoder_block, "value", config.decoder_block) != self.decoder_block:
      return None
    return self.peak(jax.local_devices()[0])
