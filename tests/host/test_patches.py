"""Calls of MaxText's functions, answered by a handler for a LING2 config, however their arguments are passed."""

import types

import pytest
from handlers import wrapped

from maxtext_ling2.host.patches import Patches

LING2, OTHER = (types.SimpleNamespace(decoder_block=block) for block in ("ling2", "llama2"))
AS_ENUM = types.SimpleNamespace(decoder_block=types.SimpleNamespace(value="ling2"))


def function(first, config, *rest, step=None, **more):
  return "MaxText", first, config, rest, step, more


def handler(call):
  call["step"] = ("wrapped", call["step"])
  return call.original()


@pytest.mark.parametrize("config", [LING2, AS_ENUM])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_call_for_ling2_is_the_handlers(config, by_name):
  changed = wrapped(handler, function)
  answer = changed(first=1, config=config, step=3, new=4) if by_name else changed(1, config, step=3, new=4)
  assert answer == ("MaxText", 1, config, (), ("wrapped", 3), {"new": 4})


def test_another_call_is_maxtexts_with_all_its_arguments():
  changed = wrapped(handler, function)
  assert changed(1, OTHER, 2, 3, step=4, new=5) == ("MaxText", 1, OTHER, (2, 3), 4, {"new": 5})
  assert changed(1, None, step=4) == ("MaxText", 1, None, (), 4, {})


def test_the_config_may_be_that_of_self():
  class Logger:
    def __init__(self, config):
      self.config = config

    def record(self, metrics):
      return metrics

  Logger.record = wrapped(lambda call: {**call["metrics"], "ours": call.config}, Logger.record)
  assert Logger(LING2).record({"a": 1}) == {"a": 1, "ours": LING2}
  assert Logger(OTHER).record(metrics={"a": 1}) == {"a": 1}


def test_a_class_with_a_metaclass_that_hides_its_parameters():
  class Meta(type):
    def __call__(cls, *args, **kwargs):
      return super().__call__(*args, **kwargs)

  class Module(metaclass=Meta):
    def __init__(self, config, mesh):
      self.config, self.mesh = config, mesh

  built = wrapped(lambda call: call.to(lambda config, mesh: ("ours", config, mesh)), Module)
  assert built(LING2, mesh=1) == ("ours", LING2, 1)
  stock = built(config=OTHER, mesh=1)
  assert type(stock) is Module and (stock.config, stock.mesh) == (OTHER, 1)


def test_an_argument_that_is_not_passed():
  changed = wrapped(lambda call: (call.get("step", "absent"), call.get("first", "absent")), function)
  assert changed(1, LING2) == ("absent", 1)


def test_items_are_restored_in_their_order():
  patches, mapping = Patches(), {"a": 1, "b": 2, "c": 3}
  patches.item(mapping, "b", 20)
  patches.item(mapping, "d", 40)
  patches.item(mapping, "b", 200)
  assert mapping == {"a": 1, "b": 200, "c": 3, "d": 40}
  assert patches.undo() == []
  assert list(mapping.items()) == [("a", 1), ("b", 2), ("c", 3)]
