"""Notices, at MaxText's public configuration calls, that a process asks for the plugin's models.

It stays in place when the seams were taken back: then it is what turns "MaxText does not know this model" into an error
that names the seam which does not fit. For every other call it passes straight through.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from maxtext_ling2.host.patches import Patches
from maxtext_ling2.host.request import mentions, requested_models

MODULE = "maxtext.configs.pyconfig"
_CALLS = ("initialize", "initialize_pydantic")


class RequestHook:
  """Calls `on_request` before MaxText configures one of the models or decoder blocks `names`."""

  def __init__(self, names: Sequence[str], on_request: Callable[[], None]):
    self.names = tuple(names)
    self.on_request = on_request
    self.patches = Patches()

  def apply(self, module: ModuleType) -> None:
    """Wraps those of MaxText's configuration calls that exist, once."""
    self.patches.undo()
    self._configs_folder = str(getattr(module, "MAXTEXT_CONFIGS_DIR", ""))
    for call in _CALLS:
      if callable(getattr(module, call, None)):
        self.patches.wrap(module, call, self._pass)

  def _pass(self, original: Callable[..., Any], argv: list[str] | None = None, *args: Any, **kwargs: Any) -> Any:
    if mentions(requested_models(argv, kwargs, self._configs_folder), self.names):
      self.on_request()
    return original(argv, *args, **kwargs)
