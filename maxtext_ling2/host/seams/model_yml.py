"""Seam: model ymls that live in a plugin's folder, found under all of MaxText's own rules.

MaxText looks for `models/<model_name>.yml` beside the base config first. For a plugin model the path of the base config
is replaced by a path in the plugin's configs folder, which `_load_config` maps back to the real file; everything else
(override checks, M_* variables, base_config inheritance) stays MaxText's.
"""

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote, unquote

from maxtext_ling2.configs.fields import DEFAULTS
from maxtext_ling2.configs.validation import BASE_OVERRIDES, CUSTOM_MODEL, DECODER_BLOCK, no_sizes
from maxtext_ling2.host.base_yml import is_given, over_model, settings_of_the_user
from maxtext_ling2.host.contract import Expectation, expect
from maxtext_ling2.host.request import mentions, requested_models
from maxtext_ling2.host.seam import Seam
from maxtext_ling2.maxtext_api import overrides

_PYCONFIG = "maxtext.configs.pyconfig"
_TYPES = "maxtext.configs.types"


_SIZES = ("base_emb_dim", "base_num_decoder_layers", "vocab_size")
"""What a YAML file of an own model has in any case."""


def _has_fields(value: Any) -> bool:
  return bool(value.model_fields)


class ModelYmlSeam(Seam):
  """Makes `<folder>/models/<name>.yml` the yml of each plugin model.

  Args:
    folder: the plugin's configs folder.
    model_names: the models whose ymls it holds.
  """

  name = "model yml"
  module = _PYCONFIG
  expectations = (
    *expect(
      _PYCONFIG,
      "_resolve_or_infer_config(argv, kwargs)",
      "_load_config(config_name)",
      "_prepare_for_pydantic(raw_keys, config_class)",
      "yaml_key_to_env_key(s)",
      "initialize(argv)",  # wrapped by RequestHook, too, which notices that a process asks for LING2
    ),
    Expectation(f"{_PYCONFIG}:MAXTEXT_CONFIGS_DIR", holds=os.path.isdir, meaning="a folder"),
    # Misspelt fields are looked up in these, for every model.
    Expectation(f"{_TYPES}:ModelName", holds=lambda value: bool(get_args(value)), meaning="a Literal"),
    Expectation(f"{_TYPES}:MaxTextConfig", holds=_has_fields, meaning="a pydantic model"),
    Expectation(f"{_TYPES}:RLConfig", holds=_has_fields, meaning="a pydantic model"),
  )

  def __init__(self, folder: Path, model_names: Sequence[str]):
    super().__init__()
    self.folder = folder
    self.model_names = tuple(model_names)
    self.names = (*self.model_names, DECODER_BLOCK)

  def apply(self) -> None:
    from maxtext.configs import pyconfig

    self._configs_folder = pyconfig.MAXTEXT_CONFIGS_DIR
    self.patches.wrap(pyconfig, "_resolve_or_infer_config", self._resolve)
    self.patches.wrap(pyconfig, "_load_config", self._load)
    self.patches.wrap(pyconfig, "_prepare_for_pydantic", self._prepare)

  def _resolve(self, original: Callable[..., Any], argv: list[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
    """Returns the base config's path, redirected into the plugin's folder for a plugin model, and the words."""
    path, words = original(argv, *rest, **kwargs)
    settings = requested_models(["", path, *words], {**kwargs, "base_config": None}, self._configs_folder)
    self._refuse_environment(settings)
    mine = settings_of_the_user(path, self._configs_folder) if mentions(settings, self.names) else {}
    if mentions(settings, self.names):
      words = [*words, *self._unless_given(mine, words, kwargs)]
    model_name = settings.get("model_name")
    if model_name == CUSTOM_MODEL and not any(is_given(size, mine, words, kwargs) for size in _SIZES):
      self._load_as_maxtext(path)  # a yml that cannot be read says so itself
      raise ValueError(no_sizes(f"model_name={model_name}", f"my.yml as base yml, then model_name={model_name}"))
    if model_name in self.model_names:
      if not (self.folder / "models" / f"{model_name}.yml").is_file():
        raise FileNotFoundError(
          f"model_name={model_name}: its yml is missing from {self.folder / 'models'}, so the installation is broken; "
          "install maxtext-ling2 again"
        )
      model_yml = self.folder / "models" / f"{model_name}.yml"
      words = [*words, *over_model(path, mine, words, kwargs, model_yml, self._configs_folder)]
      path = str(self.folder / quote(path, safe=""))
    return path, words

  def _load_as_maxtext(self, path: str) -> None:
    from maxtext.configs import pyconfig

    pyconfig._load_config(path)

  def _unless_given(self, mine: dict[str, Any], words: Sequence[str], kwargs: dict[str, Any]) -> list[str]:
    """Words that replace what MaxText's own base yml says."""
    return overrides.join(
      {field: value for field, value in BASE_OVERRIDES.items() if not is_given(field, mine, words, kwargs)}
    )

  def _refuse_environment(self, settings: dict[str, str]) -> None:
    """MaxText applies M_MODEL_NAME after the yml was chosen, and would train another model under our name."""
    value = os.environ.get("M_MODEL_NAME")
    if value is None or not {value, settings.get("model_name")} & set(self.model_names):
      return
    wanted = value if value in self.model_names else settings["model_name"]
    raise ValueError(
      f"M_MODEL_NAME={value}: MaxText reads this variable only after it has chosen the model's yml, so it would train "
      f"another model under this name; unset it and pass model_name={wanted} on the command line"
    )

  def _load(self, original: Callable[..., Any], config_name: str, *rest: Any, **kwargs: Any) -> Any:
    """Loads a yml, undoing the redirection; lets M_* variables reach fields that no base yml names."""
    path = str(config_name)
    if os.path.dirname(path) == str(self.folder):
      path = unquote(os.path.basename(path))
    config = original(path, *rest, **kwargs)
    from maxtext.configs import pyconfig

    for field, default in DEFAULTS.items():
      if pyconfig.yaml_key_to_env_key(field) in os.environ and field not in config:
        config[field] = default
    return config

  def _prepare(self, original: Callable[..., Any], raw_keys: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The last look at the merged settings before pydantic sees them."""
    self._suggest(raw_keys)
    self._refuse_another_model(raw_keys)
    return original(raw_keys, *args, **kwargs)

  def _refuse_another_model(self, raw_keys: dict[str, Any]) -> None:
    """MaxText only warns where it finds no yml for a model, and would train its default model under our name.

    That happens where it reads the name out of something that `requested`, which does not parse ymls, cannot read.
    """
    name, block = raw_keys.get("model_name"), raw_keys.get("decoder_block")
    block = getattr(block, "value", block)
    if name in self.model_names and block != DECODER_BLOCK:
      raise ValueError(
        f"model_name={name}: this run has decoder_block={block}, so its yml was not read, or was overridden; pass "
        f"model_name={name} on the command line, or in a yml as a line of its own, and no decoder_block"
      )

  def _suggest(self, raw_keys: dict[str, Any]) -> None:
    """Answers a misspelt field of ours, or a misspelt model name, with the right spelling."""
    from maxtext.configs import types

    fields = {*types.MaxTextConfig.model_fields, *types.RLConfig.model_fields}
    for key in (key for key in raw_keys if key not in fields):
      close = difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0.8)
      if close:
        raise ValueError(f"{key}={raw_keys[key]}: MaxText has no field of this name; did you mean '{close[0]}'?")
    name, known = raw_keys.get("model_name"), get_args(types.ModelName)
    if isinstance(name, str) and name not in known:
      close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
      hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`maxtext-ling2 doctor` lists ours"
      raise ValueError(f"model_name={name}: MaxText knows no model of this name; {hint}")
