"""Seam: the width of the shared experts, the one hook that MaxText's layer and its FLOPs count both ask."""

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Seam

_UTILS = "maxtext.utils.maxtext_utils"


class SharedExpertSeam(Seam):
  """Makes `moe_shared_expert_dim` the hidden width of a shared expert."""

  name = "shared expert width"
  module = _UTILS
  expectations = (Expectation(f"{_UTILS}:get_shared_expert_mlp_dim", parameters=("config",)),)

  def apply(self) -> None:
    from maxtext.utils import maxtext_utils

    self.patches.wrap_for_ling2(maxtext_utils, "get_shared_expert_mlp_dim", _width)


def _width(call: Call) -> int:
  return int(call.config.moe_shared_expert_dim or call.config.moe_mlp_dim)
