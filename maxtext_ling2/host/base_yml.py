"""What a base yml of the user's says against the model's own yml.

MaxText merges base yml, model yml and command line in this order, so a key of the user's base yml that also stands in the
model's yml is dropped without a word. For the plugin's models it acts where the base yml says `override_model_config:
true`, as the same key on the command line does, and is refused where it does not.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxtext_ling2 import overrides
from maxtext_ling2.host.request import chain, explicit

_NOT_SETTINGS = ("base_config", "model_name", "override_model_config")


def over_model(
  yml: str, words: Sequence[str], kwargs: Mapping[str, Any], model_yml: Path, configs_folder: str
) -> list[str]:
  """The words that let the user's base yml win over the model's yml.

  Args:
    yml: the base yml; it and the ymls it inherits from count, MaxText's own do not.
    words: `key=value` words of the command line, which win over the base yml.
    kwargs: keyword arguments, which win over both.
    model_yml: the yml of the plugin's model.
    configs_folder: MaxText's own ymls.

  Raises:
    ValueError: the base yml contradicts the model's yml without override_model_config.
  """
  given = {key for key, _ in filter(None, map(overrides.split, words))} | set(kwargs)
  model = _load(model_yml.read_text(encoding="utf-8"))
  changed = {
    key: value
    for key, value in _settings(yml, configs_folder).items()
    if key in model and value != model[key] and key not in given and f"M_{key.upper()}" not in os.environ
  }
  if not changed:
    return []
  if (explicit("override_model_config", words, dict(kwargs), yml, configs_folder) or "").lower() != "true":
    both = ", ".join(f"{key}: {value!r} ({model[key]!r} in {model_yml.name})" for key, value in changed.items())
    raise ValueError(
      f"{yml}: {both}: MaxText would take the values of the model's own yml without a word; add "
      "`override_model_config: true` to your yml to let it win, or remove the lines"
    )
  return overrides.words(changed)


def _settings(yml: str, configs_folder: str) -> dict[str, Any]:
  """The settings of a yml and of those it inherits from, the heir's first."""
  settings: dict[str, Any] = {}
  for text in chain(yml, configs_folder, skip=configs_folder):
    settings = _load(text) | settings
  return {key: value for key, value in settings.items() if key not in _NOT_SETTINGS}


def _load(text: str) -> dict[str, Any]:
  """As OmegaConf reads it, which MaxText uses; what it cannot read MaxText refuses by itself."""
  from omegaconf import OmegaConf

  try:
    found = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
  except Exception:  # YAML's errors and OmegaConf's have no common class
    return {}
  return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
