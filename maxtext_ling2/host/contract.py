"""What a seam needs from the installed MaxText, written so that a test and `doctor` can check it."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HINT = (
  "install a MaxText version this plugin was tested with, or a plugin version made for yours "
  "(`maxtext-ling2 doctor` lists both)"
)
ANOTHER_PLUGIN = "uninstall one of the two plugins, or let MAXTEXT_PLUGINS name the one that you want"


class _Missing:
  """Stands for an attribute that is not there."""


@dataclasses.dataclass(frozen=True)
class Expectation:
  """One object of MaxText that must exist, with the shape a seam relies on.

  Attributes:
    target: "package.module:dotted.attribute".
    parameters: names its signature must hold, in this order (others may stand between and after); None: no check.
    holds: further condition on the object; None: no check.
    meaning: the condition in words.
  """

  target: str
  parameters: tuple[str, ...] | None = None
  holds: Callable[[Any], bool] | None = None
  meaning: str = ""

  def expected(self) -> str:
    """The expectation in words."""
    words = f"{self.target}"
    if self.parameters is not None:
      words += f" taking ({', '.join(self.parameters)})"
    return f"{words}, {self.meaning}" if self.meaning else words

  def resolved(self) -> Any:
    """The object, or `_Missing`."""
    return resolve(self.target)

  def found(self) -> str | None:
    """What stands there instead, in words; None if the expectation is met. The module must be importable."""
    try:
      value = self.resolved()
    except Exception as error:  # pylint: disable=broad-exception-caught
      return f"the module does not import ({error})"
    if value is _Missing:
      return "nothing of that name"
    if self.parameters is not None:
      names = signature_names(value)
      if names is None or not _in_order(self.parameters, names):
        return f"{self.target} taking ({', '.join(names or ())})"
    if self.holds is not None and not _holds(self.holds, value):
      return f"{value!r:.200}, which does not satisfy the condition"
    return None


def expect(module: str, *signatures: str) -> tuple[Expectation, ...]:
  """Expectations of a module's functions and methods, "name(parameter, ...)", and of other things in it, "name"."""

  def expectation(signature: str) -> Expectation:
    name, bracket, inside = signature.removesuffix(")").partition("(")
    return Expectation(f"{module}:{name}", tuple(filter(None, inside.split(", "))) if bracket else None)

  return tuple(map(expectation, signatures))


@dataclasses.dataclass(frozen=True)
class CommandExpectation(Expectation):
  """A function of a module that runs as `__main__`, or is just being imported: it is looked up in the source.

  Importing a command to look at it would run it twice, or find it half imported.
  """

  def resolved(self) -> Any:
    """A function with the parameters of the one in the source, whose body only names what that one calls.

    `_Missing` if there is none.
    """
    module, _, name = self.target.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
      raise ImportError(f"no module named {module}")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
      if isinstance(node, ast.FunctionDef) and node.name == name:
        parameters = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
        called = sorted(
          {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls} - {""}
        )
        namespace: dict[str, Any] = {}
        exec(f"def {name}({', '.join(parameters)}):\n return ({''.join(f'{call}, ' for call in called)})", namespace)
        return namespace[name]
    return _Missing


@dataclasses.dataclass(frozen=True)
class Violation:
  """An expectation that the installed MaxText does not meet.

  Attributes:
    seam: name of the seam.
    expected: the expectation in words.
    found: what is there instead.
    hint: what to do.
  """

  seam: str
  expected: str
  found: str
  hint: str = HINT

  def __str__(self) -> str:
    return f"seam '{self.seam}': expected {self.expected}; found {self.found}"


def unmet(seam: str, expectations: Iterable[Expectation]) -> list[Violation]:
  """The expectations that the installed MaxText does not meet. Imports the modules concerned."""
  found = ((expectation, expectation.found()) for expectation in expectations)
  return [Violation(seam, expectation.expected(), text) for expectation, text in found if text is not None]


def resolve(target: str) -> Any:
  """Returns the object at "package.module:dotted.attribute", or `_Missing`."""
  module, _, path = target.partition(":")
  value: Any = importlib.import_module(module)
  for name in path.split("."):
    value = inspect.getattr_static(value, name, _Missing) if inspect.isclass(value) else getattr(value, name, _Missing)
    if value is _Missing:
      return _Missing
  return value


def signature_names(value: Any) -> list[str] | None:
  """Parameter names of a callable, without those a class or method binds by itself; None if it has no signature."""
  if isinstance(value, (staticmethod, classmethod)):
    value = value.__func__
  try:
    return [name for name in inspect.signature(value).parameters if name not in ("self", "cls")]
  except (TypeError, ValueError):
    return None


def _in_order(wanted: tuple[str, ...], names: list[str]) -> bool:
  """Whether `wanted` is a subsequence of `names`."""
  rest = iter(names)
  return all(name in rest for name in wanted)


def _holds(condition: Callable[[Any], bool], value: Any) -> bool:
  """Whether the condition is met; a condition that raises is not met."""
  try:
    return bool(condition(value))
  except Exception:  # pylint: disable=broad-exception-caught
    return False
