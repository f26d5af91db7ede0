"""Everything of MaxText that this package names, read from its syntax trees: what the contracts have to cover.

A symbol is "module:name", or "module:Class.method" where a class of ours overrides a method or calls it by super().
"""

import ast
import importlib.util
from pathlib import Path

import maxtext_ling2

PACKAGE = Path(maxtext_ling2.__file__).parent
MAXTEXT = Path(importlib.util.find_spec("maxtext").origin).parent


def file_of(module):
  """The source of a module of MaxText, or None: there is no such module."""
  path = MAXTEXT.joinpath(*module.split(".")[1:])
  return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


class File(ast.NodeVisitor):
  """The symbols of one file of ours."""

  def __init__(self, path):
    self.modules = {}  # name here -> module of MaxText
    self.names = {}  # name here -> symbol
    self.found = {}  # symbol -> lines
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
      self._take_imports(node)
    self.visit(tree)

  def _take_imports(self, node):
    if isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.split(".")[0] == "maxtext":
          self.modules[alias.asname or alias.name] = alias.name
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "maxtext":
      for alias in node.names:
        module = f"{node.module}.{alias.name}"
        if file_of(module) or (MAXTEXT.joinpath(*module.split(".")[1:])).is_dir():
          self.modules[alias.asname or alias.name] = module
        else:
          symbol = f"{node.module}:{alias.name}"
          self.names[alias.asname or alias.name] = symbol
          self.found.setdefault(symbol, []).append(node.lineno)

  def symbol(self, node):
    """The symbol that an expression names, or None."""
    if isinstance(node, ast.Name):
      return self.names.get(node.id)
    if isinstance(node, ast.Attribute):
      text = ast.unparse(node.value)
      if text in self.modules and not file_of(f"{self.modules[text]}.{node.attr}"):
        return f"{self.modules[text]}:{node.attr}"
    return None

  def visit_Attribute(self, node):
    if (symbol := self.symbol(node)) is not None:
      self.found.setdefault(symbol, []).append(node.lineno)
    self.generic_visit(node)

  def visit_ClassDef(self, node):
    for base in filter(None, map(self.symbol, node.bases)):
      known = methods(base)
      for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name in known:
          self.found.setdefault(f"{base}.{item.name}", []).append(item.lineno)
      for call in ast.walk(node):
        if isinstance(call, ast.Attribute) and ast.unparse(call.value) == "super()" and call.attr in known:
          self.found.setdefault(f"{base}.{call.attr}", []).append(call.lineno)
        own = isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "self"
        if own and call.attr in known:
          self.found.setdefault(f"{base}.{call.attr}", []).append(call.lineno)
    self.generic_visit(node)


def methods(symbol):
  """Names of the methods that a class of MaxText defines itself; of its bases only those of MaxText in the same file."""
  module, _, name = symbol.partition(":")
  tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
  classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
  found, waiting = set(), [name]
  while waiting:
    cls = classes.get(waiting.pop())
    if cls is not None:
      found |= {item.name for item in cls.body if isinstance(item, ast.FunctionDef)}
      waiting += [base.id for base in cls.bases if isinstance(base, ast.Name)]
  return found


def used():
  """{symbol: ["file:line", ...]} of the whole package."""
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    for symbol, lines in File(path).found.items():
      found.setdefault(symbol, []).extend(f"{path.relative_to(PACKAGE)}:{line}" for line in lines)
  return found
