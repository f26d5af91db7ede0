"""MaxText moves on: whatever a seam needs is removed, renamed, moved or takes other parameters, one thing at a time.

If every LING2 run needs the seam, a stock model must be as if the plugin were not there, with one warning, and LING2 must
be refused by an error that names the seam, what it expected, what it found and what to do. If only some runs need it,
these must be refused by that error, and the others must not notice.

Here it is done to the imported MaxText, for every expectation, and configs are built; in test_drift_in_the_source.py it
is done to copies of its source, for some, and models are trained.
"""

import contextlib
import importlib
import importlib.machinery
import inspect
import os
import sys
import tempfile
import types
from pathlib import Path

import drift_runs
import pytest
from drift_cases import AT_RUN_TIME, COMMANDS, REGISTRY, UNUSED, USES, first, owners, parametrize, refused
from drift_source import NEW

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host import patches
from maxtext_ling2.host.contract import resolve
from maxtext_ling2.host.registry import State
from test_docs import script

pytestmark = pytest.mark.drift


@contextlib.contextmanager
def changed(case):
  """MaxText with this one thing otherwise."""
  with contextlib.ExitStack() as undo:
    if case.command:
      _change_command(case, undo)
    elif case.kind == "resigned":
      _resign(resolve(f"{case.module}:{case.path}"), case.parameter, undo)
    else:
      _take_away(case, undo)
    yield


def _take_away(case, undo):
  """Deletes an attribute. Renamed, it is there under a new name, by which the functions of its module now know it."""
  *path, name = case.path.split(".")
  owner = importlib.import_module(case.module)
  for part in path:
    owner = getattr(owner, part)
  if isinstance(owner, type):  # it may be inherited
    owner = next(base for base in owner.__mro__ if name in vars(base))
  value = inspect.getattr_static(owner, name)
  delattr(owner, name)
  undo.callback(setattr, owner, name, value)
  if case.kind == "renamed":
    setattr(owner, name + NEW, value)
    undo.callback(delattr, owner, name + NEW)
    for function in _functions(importlib.import_module(case.module)):
      code = function.__code__
      if name in code.co_names:
        undo.callback(setattr, function, "__code__", code)
        function.__code__ = code.replace(co_names=tuple(known + NEW * (known == name) for known in code.co_names))


def _functions(module):
  """The functions of a module and of its classes."""
  for value in vars(module).values():
    if getattr(value, "__module__", None) == module.__name__:
      members = vars(value).values() if isinstance(value, type) else [value]
      yield from (member for member in members if inspect.isfunction(member))


def _resign(value, parameter, undo):
  """Shows another name of a parameter."""
  value = getattr(value, "__func__", value)
  signature = inspect.signature(value)
  names = [entry.replace(name=name + NEW * (name == parameter)) for name, entry in signature.parameters.items()]
  value.__signature__ = signature.replace(parameters=names)
  undo.callback(delattr, value, "__signature__")


def _change_command(case, undo):
  """Lets the module's source, which is all that a contract reads of it, be another file."""
  text = importlib.util.find_spec(case.module).loader.get_source(case.module)
  head, _, tail = text.partition(f"\ndef {case.path}(")
  if case.kind == "resigned":
    tail = tail.replace(case.parameter, case.parameter + NEW)
  text = head if case.kind == "removed" else f"{head}\ndef {case.path}{NEW * (case.kind == 'renamed')}({tail}"
  file = Path(undo.enter_context(tempfile.TemporaryDirectory())) / "command.py"
  file.write_text(text)
  before = sys.modules.get(case.module)
  module = types.ModuleType(case.module)
  module.__spec__ = importlib.machinery.ModuleSpec(case.module, None, origin=str(file))
  sys.modules[case.module] = module
  undo.callback(lambda: sys.modules.pop(case.module) if before is None else sys.modules.update({case.module: before}))


def noting(method, seen):
  """A method of Patches that also notes what it is called with."""

  def noted(self, owner, name, value):
    seen.append((owner, name, value, self))
    return method(self, owner, name, value)

  return noted


