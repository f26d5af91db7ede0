"""Applies all seams or none.

MaxText's modules are imported one after the other, so the seams are applied one after the other too, each when its
module has just been imported. The first seam that does not fit undoes all of them. What happens then depends on who
asks: a process that never names a LING2 model gets one warning and an untouched MaxText; one that does gets an error.
"""

import abc
import enum
import functools
import importlib
import logging
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import ClassVar

import wrapt

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host import guard as guard_module
from maxtext_ling2.host.contract import Breach, Expectation
from maxtext_ling2.host.patches import Conflict, Patches, StandDown
from maxtext_ling2.host.reloads import ReloadFinder
from maxtext_ling2.host.request import FIELDS

logger = logging.getLogger("maxtext_ling2")

WAY_OUT = (
  "install a MaxText version this plugin was tested with, or a plugin version made for yours "
  "(`maxtext-ling2 doctor` lists both)"
)


class State(enum.Enum):
  """Where a seam stands."""

  WAITING = "waiting for its module"
  APPLIED = "applied"
  FAILED = "does not fit"
  UNDONE = "undone"


class Seam(abc.ABC):
  """One place where MaxText is extended.

  Attributes:
    name: short name for messages.
    module: the MaxText module after whose import the seam is applied.
    needed_for_training: whether a LING2 training run is incomplete without it (conversion tables are not). If not,
      the commands of its module's package (maxtext.checkpoint_conversion, maxtext.inference) need it.
    expectations: the contract with MaxText.
  """

  name: ClassVar[str]
  module: ClassVar[str]
  needed_for_training: ClassVar[bool] = True
  expectations: tuple[Expectation, ...] = ()

  def __init__(self) -> None:
    self.state = State.WAITING
    self.patches = Patches()

  def breaches(self) -> list[Breach]:
    """The expectations that the installed MaxText does not meet. Imports the modules concerned."""
    found = ((expectation, expectation.found()) for expectation in self.expectations)
    return [Breach(self.name, expectation.expected(), text) for expectation, text in found if text is not None]

  @abc.abstractmethod
  def apply(self) -> None:
    """Extends MaxText through `self.patches`. May raise Conflict or StandDown."""


