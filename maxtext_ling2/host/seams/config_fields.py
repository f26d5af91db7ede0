"""Seam: more fields, more model names and more rules in MaxText's pydantic config classes, class identity kept.

`MaxTextConfig` inherits from about 60 mixins and forbids unknown fields. A field is added to the mixin where it belongs
and to every class that derives from it; then the schemas of these classes are compiled again (about 10 ms a class).
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, Literal, get_args

from maxtext_ling2.configs import validation
from maxtext_ling2.configs.fields import FIELDS, Field
from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.patches import Conflict
from maxtext_ling2.host.seam import Seam

_TYPES = "maxtext.configs.types"
_VALIDATORS = {
  "MaxTextConfig": ("set_derived_and_validate_values", validation.validate),
  "RLConfig": ("set_derived_values_and_validate", validation.validate_rl),
}
"""Config classes of MaxText's trainers: the validator in which each checks its fields together, and LING2's rules."""


def _has_validator(name: str, cls: Any) -> bool:
  return name in cls.__pydantic_decorators__.model_validators


class ConfigFieldsSeam(Seam):
  """Adds fields, model names and validation to MaxText's config classes.

  LING2's rules come before MaxText's own, and before it counts devices. A field that MaxText defines stays MaxText's.

  Args:
    model_names: additional values of `model_name`.
    on_config: called with a LING2 config that keeps LING2's rules; raises to refuse it.
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
      for cls, (validator, _) in _VALIDATORS.items()
    ),
    *(
      Expectation(f"{_TYPES}:{owner}", holds=lambda value: bool(value.model_fields), meaning="a pydantic mixin")
      for owner in dict.fromkeys(field.owner for field in FIELDS)
    ),
  )

  def __init__(self, model_names: Sequence[str], on_config: Callable[[Any], None]):
    super().__init__()
    self.model_names = tuple(model_names)
    self.on_config = on_config
    self.added: tuple[str, ...] = ()

  def apply(self) -> None:
    from maxtext.configs import types

    touched: set[Any] = set()
    self.patches.callback(lambda: rebuild(touched))  # noted first, hence done last, once everything is as it was
    absent = [field for field in FIELDS if field.name not in types.MaxTextConfig.model_fields]
    for field in absent:
      touched |= self._add_field(types, field)
    self.added = tuple(field.name for field in absent)
    touched |= self._add_model_names(types)
    for name, (validator, validate) in _VALIDATORS.items():
      self._wrap_validator(getattr(types, name), validator, validate)
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
      self.patches.item(owner.model_fields, field.name, info)
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
      self.patches.item(owner.model_fields, "model_name", info)
    return owners

  def _wrap_validator(self, cls: Any, name: str, validate: Callable[[Any], None]) -> None:
    """Runs our rules before MaxText's, and MaxText's with masked values."""
    validators = cls.__pydantic_decorators__.model_validators
    original = validators[name]

    def validated(config: Any) -> Any:
      validate(config)
      if validation.is_ling2(config):
        self.on_config(config)
      with _shown(config, validation.validation_overrides(config)):
        return original.func(config)

    self.patches.item(validators, name, dataclasses.replace(original, func=validated))


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
  """Compiles pydantic schemas again, bases first."""
  for cls in sorted(classes, key=lambda cls: len(cls.__mro__)):
    cls.model_rebuild(force=True)
