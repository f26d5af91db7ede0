"""No module of the package imports, when it is itself imported, one that imports it."""

import ast
from pathlib import Path

import maxtext_ling2

PACKAGE = Path(maxtext_ling2.__file__).parent


def modules():
  """The files of the package by module name."""
  found = {}
  for path in PACKAGE.rglob("*.py"):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return found


def statements(body):
  """The statements that run at import, but for those only for type checkers."""
  for node in body:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
      continue
    yield node
    for part in ("body", "orelse", "finalbody"):
      if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from statements(getattr(node, part, ()))


def imported(tree, known):
  """The modules of the package that are imported with a module; not the packages that they are in."""
  for node in statements(tree.body):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom) and node.module in known:
      inside = [f"{node.module}.{alias.name}" for alias in node.names]
      yield from (name if name in known else node.module for name in inside)


def circle(graph):
  """Modules that import each other in a ring, or None."""
  done, path = set(), []

  def visit(name):
    if name in path:
      return [*path[path.index(name) :], name]
    if name in done:
      return None
    path.append(name)
    found = next(filter(None, map(visit, sorted(graph[name]))), None)
    path.pop()
    done.add(name)
    return found

  return next(filter(None, map(visit, sorted(graph))), None)


def test_a_circle_is_found():
  assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
  assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_the_package_has_none():
  known = modules()
  graph = {name: set(imported(ast.parse(path.read_text()), known)) for name, path in known.items()}
  assert len(graph) > 100 and "maxtext_ling2.startup" in graph["maxtext_ling2"]
  assert circle(graph) is None


def test_start_up_and_command_line_import_each_other_nowhere():
  """In functions, too: what one of them imports when it is needed does not import it."""
  known = modules()
  names = [f"maxtext_ling2.{name}" for name in ("startup", "discovery", "run_module", "cli", "__main__")]
  graph = {}
  for name in names:
    nodes = ast.walk(ast.parse(known[name].read_text()))
    body = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    graph[name] = set(imported(ast.Module(body, []), known)) & set(names)
  assert graph["maxtext_ling2.startup"] == {"maxtext_ling2.discovery"}
  assert circle(graph) is None
