"""Notices that a module is imported again: `importlib.reload`, or an import after it was taken out of `sys.modules`.

Its functions are MaxText's own then, whatever had been replaced in it before.
"""

import importlib.abc
import sys
from collections.abc import Callable, Container, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class ReloadFinder(importlib.abc.MetaPathFinder):
  """Calls `on_reload(module)` after a module of `names` was executed again; finds nothing itself.

  Args:
    names: full names of modules.
    on_reload: gets the module.
  """

  def __init__(self, names: Container[str], on_reload: Callable[[ModuleType], None]):
    self.names = names
    self.on_reload = on_reload
    self.imported: set[str] = set()
    """Names of modules that were imported before, so that a further import is one too many."""

  def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
    """The spec that the other finders have, whose loader reports; None at a first import."""
    again = target is not None or fullname in self.imported  # only `reload` passes a target
    if not again or fullname not in self.names:
      return None
    for finder in sys.meta_path:
      if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
        self._report(spec)
        return spec
    return None

  def _report(self, spec: ModuleSpec) -> None:
    loader = spec.loader
    if loader is None:
      return
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
      execute(module)
      self.on_reload(module)

    vars(loader)["exec_module"] = exec_module  # of this loader alone: each spec has its own
