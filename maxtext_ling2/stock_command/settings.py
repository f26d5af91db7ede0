"""The settings of a stock command, as far as they are known before MaxText reads them."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxtext_ling2.host import base_yml, request
from maxtext_ling2.maxtext_api import overrides, own_model, session
from maxtext_ling2.maxtext_api.start import maxtext_folder
from maxtext_ling2.stock_command.errors import StockCommandError
from maxtext_ling2.stock_command.shell import FINE_TUNING

_MODEL_YMLS = Path(__file__).parents[1] / "configs" / "models"

# Sizes for 2 CPU cores, where a step of 512 tokens takes one second; starting MaxText and compiling take another minute.
TINY_MODEL = "ling2-tiny"
SEQUENCE_LENGTH = 256
ROWS_PER_DEVICE = 2

_OVERRIDE = "override_model_config"


def model_names() -> list[str]:
  """The models that have a YAML file in this package."""
  return sorted(path.stem for path in _MODEL_YMLS.glob("*.yml"))


@dataclass(frozen=True)
class Words:
  """The user's words, in the order that MaxText wants.

  Attributes:
    yml: the base YAML file; None: MaxText's own.
    settings: KEY=VALUE words.
    flags: words that begin with --, which the conversion commands have.
  """

  yml: str | None
  settings: Sequence[str]
  flags: Sequence[str] = ()

  def all(self, added: Mapping[str, Any]) -> list[str]:
    """All words of the command, with further settings before the user's."""
    return [*([self.yml] if self.yml else []), *overrides.words(added), *self.settings, *self.flags]


def split(words: Sequence[str], flags: bool = False) -> Words:
  """Sorts the words of a command line.

  Args:
    words: at most one YAML file, KEY=VALUE, and flags.
    flags: whether the command has flags.

  Raises:
    ValueError: a word is none of these, or the YAML file does not exist.
  """
  ymls = [word for word in words if "=" not in word and own_model.is_yml(word)]
  options = [word for word in words if word.startswith("--")]
  settings = [word for word in words if word not in ymls and word not in options]
  if options and not flags:
    raise StockCommandError(
      f"{options[0]}: this command has no such option; settings of MaxText are KEY=VALUE, without --"
    )
  overrides.parse(settings)
  if len(ymls) > 1:
    raise StockCommandError(
      f"{' '.join(ymls)}: MaxText takes one base YAML file; let one inherit from the other (base_config)"
    )
  for yml in ymls:
    own_model.settings(yml)
  return Words(ymls[0] if ymls else None, settings, options)


class Settings:
  """The settings of a command line, with those of the YAML files below it.

  Args:
    words: the user's words.
    module: MaxText's module, which decides on the YAML file below if the user names none.

  Attributes:
    words: as given.
    yml: the base YAML file, the user's or MaxText's own.
  """

  def __init__(self, words: Words, module: str):
    self.words = words
    self._folder = maxtext_folder() / "configs"
    default = "post_train/sft.yml" if module == FINE_TUNING else "base.yml"  # as in MaxText's pyconfig
    self.yml = words.yml or str(self._folder / default)
    self._user = base_yml.settings_of_the_user(self.yml, str(self._folder))

  def given(self, field: str) -> bool:
    """Whether the user sets a field: in the words, a YAML file or an M_* variable."""
    return base_yml.is_given(field, self._user, self.words.settings, {})

  def value(self, field: str) -> Any:
    """The value of a field; None if no YAML file has it."""
    return self._merged.get(field)

  @property
  def model(self) -> str:
    """MaxText's model_name."""
    return str(self.value("model_name"))

  @functools.cached_property
  def model_settings(self) -> dict[str, Any]:
    """The settings in the model's own YAML file; none for models that are not this package's."""
    from omegaconf import OmegaConf

    path = _MODEL_YMLS / f"{self._merged_without_model.get('model_name')}.yml"
    if not path.is_file():
      return {}
    return {str(key): value for key, value in OmegaConf.load(path).items()}

  @property
  def yml_changes_the_model(self) -> bool:
    """Whether the user's YAML file has settings that are also in the model's."""
    return bool(set(self._user) & set(self.model_settings) - {"decoder_block"})

  @functools.cached_property
  def _merged_without_model(self) -> Any:
    from omegaconf import OmegaConf

    ymls = [OmegaConf.create(text) for text in request.chain(self.yml, str(self._folder))]
    stock = OmegaConf.load(self._folder / "base.yml")
    return OmegaConf.merge(stock, *reversed(ymls), OmegaConf.from_dotlist(list(self.words.settings)))

  @functools.cached_property
  def _merged(self) -> Any:
    from omegaconf import OmegaConf

    both = OmegaConf.merge(self._merged_without_model, self.model_settings)
    variables = {str(key): os.environ.get(f"M_{str(key).upper()}") for key in both}
    given = OmegaConf.from_dotlist([f"{key}={value}" for key, value in variables.items() if value is not None])
    return OmegaConf.merge(both, self._user, given, OmegaConf.from_dotlist(list(self.words.settings)))

  def for_platform(self, platform: str) -> dict[str, Any]:
    """Settings that a command needs on a platform ("cpu", "gpu" or "tpu"), unless the user sets them.

    On a CPU: the platform's name, one process, and `session.platform_settings`. On others only the platform's name.
    """
    needed: dict[str, Any] = {} if platform == "tpu" else {"hardware": platform}  # MaxText's default is tpu
    if platform == "cpu":
      needed |= {"skip_jax_distributed_system": True, **session.platform_settings(platform)}
    return self.unless_given(needed)

  def sizes(self, platform: str) -> dict[str, Any]:
    """Sizes of a batch for `ling2-tiny` on a CPU, which MaxText's defaults would keep busy for a minute per step."""
    if platform != "cpu" or self.model != TINY_MODEL:
      return {}
    return self.unless_given({"max_target_length": SEQUENCE_LENGTH, "per_device_batch_size": ROWS_PER_DEVICE})

  def unless_given(self, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the user does not set."""
    return {field: value for field, value in settings.items() if not self.given(field)}

  def permission(self, added: Mapping[str, Any]) -> dict[str, Any]:
    """`override_model_config=true`, if a word or an added setting changes one of the model's YAML file.

    MaxText asks for it, so that nobody changes a model by accident; who writes a setting on a command line means it.
    """
    changed = {*added, *(key for key, _ in filter(None, map(overrides.split, self.words.settings)))}
    return self.unless_given({_OVERRIDE: True}) if changed & set(self.model_settings) else {}

  def model_words(self) -> list[str]:
    """The user's words that change the model's sizes, for commands that open its checkpoint."""
    layout = ("scan_layers", "dtype", "weight_dtype", "model_name", "max_target_length")
    words = [(word, overrides.split(word)) for word in self.words.settings]
    return [word for word, pair in words if pair and pair[0] in self.model_settings and pair[0] not in layout]