class Stock:
  """MaxText as it is without the plugin, and all that the plugin replaces in it."""

  def __init__(self):
    from maxtext.common.common_types import DecoderBlockType
    from maxtext.configs import pyconfig
    from maxtext.configs import types as config_types

    self.base = os.path.join(pyconfig.MAXTEXT_CONFIGS_DIR, "base.yml")
    self.places, self.entries = self._replaced()
    self.enum = DecoderBlockType
    self.configs = [value for value in vars(config_types).values() if hasattr(value, "model_fields")]
    assert len(self.places) > 20 and len(self.entries) > 15 and len(self.configs) > 60

  def _replaced(self):
    """What the seams replace, noted while they do it."""
    places, entries = [], []
    self.wraps = []
    with pytest.MonkeyPatch.context() as patch:
      for method, seen in (("attribute", places), ("entry", entries), ("wrap", self.wraps)):
        patch.setattr(patches.Patches, method, noting(getattr(patches.Patches, method), seen))
      REGISTRY.install()
      REGISTRY.complete()
    assert REGISTRY.usable and REGISTRY.undo() == []
    names = {id(seam.patches): seam.name for seam in REGISTRY.seams}
    self.seams = {}
    for owner, name, _, by in (*places, *entries):
      self.seams.setdefault((id(owner), name), set()).add(names.get(id(by)))
    return [place[:2] for place in places], [entry[:2] for entry in entries]

  def objects(self):
    """Every object that the plugin replaces, by its place, and of what it extends the parts."""
    guarded = ("initialize", "initialize_pydantic")  # RequestHook stays
    places = [place for place in self.places if place[1] not in guarded]
    found = {(id(owner), name): inspect.getattr_static(owner, name, None) for owner, name in places}
    found |= {(id(mapping), key): mapping.get(key) for mapping, key in self.entries}
    found |= {("decoder block", name): member for name, member in self.enum.__members__.items()}
    for cls in self.configs:
      found |= {(cls, name): field for name, field in cls.model_fields.items()}
      validators = cls.__pydantic_decorators__.model_validators
      found |= {(cls, "validator", name): value.func for name, value in validators.items()}
    return found

  def objects_of(self, seam):
    """Those that this seam alone replaces."""
    return {place: value for place, value in self.objects().items() if self.seams.get(place) == {seam.name}}

  def config(self, model, **settings):
    from maxtext.configs import pyconfig

    initialize = getattr(pyconfig, "initialize", pyconfig.initialize_pydantic)
    return initialize(["", self.base], model_name=model, **drift_runs.SETTINGS | settings)


@pytest.fixture(scope="module")
def untouched():
  REGISTRY.complete()
  assert REGISTRY.usable and REGISTRY.undo() == []
  yield Stock()
  REGISTRY.install()
  REGISTRY.complete()
  assert REGISTRY.usable
  assert {seam.state for seam in REGISTRY.seams} == {State.APPLIED}


@pytest.fixture
def stock(untouched):
  yield untouched
  REGISTRY.undo()


ALL = [case for found in AT_RUN_TIME.values() for case in found]
FIRST = [case for found in AT_RUN_TIME.values() for case in first(found)]
OF_ALL_RUNS = [case for case in ALL if any(seam.is_core for seam in owners(case))]
OF_SOME_RUNS = [case for case in ALL if case not in OF_ALL_RUNS]
SCAN = [case for case in OF_ALL_RUNS if case.path == "apply_scanned_layers"]


@parametrize(OF_ALL_RUNS, often=[*(case for case in FIRST if case in OF_ALL_RUNS), *SCAN])
def test_changed_at_run_time(stock, case, caplog):
  with changed(case):
    before = stock.objects()
    REGISTRY.install()
    REGISTRY.complete()
    (record,) = caplog.records
    assert record.name == "maxtext_ling2" and record.levelname == "WARNING" and refused(record.getMessage(), case)
    after = stock.objects()
    assert [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)] == []
    with pytest.raises(Ling2Error) as error:
      stock.config("ling2-tiny")
    assert refused(str(error.value), case)
    # Who removes something does not call it either, which this MaxText would; and a config takes a second.
    if case.kind == "renamed" and case in FIRST:
      assert stock.config("llama2-7b").base_emb_dim == 32
  assert REGISTRY.undo() == [] and REGISTRY.usable
  assert [record.name for record in caplog.records].count("maxtext_ling2") == 1


@parametrize(OF_SOME_RUNS, often=OF_SOME_RUNS[::8])
def test_changed_at_run_time_for_some_runs(stock, case, caplog, monkeypatch):
  with changed(case):
    before = {seam: stock.objects_of(seam) for seam in owners(case)}
    REGISTRY.install()
    REGISTRY.complete()
    assert REGISTRY.usable and not caplog.records
    assert [seam for seam in REGISTRY.seams if seam.state is not State.APPLIED] == owners(case)
    for seam, objects in before.items():
      assert [key for key, value in stock.objects_of(seam).items() if objects[key] is not value] == []
    if case.kind == "renamed" and case in FIRST:
      unused = {key: value for seam in owners(case) for key, value in UNUSED.get(seam.name, {}).items()}
      assert stock.config("ling2-tiny", **unused).group_norm_size == 4
    for seam in owners(case):
      check_use(stock, seam, case, caplog, monkeypatch)
  assert REGISTRY.undo() == []


