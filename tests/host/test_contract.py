"""What the seams expect of MaxText: it holds on the installed one, and a violation says what was expected and found."""

import copy
import dataclasses
import enum

import pytest
import symbols

from maxtext_ling2 import plugin
from maxtext_ling2.doctor import checks
from maxtext_ling2.host.contract import Expectation, expect, resolve
from maxtext_ling2.host.registry import Registry
from maxtext_ling2.host.seam import Seam, Use
from maxtext_ling2.maxtext_api import contract as library_contract

SEAMS = {seam.name: seam for seam in plugin.REGISTRY.seams}
EXPECTATIONS = {
  f"{name}-{expectation.target.partition(':')[2]}": (seam, expectation)
  for name, seam in SEAMS.items()
  for expectation in seam.expectations
}


@pytest.fixture(scope="module", autouse=True)
def stock():
  """MaxText without our changes, so that the contracts are checked against what is installed."""
  registry = plugin.REGISTRY
  registry.complete()
  assert registry.usable and not registry.violations
  assert registry.undo() == []
  yield
  registry.install()
  registry.complete()
  assert registry.usable


def broken(seam, expectation, **changes):
  """What the seam reports when this expectation alone is made one that MaxText cannot meet."""
  other = copy.copy(seam)
  other.expectations = (dataclasses.replace(expectation, **changes),)
  (violation,) = other.violations()
  assert violation.seam == seam.name
  text = str(violation)
  assert f"'{seam.name}'" in text and violation.expected in text and violation.found in text
  return violation


@pytest.mark.parametrize("name", SEAMS)
def test_every_seam_states_a_contract_and_maxtext_meets_it(name):
  assert SEAMS[name].expectations
  assert SEAMS[name].violations() == []


@pytest.mark.parametrize("name", SEAMS)
def test_what_a_seam_replaces_is_in_its_contract(name):
  targets = [expectation.target for expectation in SEAMS[name].expectations]
  assert {f"{SEAMS[name].module}:{path}" for path in SEAMS[name].handlers()} <= set(targets)


def test_a_signature_is_read_as_name_and_parameters():
  named, method, without, empty = expect("module", "name(a, b)", "Class.method(a)", "thing", "call()")
  assert (named.target, named.parameters) == ("module:name", ("a", "b"))
  assert (method.target, method.parameters) == ("module:Class.method", ("a",))
  assert (without.target, without.parameters, empty.parameters) == ("module:thing", None, ())


@pytest.mark.parametrize(("seam", "expectation"), EXPECTATIONS.values(), ids=EXPECTATIONS)
def test_a_violation_is_reported(seam, expectation):
  gone = f"{expectation.target}_that_is_gone"
  violation = broken(seam, expectation, target=gone)
  assert gone in violation.expected and violation.found == "nothing of that name"

  module = f"{expectation.target.partition(':')[0]}_that_is_gone"
  violation = broken(seam, expectation, target=f"{module}:anything")
  assert module in violation.expected and "does not import" in violation.found and module in violation.found

  violation = broken(seam, expectation, holds=lambda value: False, meaning="of another kind")
  assert violation.expected.endswith("of another kind") and violation.found.endswith(
    "which does not satisfy the condition"
  )

  if expectation.parameters is not None:
    wanted = (*expectation.parameters, "parameter_that_is_gone")
    violation = broken(seam, expectation, parameters=wanted)
    assert ", ".join(wanted) in violation.expected
    assert "parameter_that_is_gone" not in violation.found
    assert all(name in violation.found for name in expectation.parameters)


def test_parameters_may_have_others_between_but_not_another_order():
  target = "maxtext.utils.maxtext_utils:get_functional_train_with_signature"
  assert Expectation(target, parameters=("train_step", "config")).found() is None
  assert "taking (train_step" in Expectation(target, parameters=("config", "train_step")).found()


def test_a_condition_that_raises_is_not_met():
  assert "which does not satisfy the condition" in Expectation("enum:Enum", holds=lambda value: 1 / 0).found()
  assert resolve("enum:Enum") is enum.Enum


def test_a_module_that_breaks_in_any_way_is_a_violation(tmp_path, monkeypatch):
  (tmp_path / "module_that_breaks.py").write_text("raise RuntimeError('a library of another version')")
  monkeypatch.syspath_prepend(tmp_path)
  assert "a library of another version" in Expectation("module_that_breaks:anything").found()


def test_nothing_of_ours_is_left_in_the_stock_config():
  from maxtext.common.common_types import DecoderBlockType
  from maxtext.configs import types
  from maxtext.models import models

  assert "LING2" not in DecoderBlockType.__members__ and not hasattr(DecoderBlockType, "LING2")
  with pytest.raises(ValueError, match="ling2"):
    DecoderBlockType("ling2")
  for cls in (types.MaxTextConfig, types.RLConfig, types.MoEGeneral, types.DeepSeekMoE, types.Qwen3Next):
    assert not {"moe_z_loss_weight", "routed_bias_dtype", "group_norm_size"} & set(cls.model_fields)
  assert isinstance(models.NNXDecoder, type) and isinstance(models.MultiTokenPredictionBlock, type)


def test_all_of_maxtext_that_is_used_is_in_a_contract():
  """A name of MaxText in the package's source: "module:name", or a method that is overridden or called."""
  targets = {expectation.target for _, expectation in EXPECTATIONS.values()}
  targets |= {expectation.target for expectation in library_contract.EXPECTATIONS}
  used = symbols.used()
  assert len(used) > 100
  without = {
    symbol: places
    for symbol, places in used.items()
    if not any(target == symbol or target.startswith(f"{symbol}.") for target in targets)
  }
  assert not without


def test_maxtext_is_what_our_commands_use():
  assert library_contract.violations() == []


class Broken(Seam):
  """Fits no MaxText."""

  module = "maxtext.configs.types"
  expectations = (Expectation("maxtext.configs.types:nothing_of_this_name"),)

  def __init__(self, name, use=None):
    super().__init__()
    self.name, self.use = name, use

  def apply(self):
    raise AssertionError("it does not fit")


def seams_of(registry, monkeypatch):
  """What doctor says of the seams of a registry."""
  monkeypatch.setattr(plugin, "REGISTRY", registry)
  found = checks.Diagnosis({"maxtext": "0"}, {}, {})
  checks._seams(found)
  return found


def test_doctor_lists_every_violation(monkeypatch):
  """The registry stops at the first."""
  registry = Registry("two", [Broken("one"), Broken("another")], names=(), tested=("0",))
  registry.complete()
  assert [violation.seam for violation in registry.violations] == ["one"]
  found = seams_of(registry, monkeypatch)
  assert [seam["name"] for seam in found.seams if seam["breaches"]] == ["one", "another"]
  assert sum("nothing_of_this_name" in fault.what for fault in found.faults) == 2
  assert {fault.remedy for fault in found.faults} == {"install a MaxText that this plugin was tested with (0)"}


def test_doctor_notes_what_only_some_runs_need(monkeypatch):
  use = Use("fast=true", bool, "set fast=false")
  registry = Registry("two", [Broken("one", use), Broken("another", use)], names=(), tested=("0",))
  registry.install()
  found = seams_of(registry, monkeypatch)
  registry.undo()
  assert found.ok and [note.what.partition(":")[0] for note in found.notes] == ["seam 'one'", "seam 'another'"]
  assert all(note.what.endswith("only runs with fast=true need it") for note in found.notes)
  assert all(note.remedy.endswith(", or set fast=false") for note in found.notes)
