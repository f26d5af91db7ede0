"""Loads the plugins that installed distributions offer to MaxText: the entry points of the group `maxtext.plugins`.

Runs once, right after `maxtext` was imported and before anything of it is used. A plugin that fails is left out, with a
warning that names it. Only an error with the attribute `fatal = True` goes through: by it a plugin says that going on
without it would be worse than stopping.
"""

import _thread
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Literal

GROUP = "maxtext.plugins"
ALLOW_VARIABLE = "MAXTEXT_PLUGINS"
OWN_ENTRY = EntryPoint("ling2", "maxtext_ling2.plugin:register", GROUP)
"""Ours as pyproject.toml declares it, for a source folder on PYTHONPATH, which has no metadata."""

# The thread that gets this loads the plugins, and no other waits: that could deadlock with Python's import locks.
_claim = _thread.allocate_lock()

State = Literal["loaded", "skipped", "failed"]


class PluginWarning(RuntimeWarning):
  """A MaxText plugin is not active, though it is installed or was asked for."""


@dataclass(frozen=True)
class PluginRecord:
  """What became of one entry point of the group.

  Attributes:
    name: its name, which `MAXTEXT_PLUGINS` uses.
    value: what it refers to, as `module:function`.
    distribution: the name of the distribution that offers it; None for our own entry where none does.
    version: the version of that distribution.
    location: the folder that holds the distribution's metadata.
    state: "loaded", "skipped" (`MAXTEXT_PLUGINS` does not name it) or "failed".
    reason: why it was skipped, or the error with which it failed.
  """

  name: str
  value: str
  distribution: str | None
  version: str | None
  location: str | None
  state: State
  reason: str | None = None


plugins: list[PluginRecord] = []
"""Every entry point that was found, in the order in which they were loaded. Empty before `maxtext` is imported."""


def load_plugins() -> None:
  """Load all plugins that are installed and allowed. Only the first call in a process does something."""
  if not _claim.acquire(blocking=False):
    return
  plugins[:] = [record for record in plugins if record.state == "loaded"]  # by an attempt that ended in a fatal error
  problems: list[str] = []
  try:
    entries = _entries(problems)
    allowed = _allowed({entry.name for entry in entries}, problems)
    for entry in entries:
      if any((record.name, record.value) == (entry.name, entry.value) for record in plugins):
        continue
      if allowed is None or entry.name in allowed:
        _load(entry, problems)
      else:
        _note(entry, "skipped", f"{ALLOW_VARIABLE} does not name it")
  except BaseException:  # a fatal one: the import of `maxtext` fails with it, and the next import has to meet it again
    _claim.release()
    raise
  for problem in problems:  # last of all: where a filter turns warnings into errors, the plugins are loaded already
    warnings.warn(problem, PluginWarning, stacklevel=2)


def _load(entry: EntryPoint, problems: list[str]) -> None:
  """Import and call one plugin."""
  try:
    entry.load()()
  except (Exception, SystemExit) as error:
    record = _note(entry, "failed", f"{type(error).__name__}: {error}")
    if getattr(error, "fatal", False) is True:
      raise
    origin = f"{record.distribution or 'no distribution'} {record.version or ''}".rstrip()
    problems.append(
      f"The MaxText plugin {entry.name!r} ({entry.value}, from {origin} in {record.location}) is not active, because "
      f"loading it failed with {record.reason}. MaxText goes on without it. Repair or uninstall "
      f"{record.distribution or entry.value}, or set {ALLOW_VARIABLE} to the names of the plugins to load."
    )
  else:
    _note(entry, "loaded")


def _note(entry: EntryPoint, state: State, reason: str | None = None) -> PluginRecord:
  name = version = None
  location = os.path.dirname(__file__)
  if entry.dist is not None:
    name, version, location = _name(entry.dist), entry.dist.version, _location(entry.dist)
  plugins.append(PluginRecord(entry.name, entry.value, name, version, location, state, reason))
  return plugins[-1]


def _allowed(known: set[str], problems: list[str]) -> set[str] | None:
  """The names that the environment allows; None if it does not say."""
  text = os.environ.get(ALLOW_VARIABLE)
  if text is None:
    return None
  allowed = {name.strip() for name in text.split(",")} - {""}
  if unknown := sorted(allowed - known):
    problems.append(
      f"{ALLOW_VARIABLE} names {', '.join(map(repr, unknown))}, but no installed distribution offers such a MaxText "
      f"plugin; known: {', '.join(map(repr, sorted(known)))}. Correct the name, or install the plugin."
    )
  return allowed


def _entries(problems: list[str]) -> list[EntryPoint]:
  """The entry points of the group by (name, value), each once, with ours even if no distribution offers it."""
  found: dict[tuple[str, str], EntryPoint] = {}
  homes: dict[str, str] = {}
  for distribution in _distributions(problems):
    try:
      text = distribution.read_text("entry_points.txt")
      if not text or GROUP not in text:  # parsing it for each of some hundred distributions would take its time
        continue
      # Of one distribution in two folders of sys.path the first hides the other, as for imports.
      if homes.setdefault(_name(distribution), _location(distribution)) == _location(distribution):
        for entry in distribution.entry_points.select(group=GROUP):
          found.setdefault((entry.name, entry.value), entry)
    except Exception as error:
      folder = getattr(distribution, "_path", "an unknown folder")  # without a name it has no public one
      problems.append(
        f"The MaxText plugins of the distribution in {folder} are not active, because its metadata cannot be read: "
        f"{error!r}. Install it again, or remove that folder."
      )
  found.setdefault((OWN_ENTRY.name, OWN_ENTRY.value), OWN_ENTRY)
  return [found[key] for key in sorted(found)]


def _distributions(problems: list[str]) -> Iterator[Distribution]:
  """All installed distributions, as far as the finders of all packages can list them."""
  try:
    # Imports pass over whatever else is in sys.path; importlib.metadata does not.
    yield from distributions(path=[entry for entry in sys.path if isinstance(entry, str)])
  except Exception as error:
    problems.append(
      f"Some MaxText plugins may not be active, because listing the installed distributions failed with {error!r}. "
      f"The traceback of `python -c 'import importlib.metadata as m; list(m.distributions())'` shows whose fault it is."
    )


def _name(distribution: Distribution) -> str:
  return distribution.metadata["Name"].lower().replace("_", "-").replace(".", "-")


def _location(distribution: Distribution) -> str:
  return os.path.realpath(str(distribution.locate_file("")))
