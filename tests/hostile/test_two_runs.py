"""Two runs of MaxText's trainer at the same time in one output folder, under two names and under one."""

import re

import numpy as np
import pytest

from training.stock_runs import arguments, checkpoint, metrics, run, start, write_documents

pytestmark = [pytest.mark.hostile, pytest.mark.slow]

BEFORE, TOGETHER, STEPS = 4, 19, 24  # each ends with a checkpoint that a straight run has, too
SETTINGS = {"checkpoint_period": 3, "async_checkpointing": True}
OTHER = {"data_shuffle_seed": 5}  # of run b


def both(folder, *runs):
  """Does the runs at the same time; returns (exit code, what it printed) of each."""
  processes = [start(folder, words) for words in runs]
  outputs = [process.communicate()[0] for process in processes]
  return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def saved(folder, name):
  return sorted(int(path.name) for path in (folder / name / "checkpoints").iterdir() if path.name.isdigit())


def assert_same(ours, theirs):
  assert set(ours) == set(theirs)
  for path, value in theirs.items():
    np.testing.assert_array_equal(ours[path], value, err_msg=path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def settings(folder):
  return write_documents(folder) | SETTINGS


@pytest.fixture(scope="module")
def alone(folder, settings):
  """Runs a and b one after the other, each in a folder of its own; and the first steps of a in the folder for `same`."""
  for name in ("alone_a", "alone_b", "same"):
    (folder / name).mkdir()
  run(
    folder,
    arguments(folder / "alone_a", "a", "a", STEPS, **settings),
    arguments(folder / "alone_b", "b", "b", STEPS, **settings | OTHER),
    arguments(folder / "same", "a", "before", BEFORE, **settings),
  )
  return folder


@pytest.fixture(scope="module")
def together(folder, settings):
  """Runs a and b at the same time in one folder."""
  (folder / "shared").mkdir()
  first = arguments(folder / "shared", "a", "a", STEPS, **settings)
  second = arguments(folder / "shared", "b", "b", STEPS, **settings | OTHER)
  return both(folder, first, second)


@pytest.fixture(scope="module")
def same(alone, settings):
  """Run a twice at the same time, into the same folder, where both go on from its first checkpoint."""
  return both(alone, *(arguments(alone / "same", "a", number, TOGETHER, **settings) for number in (1, 2)))


@pytest.mark.parametrize("name", ["a", "b"])
def test_two_names_do_not_disturb_each_other(alone, together, name):
  assert [code for code, _ in together] == [0, 0], together[0][1][-2000:] + together[1][1][-2000:]
  shared, own = alone / "shared", alone / f"alone_{name}"
  assert metrics(shared, name) == metrics(own, name)
  assert saved(shared, name) == saved(own, name) and saved(own, name) == [*range(3, STEPS, 3), STEPS - 1]
  for step in (3, STEPS - 1):
    assert_same(checkpoint(shared, name, step), checkpoint(own, name, step))


def test_runs_a_and_b_differ(alone):
  assert metrics(alone / "alone_a", "a") != metrics(alone / "alone_b", "b")


def test_one_name_twice_mixes_nothing(alone, same, settings):
  """The one takes the other's unfinished checkpoint for a left-over and removes it: both may end with an error, as Orbax
  names unfinished checkpoints by their step alone. What is there afterwards is whole, and a third run ends what they
  began.
  """
  folder, straight = alone / "same", metrics(alone / "alone_a", "a")
  for code, output in same:
    assert code == 0 or re.search("^[^ ]*Error: .*checkpoint", output, re.I | re.M), output[-3000:]
  steps = saved(folder, "a")
  assert BEFORE - 1 in steps and set(steps) <= set(saved(alone / "alone_a", "a"))
  assert TOGETHER - 1 in steps or all(code != 0 for code, _ in same)  # no success without its checkpoint
  run(alone, arguments(folder, "a", "after", STEPS, **settings))
  assert STEPS - 1 in saved(folder, "a")
  found = [metrics(folder, file.stem) for file in folder.glob("*.jsonl")]  # one of the two may come too late for any
  for one in found:
    assert {step: straight[step] for step in one} == one
  assert set().union(*found) >= set(straight) - {steps[-1]}  # a step's metrics are written after the next one
  for step in saved(folder, "a"):
    assert_same(checkpoint(folder, "a", step), checkpoint(alone / "alone_a", "a", step))