def check_use(stock, seam, case, caplog, monkeypatch):
  """A run that uses the seam is refused; of one that computes the same without it, there is a warning."""
  if seam.use is not None and not seam.use.essential:
    REGISTRY.require_for(types.SimpleNamespace(**USES[seam.name]))
    (text,) = {record.getMessage() for record in caplog.records if "seam '" in record.getMessage()}
    assert refused(text, case) and seam.use.instead in text
    return
  if not seam.needed_for_training:
    spec = importlib.machinery.ModuleSpec(COMMANDS[seam.name], None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
  with pytest.raises(Ling2Error) as error:
    stock.config("ling2-tiny", **USES.get(seam.name, {}))
  assert refused(str(error.value), case)
  if seam.use is not None:
    assert seam.use.setting in str(error.value) and seam.use.instead in str(error.value)


def test_a_renamed_function_that_only_the_model_calls_is_among_the_cases():
  """Without a contract it would be an AttributeError while the model is traced."""
  assert {case.kind for case in SCAN} == {"removed", "renamed", "resigned"}


def test_each_seam_that_some_runs_need_is_among_the_cases():
  assert {seam.name for seam in REGISTRY.seams if seam.use is not None} == set(USES)
  assert {seam.name for seam in REGISTRY.seams if not seam.needed_for_training} == set(COMMANDS)


STYLES = ("by keyword", "one inserted", "one appended")
CONFIG = types.SimpleNamespace(decoder_block="llama2", load_parameters_path="")
GIVEN = {
  "config": CONFIG, "mt_config": CONFIG, "metrics": {}, "raw_keys": {}, "argv": ["", "base.yml"], "weight_arrays": {},
  "self": types.SimpleNamespace(config=CONFIG),
}  # fmt: skip
"""Arguments that a wrapper looks at; any other is just its name."""


def answers():
  """What a wrapper looks at of what MaxText returns."""
  from flax import nnx

  return {
    "_resolve_or_infer_config": ("base.yml", []),
    "_load_config": {},
    "split_for_checkpoint": (nnx.State({}),) * 3,
    "load_state_if_possible": ({}, None),
    "initialize": CONFIG,
  }


def call_in(style, signature):
  """A signature and the arguments of a call, with all by keyword, or one more after the first or the last."""
  listed = [
    entry for entry in signature.parameters.values() if entry.kind not in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD)
  ]
  own = [entry for entry in listed if entry.name == "self"]
  listed = [entry for entry in listed if entry.name != "self"]
  one_more = inspect.Parameter("one_more", inspect.Parameter.POSITIONAL_OR_KEYWORD)
  if style == "one inserted":
    listed = [entry.replace(default=entry.empty) for entry in (*listed[:1], one_more, *listed[1:])]
  elif style == "one appended":
    listed.append(one_more.replace(kind=inspect.Parameter.KEYWORD_ONLY))
  positional = [] if style == "by keyword" else [entry for entry in listed if entry.kind is not entry.KEYWORD_ONLY]
  args = [GIVEN.get(entry.name, entry.name) for entry in (*own, *positional)]
  kwargs = {entry.name: GIVEN.get(entry.name, entry.name) for entry in listed if entry not in positional}
  return signature.replace(parameters=[*own, *listed]), args, kwargs


def _signature(value):
  """The signature of a function or, without `self`, of what makes an object of a class, whose metaclass hides it."""
  if not isinstance(value, type):
    return inspect.signature(inspect.unwrap(value))
  signature = inspect.signature(value.__init__)
  return signature.replace(parameters=list(signature.parameters.values())[1:])


@pytest.mark.parametrize("style", STYLES)
def test_a_stock_model_may_be_called_in_other_ways(stock, style):
  """Contracts let other parameters stand between and after; whatever MaxText passes must arrive, however it does."""
  for owner, name, wrapper, _ in stock.wraps:
    signature, args, kwargs = call_in(style, _signature(getattr(owner, name)))
    seen = []

    def original(*args, _seen=seen, _name=name, **kwargs):
      _seen.append((args, kwargs))
      return answers().get(_name)

    original.__signature__ = signature
    wrapper(original, *args, **kwargs)
    ((given, named),) = seen
    assert signature.bind(*given, **named) == signature.bind(*args, **kwargs), name
  assert len(stock.wraps) >= 20


def test_the_page_is_what_the_contracts_say():
  page = Path(__file__).parents[2] / "docs" / "compatibility.md"
  assert page.read_text() == script("compatibility").page()
