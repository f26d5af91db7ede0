"""MaxText as it might be one day: copies of the installed package in which something has another name.

Something is renamed in its module and wherever MaxText uses it, so that MaxText stays whole and only an outsider, as the
plugin is, misses it. The copy is a folder for sys.path in which changed files are real and all others links. A finder
that changes the source while it is imported would not do, because some contracts read the files.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

NEW = "_drifted"
"""What a new name ends with."""


def package() -> Path:
  """The folder of the installed package; MaxText itself is not imported."""
  (folder,) = importlib.util.find_spec("maxtext").submodule_search_locations
  return Path(folder)


class Sources:
  """The installed sources by module name, parsed when first needed."""

  def __init__(self):
    self.folder = package()
    self.texts, self.paths, self.trees = {}, {}, {}
    for path in self.folder.rglob("*.py"):
      parts = path.relative_to(self.folder.parent).with_suffix("").parts
      name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
      self.texts[name], self.paths[name] = path.read_bytes(), path

  def tree(self, module):
    if module not in self.trees:
      self.trees[module] = ast.parse(self.texts[module])
    return self.trees[module]

  def mentioning(self, word):
    """The modules in which a word stands, with their trees."""
    pattern = re.compile(rb"\b%s\b" % re.escape(word).encode())
    return [(module, self.tree(module)) for module, text in self.texts.items() if pattern.search(text)]


class Edits:
  """Replacements in one text, at the places that a syntax tree tells."""

  def __init__(self, text):
    self.text, self.places = text, {}
    self.lines = [0]
    for line in text.splitlines(keepends=True):
      self.lines.append(self.lines[-1] + len(line))

  def at(self, line, column, old, new):
    """Replaces `old`, which stands there or follows on the same line (after `def`, in `import a, old`)."""
    start = self.lines[line - 1] + column
    match = re.compile(rb"\b%s\b" % re.escape(old).encode()).search(self.text, start)
    self.places[match.start()] = (match.end(), new.encode())

  def result(self):
    text = self.text
    for start, (end, new) in sorted(self.places.items(), reverse=True):
      text = text[:start] + new + text[end:]
    return text


def renamed(sources, module, name):
  """{module: text} in which the global `name` of `module` has another name."""
  changed = {}
  for where, tree in sources.mentioning(name):
    edits = Edits(sources.texts[where])
    own = where == module
    handles = _names_of(module, tree)
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom):
        _rename_imported(edits, node, name, own, node.module == module)
      elif own and (_is_name(node, name) or _defines(node, name) and node in tree.body):
        edits.at(node.lineno, node.col_offset, name, name + NEW)
      elif isinstance(node, ast.Attribute) and node.attr == name and ast.unparse(node.value) in handles:
        edits.at(node.end_lineno, node.end_col_offset - len(name), name, name + NEW)
    if edits.places:
      changed[where] = edits.result()
  return changed


def _is_name(node, name):
  return isinstance(node, ast.Name) and node.id == name


def _defines(node, name):
  return isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name


def _names_of(module, tree):
  """The expressions by which a file refers to a module."""
  parent, _, leaf = module.rpartition(".")
  found = {module}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module == parent:
      found |= {alias.asname or leaf for alias in node.names if alias.name == leaf}
    if isinstance(node, ast.Import):
      found |= {alias.asname for alias in node.names if alias.name == module and alias.asname}
  return found


def _rename_imported(edits, node, name, own, from_module):
  """`from module import name` binds the old name elsewhere; in the module itself what is imported gets the new one."""
  for alias in node.names:
    if from_module and alias.name == name:
      new = name + NEW if alias.asname else f"{name}{NEW} as {name}"
      edits.at(alias.lineno, alias.col_offset, name, new)
    elif own and (alias.asname or alias.name) == name:
      edits.at(alias.lineno, alias.col_offset, name, f"{name} as {name}{NEW}" if not alias.asname else name + NEW)


def moved(sources, module):
  """{module: text} in which `module` has another last name; its own text stands under the new one."""
  parent, _, leaf = module.rpartition(".")
  dotted = re.compile(rb"\b%s\b" % re.escape(module).encode())
  changed = {}
  for where, tree in sources.mentioning(leaf):
    edits = Edits(sources.texts[where])
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom) and node.module == parent:
        for alias in node.names:
          if alias.name == leaf:
            edits.at(alias.lineno, alias.col_offset, leaf, leaf + NEW if alias.asname else f"{leaf}{NEW} as {leaf}")
    text = dotted.sub(f"{module}{NEW}".encode(), edits.result())
    if text != sources.texts[where]:
      changed[where] = text
  changed[module + NEW] = changed.pop(module, sources.texts[module])
  changed[module] = None
  return changed


def resigned(sources, module, path, parameter):
  """{module: text} in which a parameter of a function, method or class has another name, and so in its calls."""
  function = _definition(sources.tree(module), path.split("."))
  called = {path.rpartition(".")[2], *(path.split(".")[-2:-1] if path.endswith(".__init__") else ())} - {"__init__"}
  changed = {}
  for where, tree in sources.mentioning(parameter):
    edits = Edits(sources.texts[where])
    for node in _within(function) if where == module else ():
      if isinstance(node, ast.arg) and node.arg == parameter or _is_name(node, parameter):
        edits.at(node.lineno, node.col_offset, parameter, parameter + NEW)
    for node in ast.walk(tree):
      if isinstance(node, ast.Call) and called & {ast.unparse(node.func).rpartition(".")[2]}:
        for keyword in node.keywords:
          if keyword.arg == parameter:
            edits.at(keyword.lineno, keyword.col_offset, parameter, parameter + NEW)
    if edits.places:
      changed[where] = edits.result()
  return changed


def _definition(tree, path):
  """The function at a dotted path; of a class its __init__."""
  for name in path:
    (tree,) = [node for node in tree.body if _defines(node, name)]
  return _definition(tree, ["__init__"]) if isinstance(tree, ast.ClassDef) else tree


def _within(function) -> Iterator[ast.AST]:
  """The parameters and the body of a function; not its decorators, which do not see them."""
  for part in (function.args, *function.body):
    yield from ast.walk(part)


def plant(folder, sources, changed):
  """Writes the copy; `folder` is what belongs in sys.path."""
  folder.mkdir(parents=True)
  files = {}
  for module, text in changed.items():
    path = sources.paths.get(module) or sources.paths[module.removesuffix(NEW)].with_stem(module.rpartition(".")[2])
    files[path.relative_to(sources.folder.parent)] = text
  _link(sources.folder.parent, folder, Path("maxtext"), files)


def _link(source, target, path, files):
  """Links a folder whole, or what is in it where files below it are changed."""
  inside = {file: text for file, text in files.items() if path in file.parents}
  if not inside:
    (target / path).symlink_to(source / path)
    return
  (target / path).mkdir()
  for file, text in inside.items():
    if file.parent == path and text is not None:
      (target / file).write_bytes(text)
  for entry in (source / path).iterdir():
    child = path / entry.name
    if entry.is_dir():
      _link(source, target, child, files)
    elif child not in files:
      (target / child).symlink_to(entry)
