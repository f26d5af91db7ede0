"""Replacing attributes so that it can be undone, and noticing when somebody else replaced them too."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any


class Patches:
  """Attributes and mapping entries replaced by one seam, with what stood there before."""

  def __init__(self) -> None:
    self._undo: list[Callable[[], str | None]] = []
    self._owners: list[Any] = []

  def replaces_in(self, module: str) -> bool:
    """Whether an attribute of the module of this name itself is replaced."""
    return any(isinstance(owner, ModuleType) and owner.__name__ == module for owner in self._owners)

  def attribute(self, owner: Any, name: str, value: Any) -> None:
    """Sets `owner.name = value`, remembering what it replaces."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    self._owners.append(owner)

    def undo() -> str | None:
      current = getattr(owner, name, None)
      if current is not value:
        return f"{getattr(owner, '__name__', owner)}.{name} was replaced again by {party(current)}; left as it is"
      setattr(owner, name, original)
      return None

    self._undo.append(undo)

  def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces function `owner.name` by one that calls `wrapper(original, *args, **kwargs)`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
      return wrapper(original, *args, **kwargs)

    self.attribute(owner, name, replacement)

  def entry(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
    """Adds `mapping[key] = value`; the key must be new.

    Raises:
      Conflict: somebody else registered the key.
    """
    if key in mapping:
      raise Conflict(f"{key!r} is already registered, by {party(mapping[key])}")
    mapping[key] = value

    def undo() -> str | None:
      if mapping.get(key) is not value:
        return f"{key!r} was replaced by {party(mapping.get(key))}; left as it is"
      del mapping[key]
      return None

    self._undo.append(undo)

  def also(self, undo: Callable[[], str | None]) -> None:
    """Remembers one more action to undo; it returns a conflict in words, or None."""
    self._undo.append(undo)

  def undo(self) -> list[str]:
    """Restores everything, the last first; returns the conflicts in words."""
    conflicts = []
    self._owners.clear()
    while self._undo:
      conflict = self._undo.pop()()
      if conflict:
        conflicts.append(conflict)
    return conflicts


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
  """The arguments of a call by the names of MaxText's parameters, which may have others between one day."""
  return inspect.signature(function).bind(*args, **kwargs)


def running(function: str, names: Sequence[str]) -> dict[str, Any] | None:
  """Local variables of the innermost running function of this name that has them all, or None: none is running.

  For MaxText's commands that may run as `__main__`, whose attributes cannot be replaced.
  """
  frame: FrameType | None = sys._getframe(1)
  while frame is not None:
    if frame.f_code.co_name == function and all(name in frame.f_locals for name in names):
      return {name: frame.f_locals[name] for name in names}
    frame = frame.f_back
  return None


class Conflict(Exception):
  """Another party registered the same thing first; the text names it."""


class StandDown(Exception):
  """MaxText brings LING2 itself."""


def party(value: Any) -> str:
  """The name of whoever defined `value`, as well as it can be told."""
  module = getattr(value, "__module__", None) or getattr(type(value), "__module__", None) or "an unknown module"
  return f"'{module}'"
