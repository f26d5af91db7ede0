"""Seam: MaxText's count of floating point operations, which sends blocks it does not know into a wrong branch."""

from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Seam

_UTILS = "maxtext.utils.maxtext_utils"


class FlopsSeam(Seam):
  """Counts LING2's.

  Args:
    tflops: gives, for a config, (total, with parameters, attention) TFLOP of a step on one device.
  """

  name = "FLOPs"
  module = _UTILS
  expectations = (Expectation(f"{_UTILS}:calculate_tflops_training_per_device", parameters=("config", "log")),)

  def __init__(self, tflops: Callable[[Any], tuple[float, float, float]]):
    super().__init__()
    self.tflops = tflops

  def apply(self) -> None:
    from maxtext.utils import maxtext_utils

    self.patches.wrap_for_ling2(maxtext_utils, "calculate_tflops_training_per_device", self._count)

  def _count(self, call: Call) -> tuple[float, float, float]:
    total, weights, attention = self.tflops(call.config)
    if call.get("log", True):
      share = f"{100 * weights / total:.2f}% learnable weight flops and {100 * attention / total:.2f}% attention flops"
      print(f"Per train step:\n Total TFLOPs: {total:.2f} \n split as {share}")
    return total, weights, attention
