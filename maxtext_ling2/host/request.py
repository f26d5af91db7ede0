"""Which model a configuration call asks for, told from its arguments before MaxText looks at them.

MaxText takes `model_name` and `decoder_block` from keyword arguments, from `key=value` words, or from the base yml and
the ymls it inherits from. All of them are looked at here, cheaply: a yml is read as text.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from maxtext_ling2.maxtext_api import overrides

FIELDS = ("model_name", "decoder_block")


def _setting(field: str) -> re.Pattern[str]:
  """A line of a yml that sets a field."""
  return re.compile(rf"^[\"']?{field}[\"']?\s*:\s*(?P<value>[^#\n]+)", re.MULTILINE)


_SETTING = {field: _setting(field) for field in (*FIELDS, "base_config")}


def requested_models(argv: Sequence[str] | None, kwargs: dict[str, Any], configs_folder: str) -> dict[str, str]:
  """Returns the values of `model_name` and `decoder_block` that the call sets, keyword arguments first.

  Args:
    argv: program name, optionally a yml, then `key=value` words; as MaxText's `initialize` takes them.
    kwargs: further settings; `base_config` may name a yml.
    configs_folder: where MaxText looks for a yml that is not found as given.
  """
  words = list(argv or ())
  settings = {field: str(kwargs[field]) for field in FIELDS if kwargs.get(field) is not None}
  for word in reversed(words[1:]):  # of two words for one field, MaxText takes the last
    key, value = overrides.split(word) or ("", "")
    if key in FIELDS:
      settings.setdefault(key, value.strip().strip("'\""))
  yml = kwargs.get("base_config") or next((word for word in words[1:2] if word.endswith(".yml")), None)
  for text in chain(yml, configs_folder):
    for field in FIELDS:
      match = _SETTING[field].search(text)
      if match:
        settings.setdefault(field, match["value"].strip().strip("'\""))
  return settings


def mentions(settings: dict[str, str], names: Iterable[str]) -> bool:
  """Whether one of the settings is one of `names`."""
  return bool(set(settings.values()) & set(names))


def chain(yml: str | None, configs_folder: str, skip: str | None = None) -> Iterable[str]:
  """The texts of a yml and the ymls it inherits from, the heir first; without those in the folder `skip`."""
  seen: set[str] = set()
  path = _existing(yml, [os.curdir, configs_folder]) if yml else None
  while path is not None and path not in seen:
    seen.add(path)
    with open(path, encoding="utf-8", errors="replace") as file:
      text = file.read()
    if skip is None or not _within(path, skip):
      yield text
    match = _SETTING["base_config"].search(text)
    parent = match["value"].strip().strip("'\"") if match else None
    path = _existing(parent, [os.path.dirname(path), configs_folder]) if parent else None


def _within(path: str, folder: str) -> bool:
  path, folder = os.path.realpath(path), os.path.realpath(folder)
  return os.path.commonpath([folder, path]) == folder


def _existing(name: str, folders: Sequence[str]) -> str | None:
  """The first file `name` in `folders`, where MaxText's old source prefix counts as its configs folder."""
  name = name.removeprefix("src/maxtext/configs/") if not os.path.isfile(name) else name
  candidates = (os.path.join(folder, name) for folder in folders)
  return next((os.path.abspath(path) for path in candidates if os.path.isfile(path)), None)
