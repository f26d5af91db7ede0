"""Seam: where MaxText's conversion tables stack the layers of a scan in a scan.

MaxText recognises such tensors by the name `local_layers` in their key, and stacks all others on their first axes.
"""

from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.seam import Seam

_MAXTEXTS = "-local_layers"


class StackedAxesSeam(Seam):
  """Lets MaxText's rule for layers of a scan in a scan hold for modules of another name.

  Args:
    module: the name, which no module of MaxText's models has.
  """

  name = "stacked axes"
  module = "maxtext.checkpoint_conversion.utils.tensor_handling"
  needed_for_training = False
  expectations = expect(module, "stacked_axes(mt_key, config, depth)")

  def __init__(self, module: str):
    super().__init__()
    self.scanned = f"-{module}"

  def apply(self) -> None:
    from maxtext.checkpoint_conversion.utils import tensor_handling

    self.patches.wrap(tensor_handling, "stacked_axes", self._axes)

  def _axes(self, original: Callable[..., Any], mt_key: Any, *rest: Any, **kwargs: Any) -> Any:
    key = mt_key.replace(self.scanned, _MAXTEXTS) if isinstance(mt_key, str) else mt_key
    return original(key, *rest, **kwargs)
