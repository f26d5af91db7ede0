"""A step finds other functions under its module's names while it is traced, and its own again afterwards."""

import pytest

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host.contract import HINT
from maxtext_ling2.host.step_globals import patched_globals

MODULE = {}
exec("def loss(x): return x\ndef norm(x): return 2 * x\ndef step(x): return loss(x) + norm(x)", MODULE)
STEP = MODULE["step"]
PARTS = {name: MODULE[name] for name in ("loss", "norm")}


def doubled(function):
  return lambda x: 2 * function(x)


def is_as_before():
  return STEP(5) == 15 and {name: MODULE[name] for name in PARTS} == PARTS


def test_one_or_more_are_replaced_and_restored():
  with patched_globals(STEP, loss=doubled):
    assert STEP(5) == 20
  assert is_as_before()
  with patched_globals(STEP, loss=doubled, norm=lambda _: lambda x: 0):
    assert STEP(5) == 10
  assert is_as_before()


def test_they_are_restored_after_an_error():
  with pytest.raises(ZeroDivisionError), patched_globals(STEP, loss=lambda _: lambda x: 1 / 0):
    STEP(5)
  assert is_as_before()


def test_a_name_that_maxtext_does_not_have_is_told_before_anything_is_replaced():
  with pytest.raises(Ling2Error) as error, patched_globals(STEP, loss=doubled, gone=doubled, lost=doubled):
    raise AssertionError("entered")
  assert "MaxText's step has no gone and no lost that LING2 could replace" in str(error.value) and HINT in str(
    error.value
  )
  assert is_as_before()
