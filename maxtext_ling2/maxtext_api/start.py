"""Starting MaxText as a library: its folder, its environment, and its refusals as errors.

Importing any module of `maxtext_ling2` registers the plugin, so MaxText can be imported in any way afterwards.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from maxtext_ling2.errors import INSTALL, Ling2Error

ENVIRONMENT = {"DECOUPLE_GCLOUD": "TRUE"}
"""Environment variables of our commands: MaxText then imports no Google Cloud libraries, which they do not need."""


class ConfigError(Ling2Error, ValueError):
  """MaxText refuses the settings."""


class NotInstalledError(Ling2Error):
  """MaxText is not installed."""


def set_environment() -> None:
  """Sets `ENVIRONMENT`, to be called before MaxText is imported; the user's own values win."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
  """Turns MaxText's way to refuse settings, printing why and exiting, into a ConfigError."""
  try:
    yield
  except SystemExit as error:
    raise ConfigError("MaxText refuses this configuration; its reason is printed above") from error


def maxtext_folder() -> Path:
  """Finds the folder of the installed MaxText without importing it.

  Raises:
    NotInstalledError: there is none.
  """
  spec = importlib.util.find_spec("maxtext")
  if spec is None or not spec.submodule_search_locations:
    raise NotInstalledError(f"MaxText is not installed; run: {INSTALL}")
  return Path(spec.submodule_search_locations[0])
