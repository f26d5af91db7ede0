"""The settings in a user's base yml, and where they contradict the model's own yml.

MaxText merges base yml, model yml and command line in this order, so a key of the user's base yml that is also in the
model's yml is dropped without a word. For the plugin's models it acts where the base yml says `override_model_config:
true`, as the same key on the command line does, and is refused where it does not.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxtext_ling2.host.request import chain
from maxtext_ling2.maxtext_api import overrides

_NOT_SETTINGS = ("base_config", "model_name", "override_model_config")


def settings_of_the_user(yml: str, configs_folder: str) -> dict[str, Any]:
  """The settings of a yml and of those it inherits from, the heir's first; MaxText's own ymls do not count.

  A yml that inherits from none is a copy of MaxText's base.yml: of it only what differs counts.

  Args:
    yml: the base yml.
    configs_folder: MaxText's own ymls.
  """
  settings: dict[str, Any] = {}
  for text in chain(yml, configs_folder, skip=configs_folder):
    mine = _load(text)
    if "base_config" not in mine:
      stock = _load(Path(configs_folder, "base.yml").read_text(encoding="utf-8"))
      mine = {key: value for key, value in mine.items() if key not in stock or value != stock[key]}
    settings = mine | settings
  return settings


def is_given(field: str, settings: Mapping[str, Any], words: Sequence[str], kwargs: Mapping[str, Any]) -> bool:
  """Whether the user sets a field: by keyword, `key=value` word, M_* variable, or in a yml (`settings`)."""
  in_words = any(key == field for key, _ in filter(None, map(overrides.split, words)))
  return field in kwargs or in_words or f"M_{field.upper()}" in os.environ or field in settings


def over_model(
  yml: str, settings: Mapping[str, Any], words: Sequence[str], kwargs: Mapping[str, Any], model_yml: Path, folder: str
) -> list[str]:
  """The words that let the user's base yml win over the model's yml.

  Args:
    yml: the base yml.
    settings: its `settings_of_the_user`.
    words: `key=value` words of the command line, which win over the base yml.
    kwargs: keyword arguments, which win over both.
    model_yml: the yml of the plugin's model.
    folder: MaxText's own ymls.

  Raises:
    ValueError: the base yml contradicts the model's yml without override_model_config.
  """
  model = _load(model_yml.read_text(encoding="utf-8"))
  both = [key for key in settings if key in model and key not in _NOT_SETTINGS and not is_given(key, {}, words, kwargs)]
  values = _resolved({key: settings[key] for key in both}, settings, words, model, folder)
  changed = {key: value for key, value in values.items() if value != model[key]}
  if not changed:
    return []
  if not _overrides(yml, words, kwargs, folder):
    listed = ", ".join(f"{key}: {value!r} ({model[key]!r} in {model_yml.name})" for key, value in changed.items())
    raise ValueError(
      f"{yml}: {listed}: MaxText would silently take the values of the model's own YAML file; add "
      "`override_model_config: true` to your yml to let it win, or remove the lines"
    )
  return overrides.words(changed)


def _overrides(yml: str, words: Sequence[str], kwargs: Mapping[str, Any], folder: str) -> bool:
  """override_model_config as MaxText reads it at this point: no M_* variable, but its own ymls in the chain."""
  field = "override_model_config"
  if field in kwargs:
    return bool(kwargs[field])
  given = dict(filter(None, map(overrides.split, words)))  # of two words for one field, MaxText takes the last
  if field in given:
    return given[field].lower() == "true"
  return next((bool(found[field]) for text in chain(yml, folder) if field in (found := _load(text))), False)


def _resolved(
  wanted: dict[str, Any], settings: Mapping[str, Any], words: Sequence[str], model: Mapping[str, Any], folder: str
) -> dict[str, Any]:
  """Values with their `${...}` replaced, as MaxText replaces them when all is merged."""
  if not any("${" in str(value) for value in wanted.values()):
    return wanted
  from omegaconf import OmegaConf

  stock = _load(Path(folder, "base.yml").read_text(encoding="utf-8"))
  merged = OmegaConf.merge(stock, dict(model), dict(settings), OmegaConf.from_dotlist(list(words)))
  values: Any = OmegaConf.to_container(merged, resolve=True)
  return {key: values[key] for key in wanted}


def _load(text: str) -> dict[str, Any]:
  """As OmegaConf reads it, which MaxText uses; what it cannot read MaxText refuses by itself."""
  from omegaconf import OmegaConf

  try:
    found = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
  except Exception:  # YAML's errors and OmegaConf's have no common class
    return {}
  return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
