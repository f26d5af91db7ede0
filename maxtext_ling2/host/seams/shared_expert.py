"""Seam: the width of the shared experts, the one hook that MaxText's layer and its FLOPs count both ask."""

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam
from maxtext_ling2.model.layer_layout import shared_expert_width


class SharedExpertSeam(Seam):
  """Makes `moe_shared_expert_dim` the hidden width of a shared expert."""

  name = "shared expert width"
  module = "maxtext.utils.maxtext_utils"
  expectations = expect(module, "get_shared_expert_mlp_dim(config)")

  def handlers(self) -> Handlers:
    return {"get_shared_expert_mlp_dim": _width}


def _width(call: Call) -> int:
  return shared_expert_width(call.config)
