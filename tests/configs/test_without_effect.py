"""Settings that no LING2 run reads are refused by name, and only then."""

import enum

import pytest

from maxtext_ling2.configs import unsupported, without_effect
from maxtext_ling2.maxtext_api import session

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def config():
  return session.make_config(model_name="ling2")._pydantic_config


def another(value):
  """A value other than a default."""
  if isinstance(value, enum.Enum):
    return next(other for other in type(value) if other != value)
  if isinstance(value, bool):
    return not value
  if isinstance(value, int | float):
    return value + 1
  if isinstance(value, list):
    return [*value, 1]
  return f"{value}x" if value else "x"


def problems(config, **changes):
  return list(without_effect.problems(config.model_copy(update=changes)))


def test_defaults_are_accepted(config):
  assert not problems(config)
  assert not problems(config, remat_policy="custom")


FIELDS = (*without_effect.WITHOUT_EFFECT, *without_effect.NO_TENSOR)


@pytest.mark.parametrize("field", FIELDS)
def test_each_is_refused_by_name(config, field):
  default = type(config).model_fields[field].get_default(call_default_factory=True)
  (sentence,) = problems(config, **{field: another(default)})
  assert sentence.startswith(f"{field}=") and "has no effect on LING2: " in sentence
  assert sentence.endswith(f"leave it at {getattr(default, 'value', default)!r}")
  assert field not in unsupported.OFF  # one home


@pytest.mark.parametrize("field", without_effect.FP8_FULL)
def test_of_fp8_full_alone(config, field):
  value = another(getattr(config, field))
  for others in ({}, {"quantization": "int8", "use_qwix_quantization": True}, {"quantization": "fp8_full"}):
    (sentence,) = problems(config, **{field: value}, **others)
    assert sentence.startswith(f"{field}=") and "quantization=fp8_full" in sentence
  assert not problems(config, quantization="fp8_full", use_qwix_quantization=True, **{field: value})


@pytest.mark.parametrize("field", without_effect.CUSTOM_REMAT)
def test_of_custom_rematerialisation_alone(config, field):
  value = another(getattr(config, field))
  (sentence,) = without_effect.warnings(config.model_copy(update={field: value}))
  assert sentence.startswith(f"{field}=") and "remat_policy=custom" in sentence
  custom = config.model_copy(update={field: value, "remat_policy": "custom"})
  assert not [*without_effect.warnings(custom), *without_effect.problems(custom)]


def test_what_maxtext_derives_is_no_setting(config):
  """A config that is checked a second time has the fields that MaxText filled in."""
  derived = {name: getattr(config, name) for name in FIELDS if "local_" in name and getattr(config, name) is not None}
  assert len(derived) > 10 and not problems(config, **derived)


@pytest.mark.parametrize(
  ("optimizer", "number"),
  [({}, 1), ({"opt_type": "muon"}, 0), ({"opt_type": "muon", "muon_type": "maxtext_muon"}, 1)],
  ids=str,
)
def test_only_optax_muon_can_leave_routers_out(config, optimizer, number):
  assert len(problems(config, muon_include_routers=False, **optimizer)) == number
