"""What a run will write, in words: bytes of a checkpoint, how often there is one, how many are kept."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
  """Lines for the log.

  Attributes:
    line: the plan.
    warning: why the run would leave no checkpoint; "": it leaves one.
  """

  line: str
  warning: str = ""


def report(config: Any, size: int) -> Report:
  """What the checkpoints of a run will be.

  Args:
    config: MaxText config with enable_checkpointing=true.
    size: bytes of the arrays in one.
  """
  number = len(saved_steps(config))
  end = ", and one at the end" if config.save_checkpoint_on_completion else ""
  line = (
    f"a checkpoint has {readable(size)} of arrays; {_how_often(config)}{end}; {_how_many(config, number, size)}; in "
    f"{config.checkpoint_dir}"
  )
  if number or config.enable_continuous_checkpointing:
    return Report(line)
  at_completion = str(config.save_checkpoint_on_completion).lower()
  return Report(
    line,
    f"checkpoint_period={config.checkpoint_period}, steps={config.steps}, save_checkpoint_on_completion={at_completion}: "
    "this run writes no checkpoint unless a signal stops it; set a smaller checkpoint_period, or "
    + ("more steps" if config.save_checkpoint_on_completion else "save_checkpoint_on_completion=true"),
  )


def _how_often(config: Any) -> str:
  if config.enable_continuous_checkpointing:
    return "one is written whenever the one before is complete"
  return f"one is written every {config.checkpoint_period} steps"


def _how_many(config: Any, number: int, size: int) -> str:
  """How many are kept, of a `number` that is not known in advance with continuous checkpointing."""
  kept, continuous = config.max_num_checkpoints_to_keep, config.enable_continuous_checkpointing
  if kept:
    return f"the last {kept} are kept: {readable((kept if continuous else min(kept, number)) * size)}"
  all_of_them = "all are kept (max_num_checkpoints_to_keep is not set)"
  return all_of_them if continuous else f"{all_of_them}: {number} with {readable(number * size)} at the end"


def saved_steps(config: Any) -> list[int]:
  """The steps after which MaxText saves in a run from step 0 to its end, without continuous checkpointing."""
  first = 0 if config.save_checkpoint_on_start else config.checkpoint_period
  steps = list(range(first, config.steps, config.checkpoint_period))
  last = config.steps - 1
  # MaxText saves no multiple of the period at completion; 0 is one.
  if config.save_checkpoint_on_completion and last % config.checkpoint_period:
    steps.append(last)
  return steps


def readable(size: int) -> str:
  """A number of bytes with three digits, in units of 1000."""
  value, unit = float(size), "bytes"
  for larger in ("kB", "MB", "GB", "TB", "PB"):
    if value < 999.5:
      break
    value, unit = value / 1000, larger
  return f"{value:.3g} {unit}"
