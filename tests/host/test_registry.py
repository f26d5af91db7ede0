"""The common fate of the seams, on a stand-in for MaxText: modules of a few lines and seams that wrap one function."""

import importlib
import importlib.machinery
import itertools
import sys
import types

import pytest

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host import request_hook
from maxtext_ling2.host.contract import ANOTHER_PLUGIN, HINT, Expectation
from maxtext_ling2.host.patches import Conflict, SupersededByHost
from maxtext_ling2.host.registry import Registry
from maxtext_ling2.host.seam import Seam, State, Use
from maxtext_ling2.plugin import REGISTRY

pytestmark = pytest.mark.unit

NUMBERS = itertools.count()
FIRST = "def answer():\n  return 1\n"
PYCONFIG = "def initialize(argv=None, **kwargs):\n  return argv, kwargs\n"


class FakeSeam(Seam):
  """Makes `answer()` of its module return 10 more."""

  def __init__(self, name, module, expectations=(), error=None, needed=True, use=None):
    super().__init__()
    self.name, self.module, self.expectations, self.error = name, module, expectations, error
    self.needed_for_training, self.use = needed, use

  def apply(self):
    module = importlib.import_module(self.module)
    self.patches.wrap(module, "answer", lambda original: original() + 10)
    if self.error is not None:
      raise self.error


