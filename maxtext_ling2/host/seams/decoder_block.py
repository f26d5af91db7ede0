"""Seam: one more member in MaxText's closed enum of decoder blocks, before its config schemas are compiled."""

import enum
import functools
import inspect
import sys
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.patches import Conflict, StandDown
from maxtext_ling2.host.seam import Seam
from maxtext_ling2.host.seams.config_fields import descendants, rebuild

_TARGET = "maxtext.common.common_types:DecoderBlockType"


class DecoderBlockSeam(Seam):
  """Adds `member = value` to `DecoderBlockType`.

  Raises on `apply`:
    StandDown: MaxText's own source defines the value.
    Conflict: somebody else added it at run time.
  """

  name = "decoder block"
  module = "maxtext.common.common_types"
  expectations = (
    Expectation(
      _TARGET,
      holds=lambda value: issubclass(value, enum.Enum) and value("deepseek") is value.DEEPSEEK,
      meaning="an Enum of lower-case values with a member DEEPSEEK",
    ),
  )

  def __init__(self, member: str, value: str):
    super().__init__()
    self.member = member
    self.value = value

  def apply(self) -> None:
    from maxtext.common.common_types import DecoderBlockType

    if self.value in DecoderBlockType._value2member_map_ or self.member in DecoderBlockType._member_map_:
      if f'"{self.value}"' in inspect.getsource(DecoderBlockType):
        raise StandDown(f"this MaxText brings the decoder block '{self.value}' itself")
      raise Conflict(f"the decoder block '{self.value}' was already added to DecoderBlockType by another plugin")
    import aenum

    aenum.extend_enum(DecoderBlockType, self.member, self.value)
    self.patches.also(functools.partial(_remove, DecoderBlockType, self.member, self.value))


def _remove(cls: Any, member: str, value: str) -> None:
  """Takes a member out of an enum again; the standard library keeps it in these four places."""
  cls._member_names_.remove(member)
  del cls._member_map_[member]
  del cls._value2member_map_[value]
  if member in cls.__dict__:
    type.__delattr__(cls, member)
  types = sys.modules.get("maxtext.configs.types")
  if types is not None:  # its compiled schemas know the member
    rebuild(descendants(types, types.ModelArchitecture))
