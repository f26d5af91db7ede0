"""From `import maxtext` to an applied seam.

1. `startup.py` waits for the import of `maxtext`; then `discovery.py` calls `plugin.register`, hence `Registry.install`.
2. `install` asks wrapt to call us whenever one of the seams' modules of MaxText has been imported.
3. Then the seam's contract is checked; if it holds, `Seam.apply` changes MaxText through `Seam.patches`.
4. If it does not hold, or `apply` fails, this seam is undone, and all of them if every LING2 run needs it.
5. `RequestHook` notices when a process configures a LING2 model: modules that nobody has imported are imported, and a
   missing seam is an error; for a seam with a `use`, when a config that uses it is validated (`require_for`).

A process that never names a LING2 model gets one warning where all seams were undone, and an untouched MaxText.
"""

import functools
import importlib
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import wrapt

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host import request_hook
from maxtext_ling2.host.contract import ANOTHER_PLUGIN, Violation
from maxtext_ling2.host.patches import Conflict, SupersededByHost
from maxtext_ling2.host.reloads import ReloadFinder
from maxtext_ling2.host.request import mentions, requested_models
from maxtext_ling2.host.seam import Seam, State

logger = logging.getLogger("maxtext_ling2")


class Registry:
  """The seams of one plugin, and what becomes of them.

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
    self.request_hook = request_hook.RequestHook(names, self.require)
    self.violations: list[Violation] = []
    self.superseded_by: str | None = None
    self.tested = tuple(tested)
    self._warned: set[str] = set()
    self._installed = False
    self._reloads = ReloadFinder(self._modules(), self._on_reload)
    self._reloaded: str | None = None

  def _modules(self) -> set[str]:
    """Names of all modules of MaxText that the seams replace something in, or look at."""
    targets = (expectation.target for seam in self.seams for expectation in seam.expectations)
    looked_at = {target.partition(":")[0] for target in targets}
    return {request_hook.MODULE, *(seam.module for seam in self.seams), *looked_at}

  @property
  def usable(self) -> bool:
    """Whether the plugin's models can be used: no seam that all need has failed so far."""
    return self.superseded_by is None and not any(seam.is_core for seam in self._failed())

  def _failed(self) -> list[Seam]:
    return [seam for seam in self.seams if seam.state is State.FAILED]

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
    wrapt.register_post_import_hook(self._on_config_import, request_hook.MODULE)
    for seam in self.seams:
      wrapt.register_post_import_hook(functools.partial(self._on_import, seam), seam.module)

  def _on_config_import(self, module: ModuleType) -> None:
    self._reloads.imported.add(module.__name__)
    if self._installed:
      self.request_hook.apply(module)

  def _on_import(self, seam: Seam, module: ModuleType) -> None:
    self._reloads.imported.add(module.__name__)
    if self._installed:
      self._apply_once(seam)

  def _on_reload(self, module: ModuleType) -> None:
    """MaxText's configuration may be imported again; of other modules the classes in use would be the old ones."""
    applied = [seam for seam in self.seams if seam.state is State.APPLIED]
    if module.__name__ != request_hook.MODULE:
      if applied and self._reloaded is None:
        self._reloaded = module.__name__
      return
    self.request_hook.apply(module)
    for seam in applied:
      if seam.patches.replaces_in(module.__name__):
        seam.patches.undo()  # what it replaced in this module has gone already
        seam.state = State.WAITING
        self._apply_once(seam)

  def _apply_once(self, seam: Seam) -> None:
    """Applies `seam` if nobody tried it yet and no other seam took all back."""
    if self.usable and seam.state is State.WAITING:
      self._apply(seam)

  def _apply(self, seam: Seam) -> None:
    violations = seam.violations()
    if not self.usable:  # it imported the module of another seam, which did not fit
      return
    try:
      if not violations:
        seam.apply()
        seam.state = State.APPLIED
        return
    except SupersededByHost as reason:
      self._supersede(str(reason))
      return
    except Conflict as conflict:
      violations = [Violation(seam.name, "to be the only one who registers this", str(conflict), ANOTHER_PLUGIN)]
    except Exception as error:  # pylint: disable=broad-exception-caught
      # Whatever it is, MaxText must come out of it unharmed.
      violations = [Violation(seam.name, "to be applied without an error", f"{type(error).__name__}: {error}")]
    self._fail(seam, violations)
    if seam.required_in_this_process() and self._is_asked_for():
      raise self.error([seam])
    if seam.is_core:
      logger.warning("%s is switched off and MaxText left as it is: %s", self.plugin, self._reasons([seam]))

  def _is_asked_for(self) -> bool:
    """Whether the command line names one of the plugin's models."""
    try:
      return mentions(requested_models(sys.argv, {}, os.curdir), self.names)
    except OSError:  # a YAML file that cannot be read: MaxText says so
      return False

  def _fail(self, seam: Seam, violations: Iterable[Violation]) -> None:
    """Undoes a seam that does not fit, or all seams if every LING2 run needs it."""
    self.violations.extend(violations)
    self._undo(self.seams if seam.is_core else [seam])
    seam.state = State.FAILED

  def _supersede(self, reason: str) -> None:
    self.superseded_by = reason
    self._undo(self.seams)
    logger.warning("The plugin %s does nothing: %s.", self.plugin, reason)

  def _undo(self, seams: Sequence[Seam]) -> list[str]:
    conflicts = []
    for seam in reversed(seams):
      conflicts += seam.patches.undo()
      if seam.state is State.APPLIED:
        seam.state = State.UNDONE
    for conflict in conflicts:
      logger.warning("%s: %s", self.plugin, conflict)
    return conflicts

  def _reasons(self, seams: Iterable[Seam]) -> str:
    """Why seams failed and what to do."""
    names = {seam.name for seam in seams}
    violations = [violation for violation in self.violations if violation.seam in names]
    hints = dict.fromkeys(violation.hint for violation in violations)
    return f"{'; '.join(map(str, violations))}. Hint: {'; '.join(hints)}."

  def error(self, seams: Iterable[Seam]) -> Ling2Error:
    """The error for a process that asked for the plugin's models and needs these seams, which failed."""
    return Ling2Error(f"{self.plugin} cannot be enabled completely: {self._reasons(seams)}")

  def require(self) -> None:
    """Makes sure that every seam this process needs is in place; called when a LING2 model is asked for.

    Raises:
      Ling2Error: a seam does not fit; the text names seam, expected, found and what to do.
    """
    if self.superseded_by is not None:
      return
    self.complete(only_needed=True)
    failed = [seam for seam in self._failed() if seam.required_in_this_process()]
    if failed:
      raise self.error(failed)
    if self._reloaded is not None:
      raise Ling2Error(
        f"{self.plugin} was asked for, but {self._reloaded} was imported again after it had been extended, so that part "
        "of it is missing there; start a new process, and leave out importlib.reload"
      )
    self._check_version()

  def require_for(self, config: Any) -> None:
    """As `require`, also for the seams that a run with this config uses; called when a LING2 config is validated.

    Args:
      config: MaxText config of LING2.

    Raises:
      Ling2Error: a seam does not fit; the text also names the setting that needs it.
    """
    self.require()
    for seam in self._failed():
      if seam.use is not None and seam.use.applies(config):
        text = f"{self.plugin} cannot serve a run with {seam.use.setting}: {self._reasons([seam])}"
        if seam.use.essential:
          raise Ling2Error(f"{text} Or {seam.use.instead}.")
        self._warn_once(f"{text} The run computes the same, {seam.use.instead}.")

  def _check_version(self) -> None:
    """Says once that this MaxText was not tested, although the contracts that all runs need hold."""
    from maxtext.version import __version__ as found

    if found not in self.tested:
      self._warn_once(
        f"{self.plugin} was tested with MaxText {', '.join(self.tested)} and found {found}: every contract "
        "holds, so it goes on; compare numbers before you trust them."
      )

  def _warn_once(self, text: str) -> None:
    if text not in self._warned:
      self._warned.add(text)
      logger.warning("%s", text)

  def complete(self, only_needed: bool = False) -> None:
    """Applies the seams whose modules nobody has imported yet, by importing them."""
    for seam in self.seams:
      if self.usable and seam.state is State.WAITING and (not only_needed or seam.concerns_this_process()):
        try:
          importlib.import_module(seam.module)  # its hook applies the seam
        except Ling2Error:
          raise
        except Exception as error:  # whatever stops it, the user needs to know for which seam it was needed
          self._fail(seam, [Violation(seam.name, f"the module {seam.module}", f"{type(error).__name__}: {error}")])
        else:
          self._apply_once(seam)

  def undo(self) -> list[str]:
    """Takes everything back (tests); returns the conflicts in words. `install` then starts from nothing."""
    conflicts = self._undo(self.seams) + self.request_hook.patches.undo()
    for seam in self.seams:
      seam.state = State.WAITING
    self.violations, self.superseded_by, self._installed, self._reloaded = [], None, False, None
    self._warned.clear()
    if self._reloads in sys.meta_path:
      sys.meta_path.remove(self._reloads)
    return conflicts
