"""Seam: MaxText's count of floating point operations, which sends blocks it does not know into a wrong branch."""

from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam


class FlopsSeam(Seam):
  """Counts LING2's.

  Args:
    tflops: gives, for a config, (total, with parameters, attention) TFLOP of a step on one device.
  """

  name = "FLOPs"
  module = "maxtext.utils.maxtext_utils"
  expectations = expect(module, "calculate_tflops_training_per_device(config, log)")

  def __init__(self, tflops: Callable[[Any], tuple[float, float, float]]):
    super().__init__()
    self.tflops = tflops

  def handlers(self) -> Handlers:
    return {"calculate_tflops_training_per_device": self._count}

  def _count(self, call: Call) -> tuple[float, float, float]:
    total, weights, attention = self.tflops(call.config)
    if call.get("log", True):
      share = f"{100 * weights / total:.2f}% learnable weight flops and {100 * attention / total:.2f}% attention flops"
      print(f"Per train step:\n Total TFLOPs: {total:.2f} \n split as {share}")
    return total, weights, attention
