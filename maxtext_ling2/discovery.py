"""Loads the plugins that installed distributions offer to MaxText: the entry points of the group ``maxtext.plugins``.

Runs once, right after ``maxtext`` was imported and before anything of it is used. No plugin can take MaxText or
another plugin down: what fails is named in a warning and left out. Only an error with the attribute ``fatal = True``
goes through: by it a plugin says that going on without it would be worse than stopping.
"""

import _thread
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Literal

from maxtext_ling2.startup import disabled

GROUP = "maxtext.plugins"
ALLOW_VARIABLE = "MAXTEXT_PLUGINS"
OWN_ENTRY = EntryPoint("ling2", "maxtext_ling2.plugin:register", GROUP)
"""Ours as pyproject.toml declares it, for a source folder on PYTHONPATH, which has no metadata."""

# Whoever gets this loads the plugins, and nobody waits for it: a wait could deadlock with Python's import locks.
_claim = _thread.allocate_lock()

State = Literal["loaded", "skipped", "failed"]


class PluginWarning(RuntimeWarning):
  """A MaxText plugin is not active, though it is installed or was asked for."""


@dataclass(frozen=True)
class PluginRecord:
  """What became of one entry point of the group.

  Attributes:
    name: its name, which ``MAXTEXT_PLUGINS`` uses.
    value: what it refers to, as ``module:function``.
    distribution: who offers it; None for our own entry where no distribution does.
    version: the version of that distribution.
    location: the folder that holds the distribution's metadata.
    state: "loaded", "skipped" (not allowed, or a repetition) or "failed".
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
"""Every entry point that was found, in the order in which they were loaded. Empty before ``maxtext`` is imported."""


@dataclass(frozen=True)
class _Offer:
  """An entry point and the distribution that it comes from."""

  entry: EntryPoint
  distribution: str | None = None
  version: str | None = None
  location: str | None = None

  @property
  def key(self) -> tuple[str, str]:
    return self.entry.name, self.entry.value

  def record(self, state: State, reason: str | None = None) -> PluginRecord:
    return PluginRecord(*self.key, self.distribution, self.version, self.location, state, reason)


def load_plugins() -> None:
  """Load all plugins that are installed and allowed. Only the first call in a process does something."""
  if disabled() or not _claim.acquire(blocking=False):
    return
  try:
    _load_all()
  except BaseException:  # a fatal one: the import of `maxtext` fails with it, and the next import has to meet it again
    _claim.release()
    raise


def _load_all() -> None:
  # After an attempt that ended in an error, what it loaded stays loaded and all else is looked at afresh.
  plugins[:] = [record for record in plugins if record.state == "loaded"]
  complaints: list[str] = []
  offers = sorted(_offers(complaints), key=lambda offer: offer.key)
  allowed = _allowed_names(offers, complaints)
  for offer in offers:
    reason = _reason_to_skip(offer, allowed)
    if reason is not None:
      plugins.append(offer.record("skipped", reason))
    else:
      _load(offer, complaints)
  for complaint in complaints:  # last of all: where a filter turns warnings into errors, the plugins are loaded already
    warnings.warn(complaint, PluginWarning, stacklevel=2)


def _load(offer: _Offer, complaints: list[str]) -> None:
  """Import and call one plugin."""
  try:
    offer.entry.load()()
  except (Exception, SystemExit) as error:
    record = offer.record("failed", f"{type(error).__name__}: {error}")
    plugins.append(record)
    if getattr(error, "fatal", False) is True:
      raise
    complaints.append(_failure(record))
  else:
    plugins.append(offer.record("loaded"))


def _failure(record: PluginRecord) -> str:
  """The text of the warning about a plugin that cannot be loaded."""
  origin = f"{record.distribution or 'no distribution'} {record.version or ''}".rstrip()
  return (
    f"The MaxText plugin {record.name!r} ({record.value}, from {origin} in {record.location}) is not active, because "
    f"loading it failed with {record.reason}. MaxText goes on without it. Mend or uninstall "
    f"{record.distribution or record.value}, or set {ALLOW_VARIABLE} to the names of the plugins that shall be loaded."
  )


def _reason_to_skip(offer: _Offer, allowed: frozenset[str] | None) -> str | None:
  """Why this offer is not to be loaded, or None."""
  if allowed is not None and offer.entry.name not in allowed:
    return f"{ALLOW_VARIABLE} does not name it"
  for record in plugins:
    if (record.name, record.value) == offer.key:
      return f"offered before by {record.distribution} {record.version} in {record.location}"
  return None


def _allowed_names(offers: Iterable[_Offer], complaints: list[str]) -> frozenset[str] | None:
  """The names that the environment allows; None if it does not say."""
  text = os.environ.get(ALLOW_VARIABLE)
  if text is None:
    return None
  allowed = frozenset(name.strip() for name in text.split(",") if name.strip())
  known = sorted({offer.entry.name for offer in offers})
  unknown = sorted(allowed.difference(known))
  if unknown:
    complaints.append(
      f"{ALLOW_VARIABLE} names {', '.join(map(repr, unknown))}, but no installed distribution offers such a MaxText "
      f"plugin; known: {', '.join(map(repr, known))}. Correct the name, or install the plugin."
    )
  return allowed


def _offers(complaints: list[str]) -> list[_Offer]:
  """All entry points of the group, with ours even if no distribution offers it."""
  offers: list[_Offer] = []
  homes: dict[str | None, str | None] = {}
  for distribution in _distributions(complaints):
    for offer in _offers_of(distribution, complaints):
      if offer in offers:  # its folder stands in sys.path twice
        continue
      # One distribution in two folders of sys.path: the first hides the other, as for imports. Two versions in one
      # folder: one of them was not cleared away, and as nothing tells which, both have their say.
      if homes.setdefault(offer.distribution, offer.location) == offer.location:
        offers.append(offer)
      else:
        plugins.append(offer.record("skipped", f"hidden by the same distribution in {homes[offer.distribution]}"))
  if all(offer.key != (OWN_ENTRY.name, OWN_ENTRY.value) for offer in offers):
    offers.append(_Offer(OWN_ENTRY, location=os.path.dirname(__file__)))
  return offers


def _distributions(complaints: list[str]) -> Iterator[Distribution]:
  """All installed distributions, as far as the finders of all packages can list them."""
  try:
    # Imports pass over whatever else stands in sys.path; importlib.metadata does not.
    yield from distributions(path=[entry for entry in sys.path if isinstance(entry, str)])
  except Exception as error:
    complaints.append(
      f"Some MaxText plugins may not be active, because listing the installed distributions failed with {error!r}. "
      f"The traceback of `python -c 'import importlib.metadata as m; list(m.distributions())'` shows whose fault it is."
    )


def _offers_of(distribution: Distribution, complaints: list[str]) -> list[_Offer]:
  """The entry points of one distribution; none if its metadata is broken."""
  try:
    text = distribution.read_text("entry_points.txt")
    if not text or GROUP not in text:  # parsing it for each of some hundred distributions would take its time
      return []
    name = distribution.metadata["Name"].lower().replace("_", "-").replace(".", "-")
    location = os.path.realpath(str(distribution.locate_file("")))
    entries = distribution.entry_points.select(group=GROUP)
    return [_Offer(entry, name, distribution.version, location) for entry in entries]
  except Exception as error:
    folder = getattr(distribution, "_path", "an unknown folder")  # what has no name has no public attribute to name it by
    complaints.append(
      f"The MaxText plugins of the distribution in {folder} are not active, because its metadata cannot be read: "
      f"{error!r}. Install it anew, or remove that folder."
    )
    return []
