"""Seam: more fields, more model names and more rules in MaxText's pydantic config classes, class identity kept.

`MaxTextConfig` inherits from about 60 mixins and forbids unknown fields. A field is added to the mixin where it belongs
and to every class that derives from it; then the schemas of these classes are compiled anew (about 10 ms a class).
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, get_args

from maxtext_ling2.configs.fields import Field
from maxtext_ling2.configs.validation import is_ling2
from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.patches import Conflict
from maxtext_ling2.host.seam import Seam

_TYPES = "maxtext.configs.types"
_VALIDATORS = {"MaxTextConfig": "set_derived_and_validate_values", "RLConfig": "set_derived_values_and_validate"}
"""The config classes of MaxText's trainers and the validator in which each checks its fields against each other."""


def _has_validator(name: str, cls: Any) -> bool:
  return name in cls.__pydantic_decorators__.model_validators


class ConfigFieldsSeam(Seam):
  """Adds fields, model names and validation to MaxText's config classes.

  Args:
    fields: the fields; one that MaxText already defines stays MaxText's.
    model_names: additional values of `model_name`.
    validate: config class -> function called with the config object before MaxText's own validation (and before it counts
      devices); raises ValueError.
    on_config: called with a LING2 config that keeps these rules; raises to refuse it.
    masked: gives, for a config object, the values some fields must show to MaxText's own validation, whose rules about
      them know only its own models.
  """

  name = "config fields"
  module = _TYPES
  expectations = (
    Expectation(f"{_TYPES}:ModelName", holds=lambda value: "llama2-7b" in get_args(value), meaning="a Literal of names"),
    Expectation(
      f"{_TYPES}:RunInfo", holds=lambda value: "model_name" in value.model_fields, meaning="with the field model_name"
    ),
    *(
      Expectation(
        f"{_TYPES}:{cls}",
        holds=functools.partial(_has_validator, validator),
        meaning=f"a pydantic model with the validator {validator}",
      )
      for cls, validator in _VALIDATORS.items()
    ),
    *(
      Expectation(f"{_TYPES}:{owner}", holds=lambda value: bool(value.model_fields), meaning="a pydantic mixin")
      for owner in (
        "MoEGeneral",
        "DeepSeekMoE",
        "MlaAttention",
        "YarnRope",
        "Qwen3Next",
        "LayoutAndSharding",
        "GrainDataset",
        "Tokenizer",
        "Optimizer",
      )
    ),
  )

  def __init__(
    self,
    fields: Sequence[Field],
    model_names: Sequence[str],
    validate: Mapping[str, Callable[[Any], None]],
    masked: Callable[[Any], dict[str, Any]],
    on_config: Callable[[Any], None],
  ):
    super().__init__()
    self.fields = tuple(fields)
    self.model_names = tuple(model_names)
    self.validate = validate
    self.masked = masked
    self.on_config = on_config
    self.added: tuple[str, ...] = ()

  def apply(self) -> None:
    from maxtext.configs import types

    touched: set[Any] = set()
    self.patches.also(lambda: rebuild(touched))  # noted first, hence done last, once everything is as it was
    absent = [field for field in self.fields if field.name not in types.MaxTextConfig.model_fields]
    for field in absent:
      touched |= self._add_field(types, field)
    self.added = tuple(field.name for field in absent)
    touched |= self._add_model_names(types)
    for name, validate in self.validate.items():
      self._wrap_validator(getattr(types, name), _VALIDATORS[name], validate)
      touched.add(getattr(types, name))
    rebuild(touched)

  def _add_field(self, types: ModuleType, field: Field) -> set[Any]:
    """Adds one field to its mixin and every class deriving from it."""
    from pydantic import Field as pydantic_field
    from pydantic.fields import FieldInfo

    annotation = getattr(types, field.annotation, None) or getattr(__import__("builtins"), field.annotation)
    info = FieldInfo.from_annotated_attribute(
      annotation, pydantic_field(default=field.default, description=field.description)
    )
    owners = descendants(types, getattr(types, field.owner))
    for owner in owners:
      self._set_field(owner, field.name, info)
    return owners

  def _add_model_names(self, types: ModuleType) -> set[Any]:
    """Widens the Literal behind `model_name`."""
    known = get_args(types.ModelName)
    taken = sorted(set(known) & set(self.model_names))
    if taken:
      raise Conflict(f"model names {taken} are already in MaxText's ModelName")
    widened: Any = Literal.__getitem__((*known, *self.model_names))
    self.patches.attribute(types, "ModelName", widened)
    owners = descendants(types, types.RunInfo)
    for owner in owners:
      info = copy.copy(owner.model_fields["model_name"])
      info.annotation = widened
      self._set_field(owner, "model_name", info)
    return owners

  def _set_field(self, owner: Any, name: str, info: Any) -> None:
    """Sets a field of one pydantic class."""
    before = owner.model_fields.get(name)
    owner.model_fields[name] = info

    def undo() -> None:
      if before is None:
        del owner.model_fields[name]
      else:
        owner.model_fields[name] = before

    self.patches.also(undo)

  def _wrap_validator(self, cls: Any, name: str, validate: Callable[[Any], None]) -> None:
    """Runs our rules before MaxText's, and MaxText's with masked values."""
    validators = cls.__pydantic_decorators__.model_validators
    original = validators[name]

    def validated(config: Any) -> Any:
      validate(config)
      if is_ling2(config):
        self.on_config(config)
      with _shown(config, self.masked(config)):
        return original.func(config)

    validators[name] = dataclasses.replace(original, func=validated)

    def undo() -> None:
      validators[name] = original

    self.patches.also(undo)


@contextlib.contextmanager
def _shown(config: Any, values: dict[str, Any]) -> Any:
  """Lets fields of a config show other values for a while."""
  before = {name: getattr(config, name) for name in values}
  for name, value in values.items():
    setattr(config, name, value)
  try:
    yield
  finally:
    for name, value in before.items():
      setattr(config, name, value)


def descendants(types: ModuleType, base: Any) -> set[Any]:
  """The classes of MaxText's config module that are `base` or derive from it."""
  return {value for value in vars(types).values() if isinstance(value, type) and issubclass(value, base)}


def rebuild(classes: Iterable[Any]) -> None:
  """Compiles pydantic schemas anew, bases first."""
  for cls in sorted(classes, key=lambda cls: len(cls.__mro__)):
    cls.model_rebuild(force=True)
