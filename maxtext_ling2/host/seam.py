"""What a seam is: one place where MaxText is extended, and which LING2 runs need it."""

import dataclasses
import enum
import functools
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, ClassVar

from maxtext_ling2.host.contract import Expectation, Violation, unmet
from maxtext_ling2.host.patches import Call, Patches

type Handlers = Mapping[str, Callable[[Call], Any]]


class State(enum.Enum):
  """Whether a seam is applied."""

  WAITING = "waiting for its module"
  APPLIED = "applied"
  FAILED = "does not fit"
  UNDONE = "undone"


@dataclasses.dataclass(frozen=True)
class Use:
  """Which LING2 runs need a seam that others can do without.

  Attributes:
    setting: what these runs have in their config, in words.
    applies: whether a MaxText config of LING2 is one of them.
    instead: how to go on without the seam, as an instruction.
    essential: whether such a run must stop without the seam. False: it computes the same, and only a warning is given.
  """

  setting: str
  applies: Callable[[Any], bool]
  instead: str
  essential: bool = True


def _is_running(package: str) -> bool:
  """Whether a function of a package of MaxText is running: a command that was called, or run as a file."""
  frame: FrameType | None = sys._getframe(1)
  while frame is not None:
    names = frame.f_globals
    file = str(names.get("__file__", "")) if names.get("__name__") == "__main__" else ""
    if str(names.get("__name__", "")).startswith(package) or f"/{package.replace('.', '/')}" in file:
      return True
    frame = frame.f_back
  return False


class Seam:
  """One place where MaxText is extended.

  Attributes:
    name: short name for messages.
    module: the MaxText module after whose import the seam is applied.
    needed_for_training: whether LING2 training runs need it (conversion tables are not). If not, the commands of its
      module's package (maxtext.checkpoint_conversion, maxtext.inference) need it.
    use: which training runs need it; None: all.
    expectations: the contract with MaxText.
  """

  name: ClassVar[str]
  module: ClassVar[str]
  needed_for_training: ClassVar[bool] = True
  use: ClassVar[Use | None] = None
  expectations: tuple[Expectation, ...] = ()

  def __init__(self) -> None:
    self.state = State.WAITING
    self.patches = Patches()

  @property
  def is_core(self) -> bool:
    """Whether every LING2 run needs the seam, so that none works without it."""
    return self.needed_for_training and self.use is None

  def concerns_this_process(self) -> bool:
    """Whether this process can train a LING2 model that needs the seam, or runs one of the commands that need it."""
    if self.needed_for_training:
      return True
    package = ".".join(self.module.split(".")[:2]) + "."
    command = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "")  # of `python -m`
    return command.startswith(package) or _is_running(package)

  def required_in_this_process(self) -> bool:
    """Whether no LING2 model can be used in this process without the seam, whatever its config."""
    return self.use is None and self.concerns_this_process()

  def violations(self) -> list[Violation]:
    """The expectations that the installed MaxText does not meet. Imports the modules concerned."""
    return unmet(self.name, self.expectations)

  def handlers(self) -> Handlers:
    """What answers calls of functions and methods of `module`, by name, for a LING2 config."""
    return {}

  def apply(self) -> None:
    """Extends MaxText through `self.patches`. May raise Conflict or SupersededByHost."""
    for path, handler in self.handlers().items():
      *owners, name = path.split(".")
      self.patches.wrap_for_ling2(functools.reduce(getattr, owners, sys.modules[self.module]), name, handler)