class Registry:
  """The seams of one plugin, and their common fate.

  Args:
    plugin: name for messages.
    seams: in the order in which MaxText imports their modules.
    names: the model names and decoder blocks that ask for the plugin.
    tested: the MaxText versions the seams were tested with; with another one the contracts decide.
  """

  def __init__(self, plugin: str, seams: Sequence[Seam], names: Sequence[str], tested: Sequence[str]):
    self.plugin = plugin
    self.seams = tuple(seams)
    self.names = tuple(names)
    self.guard = guard_module.Guard(names, self.require)
    self.breaches: list[Breach] = []
    self.stood_down: str | None = None
    self.tested = tuple(tested)
    self._version_checked = False
    self._installed = False
    self._reloads = ReloadFinder(self._modules(), self._on_reload)
    self._reloaded: str | None = None

  def _modules(self) -> set[str]:
    """Names of all modules of MaxText that the seams replace something in, or look at."""
    targets = (expectation.target for seam in self.seams for expectation in seam.expectations)
    looked_at = {target.partition(":")[0] for target in targets}
    return {guard_module.MODULE, *(seam.module for seam in self.seams), *looked_at}

  @property
  def usable(self) -> bool:
    """Whether nothing has gone wrong so far."""
    return not self.breaches and self.stood_down is None

  @property
  def installed(self) -> bool:
    """Whether `install` was called, that is, whether the plugin was loaded in this process."""
    return self._installed

  def install(self) -> None:
    """Arranges for each seam to be applied when its module is imported. Idempotent."""
    if self._installed:
      return
    self._installed = True
    sys.meta_path.insert(0, self._reloads)
    wrapt.register_post_import_hook(self._on_guard_import, guard_module.MODULE)
    for seam in self.seams:
      wrapt.register_post_import_hook(functools.partial(self._on_import, seam), seam.module)

  def _on_guard_import(self, module: ModuleType) -> None:
    self._reloads.imported.add(module.__name__)
    if self._installed:
      self.guard.apply(module)

  def _on_import(self, seam: Seam, module: ModuleType) -> None:
    self._reloads.imported.add(module.__name__)
    if self._installed:
      self._apply_once(seam)

  def _on_reload(self, module: ModuleType) -> None:
    """MaxText's configuration may be imported again; of other modules the classes in use would be the old ones."""
    applied = [seam for seam in self.seams if seam.state is State.APPLIED]
    if module.__name__ != guard_module.MODULE:
      if applied and self._reloaded is None:
        self._reloaded = module.__name__
      return
    self.guard.apply(module)
    for seam in applied:
      if seam.patches.replaces_in(module.__name__):
        seam.patches.undo()  # what it replaced in this module has gone already
        seam.state = State.WAITING
        self._apply_once(seam)

  def _apply_once(self, seam: Seam) -> None:
    """Applies `seam` if all went well so far and nobody did it yet."""
    if self.usable and seam.state is not State.APPLIED:
      self._apply(seam)

  def _apply(self, seam: Seam) -> None:
    breaches = seam.breaches()
    if not self.usable:  # it imported the module of another seam, which did not fit
      return
    if breaches:
      self._fail(seam, breaches)
      return
    try:
      seam.apply()
      seam.state = State.APPLIED
    except StandDown as reason:
      self._stand_down(str(reason))
    except Conflict as conflict:
      self._fail(seam, [Breach(seam.name, "to be the only one who registers this", str(conflict))])
    except Exception as error:  # pylint: disable=broad-exception-caught
      # Whatever it is, MaxText must come out of it unharmed.
      self._fail(seam, [Breach(seam.name, "to be applied without an error", f"{type(error).__name__}: {error}")])

  def _fail(self, seam: Seam, breaches: Iterable[Breach]) -> None:
    self.breaches.extend(breaches)
    self._undo_all()
    seam.state = State.FAILED
    if command_line_asks_for(self.names):
      raise self.error()
    logger.warning(
      "%s is switched off and MaxText left as it is: %s. Way out: %s.", self.plugin, self._reasons(), WAY_OUT
    )

  def _stand_down(self, reason: str) -> None:
    self.stood_down = reason
    self._undo_all()
    logger.warning("The plugin %s stands down: %s.", self.plugin, reason)

  def _undo_all(self) -> list[str]:
    conflicts = []
    for seam in reversed(self.seams):
      conflicts += seam.patches.undo()
      if seam.state is State.APPLIED:
        seam.state = State.UNDONE
    for conflict in conflicts:
      logger.warning("%s: %s", self.plugin, conflict)
    return conflicts

  def _reasons(self) -> str:
    return "; ".join(str(breach) for breach in self.breaches)

  def error(self) -> Ling2Error:
    """The error for a process that asked for the plugin's models."""
    return Ling2Error(f"{self.plugin} was asked for but cannot be had whole: {self._reasons()}. Way out: {WAY_OUT}.")

  def require(self) -> None:
    """Makes sure that every seam this process needs is in place; called when a LING2 model is asked for.

    Raises:
      Ling2Error: a seam does not fit; the text names seam, expected, found and the way out.
    """
    if self.stood_down is not None:
      return
    self.complete(only_needed=True)
    if self.breaches:
      raise self.error()
    if self._reloaded is not None:
      raise Ling2Error(
        f"{self.plugin} was asked for, but {self._reloaded} was imported again after it had been extended, so that part "
        "of it is missing there; start a new process, and leave out importlib.reload"
      )
    self._check_version()

  def _check_version(self) -> None:
    """Says once that this MaxText was not tested, where all contracts hold all the same."""
    if self._version_checked:
      return
    self._version_checked = True
    from maxtext.version import __version__ as found

    if found not in self.tested:
      logger.warning(
        "%s was tested with MaxText %s and found %s: every contract holds, so it goes on; compare numbers before you "
        "trust them.",
        self.plugin,
        ", ".join(self.tested),
        found,
      )

  def complete(self, only_needed: bool = False) -> None:
    """Applies the seams whose modules nobody has imported yet, by importing them."""
    for seam in self.seams:
      if self.usable and seam.state is not State.APPLIED and (not only_needed or needed_here(seam)):
        try:
          importlib.import_module(seam.module)  # its hook applies the seam
        except Ling2Error:
          raise
        except Exception as error:  # whatever stops it, the user needs to know for which seam it was needed
          self.breaches.append(Breach(seam.name, f"the module {seam.module}", f"{type(error).__name__}: {error}"))
          self._undo_all()
          seam.state = State.FAILED
          return
        self._apply_once(seam)

  def undo(self) -> list[str]:
    """Takes everything back (tests); returns the conflicts in words. `install` starts anew."""
    conflicts = self._undo_all() + self.guard.patches.undo()
    for seam in self.seams:
      seam.state = State.WAITING
    self.breaches, self.stood_down, self._installed, self._version_checked = [], None, False, False
    self._reloaded = None
    if self._reloads in sys.meta_path:
      sys.meta_path.remove(self._reloads)
    return conflicts


def needed_here(seam: Seam) -> bool:
  """Whether a LING2 run of this process is incomplete without the seam."""
  if seam.needed_for_training:
    return True
  command = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "")  # of `python -m`
  return command.startswith(".".join(seam.module.split(".")[:2]) + ".")


def command_line_asks_for(names: Iterable[str]) -> bool:
  """Whether this process's command line sets `model_name` or `decoder_block` to one of `names`."""
  wanted = {f"{field}={name}" for field in FIELDS for name in names}
  return any(argument.replace("'", "").replace('"', "") in wanted for argument in sys.argv[1:])
