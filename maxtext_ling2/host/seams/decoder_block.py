"""Seam: one more member in MaxText's closed enum of decoder blocks, before its config schemas are compiled."""

import enum
import functools
import inspect
import sys
from typing import Any

from maxtext_ling2.configs.validation import DECODER_BLOCK
from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.patches import Conflict, SupersededByHost
from maxtext_ling2.host.seam import Seam
from maxtext_ling2.host.seams.config_fields import descendants, rebuild

_TARGET = "maxtext.common.common_types:DecoderBlockType"
_MEMBER = "LING2"


class DecoderBlockSeam(Seam):
  """Adds `LING2 = "ling2"` to `DecoderBlockType`.

  Raises on `apply`:
    SupersededByHost: MaxText's own source defines the value.
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

  def apply(self) -> None:
    from maxtext.common.common_types import DecoderBlockType

    if DECODER_BLOCK in DecoderBlockType._value2member_map_ or _MEMBER in DecoderBlockType._member_map_:
      if f'"{DECODER_BLOCK}"' in inspect.getsource(DecoderBlockType):
        raise SupersededByHost(f"this MaxText brings the decoder block '{DECODER_BLOCK}' itself")
      raise Conflict(f"the decoder block '{DECODER_BLOCK}' was already added to DecoderBlockType by another plugin")
    import aenum

    aenum.extend_enum(DecoderBlockType, _MEMBER, DECODER_BLOCK)
    self.patches.callback(functools.partial(_remove, DecoderBlockType))


def _remove(cls: Any) -> None:
  """Takes the member out of the enum again; the standard library keeps it in these four places."""
  cls._member_names_.remove(_MEMBER)
  del cls._member_map_[_MEMBER]
  del cls._value2member_map_[DECODER_BLOCK]
  if _MEMBER in cls.__dict__:
    type.__delattr__(cls, _MEMBER)
  types = sys.modules.get("maxtext.configs.types")
  if types is not None:  # its compiled schemas know the member
    rebuild(descendants(types, types.ModelArchitecture))
