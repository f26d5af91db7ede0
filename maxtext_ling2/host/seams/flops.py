"""Seam: MaxText's count of floating point operations, which sends blocks it does not know into a wrong branch."""

from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.patches import bound
from maxtext_ling2.host.seam import Seam

_UTILS = "maxtext.utils.maxtext_utils"


class FlopsSeam(Seam):
  """Lets the plugin count for its decoder block.

  Args:
    decoder_block: the plugin's value of `decoder_block`.
    tflops: gives, for a config, (total, with parameters, attention) TFLOP of a step on one device.
  """

  name = "FLOPs"
  module = _UTILS
  expectations = (Expectation(f"{_UTILS}:calculate_tflops_training_per_device", parameters=("config", "log")),)

  def __init__(self, decoder_block: str, tflops: Callable[[Any], tuple[float, float, float]]):
    super().__init__()
    self.decoder_block = decoder_block
    self.tflops = tflops

  def apply(self) -> None:
    from maxtext.utils import maxtext_utils

    self.patches.wrap(maxtext_utils, "calculate_tflops_training_per_device", self._count)

  def _count(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    call = bound(original, args, kwargs).arguments
    config = call["config"]
    if getattr(config.decoder_block, "value", config.decoder_block) != self.decoder_block:
      return original(*args, **kwargs)
    total, weights, attention = self.tflops(config)
    if call.get("log", True):
      share = f"{100 * weights / total:.2f}% learnable weight flops and {100 * attention / total:.2f}% attention flops"
      print(f"Per train step:\n Total TFLOPs: {total:.2f} \n split as {share}")
    return total, weights, attention
