"""Seam: where MaxText's conversion tables stack the layers of a scan in a scan.

MaxText recognises such tensors by the name `local_layers` in their key, and stacks all others on their first axes.
"""

from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.registry import Seam

_TENSORS = "maxtext.checkpoint_conversion.utils.tensor_handling"
_MAXTEXTS = "-local_layers"


class StackedAxesSeam(Seam):
  """Lets MaxText's rule for layers of a scan in a scan hold for modules of another name.

  Args:
    module: the name, which no module of MaxText's models has.
  """

  name = "stacked axes"
  module = _TENSORS
  needed_for_training = False
  expectations = (Expectation(f"{_TENSORS}:stacked_axes", parameters=("mt_key", "config", "depth")),)

  def __init__(self, module: str):
    super().__init__()
    self.scanned = f"-{module}"

  def apply(self) -> None:
    from maxtext.checkpoint_conversion.utils import tensor_handling

    self.patches.wrap(tensor_handling, "stacked_axes", self._axes)

  def _axes(self, original: Callable[..., Any], mt_key: Any, *rest: Any, **kwargs: Any) -> Any:
    key = mt_key.replace(self.scanned, _MAXTEXTS) if isinstance(mt_key, str) else mt_key
    return original(key, *rest, **kwargs)
