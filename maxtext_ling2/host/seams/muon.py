"""Seam: which of LING2's parameters muon has to treat as attention projections, whole over their heads."""

from collections.abc import Sequence

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.seam import Seam, Use

_MUON = "maxtext.utils.muon_utils"


class MuonSeam(Seam):
  """Adds names to those whose kernels [C, .., H, D] muon orthogonalises as matrices [C, H * D].

  Args:
    projections: names of modules that no other model of MaxText has.
  """

  name = "muon"
  module = _MUON
  use = Use("opt_type=muon", lambda config: config.opt_type == "muon", "choose another opt_type")
  expectations = (
    Expectation(f"{_MUON}:ATTENTION_QKV_NAMES", holds=lambda value: "wq_b" in value, meaning="a tuple of module names"),
    Expectation(f"{_MUON}:transform_logic", parameters=("path", "shape")),
  )

  def __init__(self, projections: Sequence[str]):
    super().__init__()
    self.projections = tuple(projections)

  def apply(self) -> None:
    from maxtext.utils import muon_utils

    self.patches.attribute(muon_utils, "ATTENTION_QKV_NAMES", (*muon_utils.ATTENTION_QKV_NAMES, *self.projections))
