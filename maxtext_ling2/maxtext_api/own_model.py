"""A model named on the command line of our own commands: MaxText's model_name, or the user's YAML file."""

import dataclasses
from pathlib import Path
from typing import Any

from maxtext_ling2.configs.validation import CUSTOM_MODEL, no_sizes
from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host.base_yml import settings_of_the_user
from maxtext_ling2.maxtext_api.start import maxtext_folder


class ModelYmlError(Ling2Error, ValueError):
  """A YAML file is not one of settings, or a model needs one."""


@dataclasses.dataclass(frozen=True)
class Model:
  """A model.

  Attributes:
    given: as on the command line.
    name: MaxText's model_name.
    yml: the base yml, MaxText's own or the user's.
  """

  given: str
  name: str
  yml: Path


def read(model: str) -> Model:
  """Reads a model_name, or the path of a yml such as `maxtext-ling2 config` writes.

  Raises:
    ModelYmlError: the yml does not exist or holds no settings; or the model is `ling2-custom`, whose sizes are in a yml.
  """
  if model == CUSTOM_MODEL:
    raise ModelYmlError(no_sizes(f"--model {model}", "--model my.yml"))
  if not is_yml(model):
    return Model(model, model, maxtext_folder() / "configs" / "base.yml")
  return Model(model, str(settings(model).get("model_name", CUSTOM_MODEL)), Path(model).resolve())


def is_yml(model: str) -> bool:
  """Whether a model is given as a YAML file.

  Raises:
    ModelYmlError: its name does not end in .yml.
  """
  if model.endswith(".yaml"):
    raise ModelYmlError(f"{model}: MaxText takes a base yml only under a name that ends in .yml; rename it")
  return model.endswith(".yml")


def settings(model: str) -> dict[str, Any]:
  """The settings of a user's yml and of those it inherits from, without MaxText's own.

  Raises:
    ModelYmlError: it does not exist, or is not YAML with settings.
  """
  if not Path(model).is_file():
    raise ModelYmlError(
      f"{model}: no such file; pass a model_name such as ling2, or the yml that `maxtext-ling2 config` writes"
    )
  return settings_of_file(Path(model))


def settings_of_file(path: Path) -> dict[str, Any]:
  """As `settings`, of a file that exists."""
  import yaml

  try:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise ModelYmlError(f"{path}: not YAML ({error}); write it again with `maxtext-ling2 config`") from error
  if not isinstance(found, dict):
    what = "nothing" if found is None else f"a {type(found).__name__}"
    raise ModelYmlError(f"{path}: holds {what} instead of settings; write it again with `maxtext-ling2 config`")
  return settings_of_the_user(str(path), str(maxtext_folder() / "configs"))
