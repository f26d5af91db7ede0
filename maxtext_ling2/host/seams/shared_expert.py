"""Seam: the width of the shared experts, the one hook that MaxText's layer and its FLOPs count both ask."""

from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.seam import Seam

_UTILS = "maxtext.utils.maxtext_utils"


class SharedExpertSeam(Seam):
  """Lets the plugin answer for its decoder block.

  Args:
    decoder_block: the plugin's value of `decoder_block`.
    width: gives, for a config, the hidden width of one shared expert.
  """

  name = "shared expert width"
  module = _UTILS
  expectations = (Expectation(f"{_UTILS}:get_shared_expert_mlp_dim", parameters=("config",)),)

  def __init__(self, decoder_block: str, width: Callable[[Any], int]):
    super().__init__()
    self.decoder_block = decoder_block
    self.width = width

  def apply(self) -> None:
    from maxtext.utils import maxtext_utils

    self.patches.wrap(maxtext_utils, "get_shared_expert_mlp_dim", self._answer)

  def _answer(self, original: Callable[..., int], config: Any, *rest: Any, **kwargs: Any) -> int:
    block = getattr(config.decoder_block, "value", config.decoder_block)
    return self.width(config) if block == self.decoder_block else original(config, *rest, **kwargs)
