"""Replacing attributes so that it can be undone, and noticing when somebody else replaced them too."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any

from maxtext_ling2.configs.validation import is_ling2

_CONFIGS = ("config", "mt_config")
"""MaxText's names of the parameter that is a config."""


class Call:
  """A call of a function of MaxText, whose arguments are read and set by the names of MaxText's parameters.

  So it does not matter how they are passed, nor which further parameters a MaxText has.
  """

  def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
    self.function = function
    self._args, self._kwargs = args, kwargs
    # The metaclass of Flax's modules hides the parameters of their __init__.
    initialises = isinstance(function, type)
    signature = inspect.signature(function.__init__ if initialises else function)
    parameters = list(signature.parameters.values())[1 if initialises else 0 :]
    self._bound = signature.replace(parameters=parameters).bind(*args, **kwargs)

  def __getitem__(self, name: str) -> Any:
    return self._bound.arguments[name]

  def get(self, name: str, default: Any) -> Any:
    """An argument, or `default` if it is not passed."""
    return self._bound.arguments.get(name, default)

  def __setitem__(self, name: str, value: Any) -> None:
    self._bound.arguments[name] = value
    self._args, self._kwargs = self._bound.args, self._bound.kwargs

  @property
  def config(self) -> Any:
    """The argument `config` or `mt_config`, or the `config` of `self`; None if there is none."""
    arguments = self._bound.arguments
    found = next((arguments[name] for name in _CONFIGS if name in arguments), None)
    return found if found is not None else getattr(arguments.get("self"), "config", None)

  def to(self, function: Callable[..., Any]) -> Any:
    """Calls another function with these arguments."""
    return function(*self._args, **self._kwargs)

  def original(self) -> Any:
    """Calls MaxText's function."""
    return self.to(self.function)


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
        return f"{getattr(owner, '__name__', owner)}.{name} was replaced again by {origin(current)}; left as it is"
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

  def wrap_for_ling2(self, owner: Any, name: str, handler: Callable[[Call], Any]) -> None:
    """Replaces function `owner.name` by one that answers calls for a LING2 config with `handler(call)`."""

    def dispatch(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
      call = Call(original, args, kwargs)
      ours = call.config is not None and is_ling2(call.config)
      return handler(call) if ours else original(*args, **kwargs)

    self.wrap(owner, name, dispatch)

  def item(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
    """Sets `mapping[key] = value`, remembering what it replaces, if anything."""
    before = {key: mapping[key]} if key in mapping else {}
    mapping[key] = value

    def undo() -> None:
      mapping.update(before)  # in its place: the order may matter
      if not before:
        del mapping[key]

    self._undo.append(undo)

  def entry(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
    """Adds `mapping[key] = value`; the key must be new.

    Raises:
      Conflict: somebody else registered the key.
    """
    if key in mapping:
      raise Conflict(f"{key!r} is already registered, by {origin(mapping[key])}")
    mapping[key] = value

    def undo() -> str | None:
      if mapping.get(key) is not value:
        return f"{key!r} was replaced by {origin(mapping.get(key))}; left as it is"
      del mapping[key]
      return None

    self._undo.append(undo)

  def callback(self, undo: Callable[[], str | None]) -> None:
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


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
  """Lets a function of MaxText that is called meanwhile find other values of attributes that `owner` has."""
  originals = {name: getattr(owner, name) for name in values}
  try:
    for name, value in values.items():
      setattr(owner, name, value)
    yield
  finally:
    for name, value in originals.items():
      setattr(owner, name, value)


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
  """Another plugin registered the same thing first; the text names it."""


class SupersededByHost(Exception):
  """MaxText brings LING2 itself."""


def origin(value: Any) -> str:
  """The name of whoever defined `value`, as well as it can be told."""
  module = getattr(value, "__module__", None) or getattr(type(value), "__module__", None) or "an unknown module"
  return f"'{module}'"
