"""Seam: which of LING2's parameters muon has to treat as attention projections, whole over their heads."""

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.seam import Seam, Use

_MUON = "maxtext.utils.muon_utils"
_PROJECTIONS = ("query_key_value", "output_gate")
"""Names of modules of LING2 that no model of MaxText has."""


class MuonSeam(Seam):
  """Adds names to those whose kernels [C, .., H, D] muon orthogonalises as matrices [C, H * D]."""

  name = "muon"
  module = _MUON
  use = Use("opt_type=muon", lambda config: config.opt_type == "muon", "choose another opt_type")
  expectations = (
    Expectation(f"{_MUON}:ATTENTION_QKV_NAMES", holds=lambda value: "wq_b" in value, meaning="a tuple of module names"),
    Expectation(f"{_MUON}:transform_logic", parameters=("path", "shape")),
  )

  def apply(self) -> None:
    from maxtext.utils import muon_utils

    self.patches.attribute(muon_utils, "ATTENTION_QKV_NAMES", (*muon_utils.ATTENTION_QKV_NAMES, *_PROJECTIONS))