class World:
  """Three fresh modules, and registries of two seams on them."""

  def __init__(self, folder, monkeypatch):
    number = next(NUMBERS)
    self.first, self.second, self.pyconfig = (f"fake_{name}_{number}" for name in ("first", "second", "pyconfig"))
    for name, text in ((self.first, FIRST), (self.second, FIRST), (self.pyconfig, PYCONFIG)):
      (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(request_hook, "MODULE", self.pyconfig)

  def registry(self, second=None, **options):
    seams = [FakeSeam("first", self.first), second or FakeSeam("second", self.second, **options)]
    made = Registry("fake-plugin", seams, ["fake-model", "fake-block"], ["1.0", "1.1"])
    made.install()
    return made

  def answers(self):
    modules = [importlib.import_module(name) for name in (self.first, self.second)]
    return [module.answer() for module in modules]

  def configure(self, *words, **kwargs):
    return importlib.import_module(self.pyconfig).initialize(["", *words], **kwargs)

  def unmet(self):
    return (Expectation(f"{self.second}:answer", parameters=("question",), meaning="to be asked"),)


@pytest.fixture
def world(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(sys, "argv", ["train.py", "base.yml", "model_name=another"])
  host_version(monkeypatch, "1.1")
  return World(tmp_path, monkeypatch)


def host_version(monkeypatch, version):
  """Lets `maxtext.version` say this version."""
  module = types.ModuleType("maxtext.version")
  module.__version__ = version
  monkeypatch.setitem(sys.modules, "maxtext", types.ModuleType("maxtext"))
  monkeypatch.setitem(sys.modules, "maxtext.version", module)


def states(made):
  return [seam.state for seam in made.seams]


def says_all(text, *, found, hint=HINT):
  """Whether a message names seam, expected, found and what to do."""
  assert "seam 'second'" in text and "fake-plugin" in text
  assert "expected " in text and "found " in text and found in text
  assert hint in text
  return True


def test_each_seam_is_applied_when_its_module_is_imported(world):
  made = world.registry()
  assert states(made) == [State.WAITING, State.WAITING]
  importlib.import_module(world.first)
  assert states(made) == [State.APPLIED, State.WAITING]
  assert world.answers() == [11, 11]
  assert states(made) == [State.APPLIED, State.APPLIED] and made.usable


def test_modules_imported_before_are_extended_too_and_only_once(world):
  assert world.answers() == [1, 1]
  made = world.registry()
  made.install()
  made.complete()
  assert world.answers() == [11, 11]


def test_one_seam_that_does_not_fit_undoes_all_with_one_warning(world, caplog):
  made = world.registry(expectations=world.unmet())
  importlib.import_module(world.first)
  assert sys.modules[world.first].answer() == 11
  assert world.answers() == [1, 1]
  assert states(made) == [State.UNDONE, State.FAILED] and not made.usable
  (record,) = caplog.records
  assert record.levelname == "WARNING" and says_all(record.getMessage(), found=f"{world.second}:answer taking ()")
  assert f"{world.second}:answer taking (question), to be asked" in record.getMessage()


def test_who_did_not_ask_goes_on_and_who_asks_later_gets_the_error(world, caplog):
  world.registry(expectations=world.unmet())
  world.answers()
  assert world.configure("model_name=another", steps=3) == (["", "model_name=another"], {"steps": 3})
  assert len(caplog.records) == 1
  for words, kwargs in (
    (["model_name=fake-model"], {}),
    (["decoder_block=fake-block"], {}),
    ([], {"model_name": "fake-model"}),
  ):
    with pytest.raises(Ling2Error) as error:
      world.configure(*words, **kwargs)
    assert says_all(str(error.value), found=f"{world.second}:answer taking ()")


def test_a_yml_can_ask_too(world, tmp_path):
  world.registry(expectations=world.unmet())
  (tmp_path / "parent.yml").write_text("steps: 1\nmodel_name: 'fake-model'  # ours\n")
  (tmp_path / "heir.yml").write_text("base_config: parent.yml\nsteps: 2\n")
  heir = str(tmp_path / "heir.yml")
  with pytest.raises(Ling2Error):
    world.configure(heir)
  with pytest.raises(Ling2Error):
    world.configure(base_config=heir)
  assert world.configure(heir, "model_name=another")[0] == ["", heir, "model_name=another"]


@pytest.mark.parametrize("word", ["model_name=fake-model", "decoder_block=fake-block", "model_name='fake-model'"])
def test_asked_for_on_the_command_line_the_import_fails_at_once(world, monkeypatch, caplog, word):
  monkeypatch.setattr(sys, "argv", ["train.py", "base.yml", word])
  world.registry(expectations=world.unmet())
  importlib.import_module(world.first)
  with pytest.raises(Ling2Error) as error:
    importlib.import_module(world.second)
  assert error.value.fatal and says_all(str(error.value), found=f"{world.second}:answer taking ()")
  assert sys.modules[world.first].answer() == 1
  assert not caplog.records


def test_any_error_while_applying_leaves_the_host_as_it_was(world, caplog):
  made = world.registry(error=ZeroDivisionError("by chance"))
  assert world.answers() == [1, 1]
  assert states(made) == [State.UNDONE, State.FAILED]
  assert says_all(caplog.records[0].getMessage(), found="ZeroDivisionError: by chance")


def test_a_conflict_names_the_other_plugin(world, caplog):
  def entry():
    pass

  entry.__module__ = "their_plugin.tables"

  class Table(FakeSeam):
    def apply(self):
      self.patches.entry({"fake-model": entry}, "fake-model", object())

  world.registry(Table("second", world.second))
  assert world.answers() == [1, 1]
  text = caplog.records[0].getMessage()
  assert says_all(text, found="'fake-model' is already registered, by 'their_plugin.tables'", hint=ANOTHER_PLUGIN)
  assert len(caplog.records) == 1


def test_a_conflict_raised_by_a_seam_is_reported(world, caplog):
  world.registry(error=Conflict("taken by another plugin"))
  assert world.answers() == [1, 1]
  assert says_all(caplog.records[0].getMessage(), found="taken by another plugin", hint=ANOTHER_PLUGIN)
  assert HINT not in caplog.records[0].getMessage()


def test_where_the_host_brings_the_model_itself_the_plugin_stands_down(world, caplog):
  made = world.registry(error=SupersededByHost("this MaxText brings fake-model itself"))
  assert world.answers() == [1, 1]
  (record,) = caplog.records
  assert "does nothing: this MaxText brings fake-model itself" in record.getMessage()
  assert not made.usable and not made.violations
  assert world.configure("model_name=fake-model")[0] == ["", "model_name=fake-model"]


def test_undo_restores_everything_and_install_starts_anew(world):
  made = world.registry()
  originals = {}
  for name in (world.first, world.second, world.pyconfig):
    module = importlib.import_module(name)
    originals[module] = {key: value.__wrapped__ for key, value in vars(module).items() if hasattr(value, "__wrapped__")}
    assert originals[module]
  assert made.undo() == []
  assert all(vars(module)[key] is value for module, values in originals.items() for key, value in values.items())
  assert states(made) == [State.WAITING, State.WAITING] and made.usable
  made.install()
  assert world.answers() == [11, 11]


def test_undo_after_a_failure_forgets_it(world):
  seam = FakeSeam("second", world.second, world.unmet())
  made = world.registry(seam)
  world.answers()
  made.undo()
  seam.expectations = ()
  made.install()
  assert world.answers() == [11, 11]


def test_undo_leaves_what_somebody_else_replaced_again_and_names_them(world, caplog):
  made = world.registry()
  world.answers()

  def answer():
    return 42

  answer.__module__ = "intruder.patches"
  sys.modules[world.second].answer = answer
  (conflict,) = made.undo()
  assert f"{world.second}.answer was replaced again by 'intruder.patches'" in conflict
  assert world.answers() == [1, 42]
  assert conflict in caplog.text


def test_a_request_imports_what_training_needs_and_no_more(world):
  made = world.registry(needed=False)
  assert world.first not in sys.modules
  world.configure("model_name=another")
  assert world.first not in sys.modules
  world.configure("model_name=fake-model")
  assert world.first in sys.modules and world.second not in sys.modules
  assert states(made) == [State.APPLIED, State.WAITING]
  made.complete()
  assert states(made) == [State.APPLIED, State.APPLIED]


def test_a_module_that_is_gone_is_named(world):
  made = world.registry(FakeSeam("second", "fake_module_that_is_gone"))
  with pytest.raises(Ling2Error) as error:
    world.configure("model_name=fake-model")
  assert says_all(str(error.value), found="ModuleNotFoundError")
  assert "the module fake_module_that_is_gone" in str(error.value)
  assert sys.modules[world.first].answer() == 1
  assert states(made) == [State.UNDONE, State.FAILED]


def test_an_untested_version_gets_one_warning_naming_both(world, monkeypatch, caplog):
  host_version(monkeypatch, "1.2")
  world.registry()
  world.configure("model_name=another")
  assert not caplog.records
  world.configure("model_name=fake-model")
  world.configure("model_name=fake-model")
  (record,) = caplog.records
  assert record.levelname == "WARNING"
  assert "tested with MaxText 1.0, 1.1 and found 1.2" in record.getMessage()
  assert world.answers() == [11, 11]


def test_a_tested_version_gets_none(world, caplog):
  world.registry()
  world.configure("model_name=fake-model")
  assert not caplog.records


def test_a_seam_whose_contract_imports_one_that_does_not_fit_is_not_applied(world, caplog):
  made = world.registry(expectations=world.unmet())
  made.seams[0].expectations = (Expectation(f"{world.second}:answer"),)
  importlib.import_module(world.first)
  assert world.answers() == [1, 1]
  assert states(made) == [State.WAITING, State.FAILED]
  assert len(caplog.records) == 1


@pytest.mark.parametrize(
  ("command", "needed"), [("maxtext.tools.convert", True), ("maxtext.train", False), (None, False)]
)
def test_commands_of_its_package_need_a_seam_that_training_does_not(monkeypatch, command, needed):
  seam = FakeSeam("tables", "maxtext.tools.tables", needed=False)
  main = types.ModuleType("__main__")
  main.__spec__ = command and importlib.machinery.ModuleSpec(command, None)
  monkeypatch.setitem(sys.modules, "__main__", main)
  assert seam.required_in_this_process() == seam.concerns_this_process() == needed
  step = FakeSeam("step", "maxtext.train")
  assert step.required_in_this_process() and step.concerns_this_process() and not seam.is_core


# Seams that only some runs use


def fast(config):
  return config["fast"]


FAST = Use("fast=true", fast, "set fast=false")
REPORT = Use("fast=true", fast, "without a report", essential=False)


@pytest.mark.parametrize("broken", ["contract", "module", "apply"])
def test_a_seam_that_a_run_does_not_use_stops_only_those_that_do(world, caplog, monkeypatch, broken):
  monkeypatch.setattr(sys, "argv", ["train.py", "base.yml", "model_name=fake-model"])
  seams = {
    "contract": FakeSeam("second", world.second, world.unmet(), use=FAST),
    "module": FakeSeam("second", "fake_module_that_is_gone", use=FAST),
    "apply": FakeSeam("second", world.second, error=ZeroDivisionError("by chance"), use=FAST),
  }
  found = {"contract": "answer taking ()", "module": "ModuleNotFoundError", "apply": "ZeroDivisionError: by chance"}
  made = world.registry(seams[broken])
  assert world.configure("model_name=fake-model")[0] == ["", "model_name=fake-model"]
  assert world.answers() == [11, 1]
  assert states(made) == [State.APPLIED, State.FAILED] and made.usable
  made.require_for({"fast": False})
  for _ in range(2):
    with pytest.raises(Ling2Error) as error:
      made.require_for({"fast": True})
    text = str(error.value)
    assert says_all(text, found=found[broken]) and "a run with fast=true" in text and text.endswith("Or set fast=false.")
  assert len(made.violations) == 1 and not caplog.records


def test_without_a_seam_that_computes_nothing_a_run_goes_on_with_one_warning(world, caplog):
  made = world.registry(expectations=world.unmet(), use=REPORT)
  made.require_for({"fast": False})
  assert not caplog.records
  for _ in range(2):
    made.require_for({"fast": True})
  (record,) = caplog.records
  assert says_all(record.getMessage(), found="answer taking ()")
  assert record.getMessage().endswith("The run computes the same, without a report.")


def test_a_seam_of_commands_stops_only_those(world, monkeypatch, caplog):
  made = world.registry(needed=False, expectations=world.unmet())
  made.complete()
  assert world.answers() == [11, 1] and made.usable and not caplog.records
  assert world.configure("model_name=fake-model")
  made.require_for({})
  monkeypatch.setattr(made.seams[1], "concerns_this_process", lambda: True)
  with pytest.raises(Ling2Error) as error:
    world.configure("model_name=fake-model")
  assert says_all(str(error.value), found="answer taking ()")


def test_a_seam_of_all_runs_undoes_those_of_some(world):
  made = world.registry(use=FAST)
  assert world.answers() == [11, 11]
  made.undo()
  made.seams[0].expectations = world.unmet()
  made.install()
  assert world.answers() == [1, 1] and not made.usable
  assert states(made) == [State.FAILED, State.WAITING]
  with pytest.raises(Ling2Error, match="seam 'first'"):
    made.require_for({"fast": False})


# Modules that are imported again


class ConfigSeam(FakeSeam):
  """Adds a word to what the fake pyconfig is given."""

  def apply(self):
    module = importlib.import_module(self.module)
    self.patches.wrap(module, "initialize", lambda original, argv=None, **kwargs: original([*argv, "seam"], **kwargs))


def reloaded(name):
  importlib.reload(importlib.import_module(name))


def imported_again(name):
  del sys.modules[name]
  importlib.import_module(name)


@pytest.mark.parametrize("again", [reloaded, imported_again])
def test_a_configuration_imported_again_is_extended_again(world, again, caplog):
  made = world.registry(second=ConfigSeam("second", world.pyconfig))
  asked = []
  made.request_hook.on_request = lambda: asked.append(True)
  for count in (1, 2, 3):
    assert world.configure("model_name=fake-model") == (["", "model_name=fake-model", "seam"], {})
    assert len(asked) == count
    again(world.pyconfig)
  assert made.usable and not caplog.records


@pytest.mark.parametrize("again", [reloaded, imported_again])
def test_another_module_imported_again_is_told_to_who_asks(world, again, caplog):
  made = world.registry()
  assert world.answers() == [11, 11]
  assert world.configure("model_name=fake-model")
  again(world.first)
  assert world.configure("model_name=another") and not caplog.records
  with pytest.raises(Ling2Error, match=f"{world.first} was imported again .*; start a new process"):
    world.configure("model_name=fake-model")
  made.undo()
  made.install()
  assert world.answers() == [11, 11] and world.configure("model_name=fake-model")


def test_a_first_import_and_other_modules_are_left_alone(world, tmp_path):
  made = world.registry()
  (tmp_path / "bystander.py").write_text("")
  before = list(sys.meta_path)
  for name in (world.first, world.pyconfig, "bystander"):
    assert made._reloads.find_spec(name, None) is None
  made.undo()
  assert made._reloads not in sys.meta_path and made._reloads in before


@pytest.mark.parametrize(
  ("names", "needs"),
  [
    ({"__name__": "maxtext.checkpoint_conversion.to_maxtext"}, True),
    ({"__name__": "__main__", "__file__": "/env/maxtext/checkpoint_conversion/to_maxtext.py"}, True),
    ({"__name__": "__main__", "__file__": "/env/maxtext/trainers/pre_train/train.py"}, False),
    ({"__name__": "maxtext.inference.maxengine.maxengine"}, False),
  ],
  ids=["called in another process", "run as a file", "the trainer", "another command"],
)
def test_a_command_needs_its_seams_however_it_is_started(names, needs):
  namespace = dict(names)
  exec("def main(ask):\n  return ask()", namespace)
  (seam,) = (seam for seam in REGISTRY.seams if seam.name == "to_maxtext")
  assert not seam.concerns_this_process()
  assert namespace["main"](seam.concerns_this_process) == needs
