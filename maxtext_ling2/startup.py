"""The part that runs when an interpreter starts: wait for MaxText, then have its plugins loaded.

Stock MaxText loads no plugins, so this package brings the mechanism: a finder on ``sys.meta_path`` that does
nothing until ``maxtext`` is first imported. Every start of every interpreter in the environment pays for this
module. Hence it imports nothing that is not loaded anyway, and it is short: where no byte code may be written,
it is compiled each time. What happens later is in discovery.py.
"""

import _thread
import os
import sys

TYPE_CHECKING = False  # type checkers take it as true; importing `typing` would cost more than all the rest here
if TYPE_CHECKING:
  from collections.abc import Sequence
  from importlib.abc import Loader
  from importlib.machinery import ModuleSpec
  from types import ModuleType

HOST = "maxtext"
DISABLE_VARIABLE = "MAXTEXT_LING2_DISABLE"

found_by: str | None = None
"""How this process came to the plugin: "pth", "start", "import", or None where it is switched off."""


def disabled() -> bool:
  """Whether the environment switches this package off."""
  return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def install(how: str) -> None:
  """Load the plugins when ``maxtext`` is imported, or at once if it already is. Repeating it changes nothing.

  Args:
    how: who calls: "pth", "start" or "import".
  """
  global found_by
  if disabled():
    return
  # The .pth line imports this package to get here, so __init__ has said "import" a moment before it says "pth".
  if found_by in (None, "import"):
    found_by = how
  if _finder in sys.meta_path:  # still waiting, or `maxtext` is being executed right now
    return
  if HOST in sys.modules:
    _load_plugins()
  else:
    sys.meta_path.insert(0, _finder)


def install_from_start_file() -> None:
  """For Python 3.15 and later, which call what maxtext_ling2.start names and ignore our .pth line (PEP 829)."""
  install("start")


def _load_plugins() -> None:
  if disabled():  # since this module was imported
    return
  from maxtext_ling2.discovery import load_plugins

  load_plugins()


class _HostFinder:
  """Finds ``maxtext`` where the other finders do, and has the plugins loaded after it."""

  def __init__(self) -> None:
    self._asking: set[int] = set()  # the threads that are asking the other finders

  def find_spec(
    self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
  ) -> "ModuleSpec | None":
    thread = _thread.get_ident()
    # A finder of someone else that asks all finders in turn, as this one does, would otherwise ask us back, forever.
    if fullname != HOST or thread in self._asking:
      return None
    self._asking.add(thread)
    try:
      spec = self._ask_the_others(fullname, path, target)
    finally:
      self._asking.discard(thread)
    if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
      spec.loader = _HostLoader(spec.loader)  # type: ignore[assignment]  # it has whatever the real one has
    return spec

  def _ask_the_others(
    self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None"
  ) -> "ModuleSpec | None":
    for finder in list(sys.meta_path):
      if finder is not self and hasattr(finder, "find_spec"):
        spec = finder.find_spec(fullname, path, target)
        if spec is not None:
          return spec
    return None


class _HostLoader:
  """The real loader of ``maxtext``, and the plugins after it."""

  def __init__(self, loader: "Loader") -> None:
    self._loader = loader

  def __getattr__(self, name: str) -> object:
    return getattr(self._loader, name)

  def exec_module(self, module: "ModuleType") -> None:
    if getattr(module.__spec__, "loader", None) is self:  # the module shows its real loader, as without us
      module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr]
    self._loader.exec_module(module)
    _load_plugins()
    # Not sooner: a spec may be asked for and never executed, and an import that failed may be tried again. And a new
    # list: Python 3.12 lets other threads walk along the old one, and they would skip a finder if it lost one.
    sys.meta_path = [finder for finder in sys.meta_path if finder is not _finder]


_finder = _HostFinder()
