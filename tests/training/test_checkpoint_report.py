"""What a run says of its checkpoints before it has one."""

import types

import pytest

from maxtext_ling2.training.checkpoint_report import readable, report, saved_steps

pytestmark = pytest.mark.unit

CONFIG = {
  "checkpoint_period": 10,
  "steps": 25,
  "save_checkpoint_on_start": False,
  "save_checkpoint_on_completion": True,
  "max_num_checkpoints_to_keep": 2,
  "enable_continuous_checkpointing": False,
  "checkpoint_dir": "/runs/a/checkpoints/",
}


def config(**changes):
  return types.SimpleNamespace(**CONFIG | changes)


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({}, [10, 20, 24]),
    ({"save_checkpoint_on_completion": False}, [10, 20]),
    ({"save_checkpoint_on_start": True}, [0, 10, 20, 24]),
    ({"steps": 21}, [10, 20]),  # the last step is a multiple of the period
    ({"checkpoint_period": 100}, [24]),
    ({"checkpoint_period": 25, "save_checkpoint_on_completion": False}, []),
    ({"steps": 1}, []),  # MaxText saves nothing after step 0
  ],
)
def test_the_steps_that_maxtext_saves(changes, expected):
  assert saved_steps(config(**changes)) == expected


def test_what_is_said():
  said = report(config(), 1_500_000_000)
  assert said.line == (
    "a checkpoint has 1.5 GB of arrays; one is written every 10 steps, and one at the end; the last 2 are kept: 3 GB; "
    "in /runs/a/checkpoints/"
  )
  assert said.warning == ""
  said = report(config(max_num_checkpoints_to_keep=None, save_checkpoint_on_completion=False), 1000)
  assert said.line == (
    "a checkpoint has 1 kB of arrays; one is written every 10 steps; all are kept (max_num_checkpoints_to_keep is not "
    "set): 2 with 2 kB at the end; in /runs/a/checkpoints/"
  )
  said = report(config(enable_continuous_checkpointing=True, checkpoint_period=100), 1000)
  assert said.line == (
    "a checkpoint has 1 kB of arrays; one is written whenever the one before is complete, and one at the end; the last 2 "
    "are kept: 2 kB; in /runs/a/checkpoints/"
  )


def test_a_run_without_a_checkpoint_is_warned():
  said = report(config(checkpoint_period=25, save_checkpoint_on_completion=False), 1000)
  assert said.warning == (
    "checkpoint_period=25, steps=25, save_checkpoint_on_completion=false: this run writes no checkpoint unless a signal "
    "stops it; set a smaller checkpoint_period, or save_checkpoint_on_completion=true"
  )
  said = report(config(steps=1), 1000)
  assert said.warning == (
    "checkpoint_period=10, steps=1, save_checkpoint_on_completion=true: this run writes no checkpoint unless a signal "
    "stops it; set a smaller checkpoint_period, or more steps"
  )
  continuous = config(checkpoint_period=25, save_checkpoint_on_completion=False, enable_continuous_checkpointing=True)
  assert report(continuous, 1000).warning == ""


@pytest.mark.parametrize(
  ("size", "text"),
  [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (888_123, "888 kB"), (999_600, "1 MB"), (2.04e14, "204 TB")],
)
def test_sizes(size, text):
  assert readable(int(size)) == text
