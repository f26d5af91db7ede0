"""Reads the losses that MaxText writes to its metrics_file, one JSON object per step, while it writes them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

LOSS = "learning/lm_loss"
"""Mean cross-entropy of the next token, in nats: without what MTP and the router add to the objective."""

MTP_LOSS = "learning/mtp_loss"
"""The part of the objective that MTP adds: its mean cross-entropy times mtp_loss_scaling_factor."""

_SECONDS = "perf/step_time_seconds"
_RATE = "perf/per_device_tokens_per_sec"
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class Losses:
  """Losses in nats, one per step.

  Attributes:
    main: loss of the next token.
    mtp: loss of the token after it, times mtp_loss_scaling_factor; zeros if the model has no MTP layer.
    steps: number of each step, counted from 0; empty: they are 0, 1, 2, ...
  """

  main: list[float]
  mtp: list[float]
  steps: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Record:
  """What is kept of a line."""

  loss: float
  mtp: float
  seconds: float
  tokens: float
  mine: bool


class MetricsFile:
  """A metrics_file that grows. What it holds at the beginning is of former runs of the same name.

  Args:
    path: the file, which need not exist yet.

  Attributes:
    last: number and loss of the step that this run has reported last; None: none yet.
  """

  def __init__(self, path: Path):
    self.path = path
    self.last: tuple[int, float] | None = None
    self._records: dict[int, _Record] = {}
    self._position, self._head = 0, b""
    self._mine = False
    self.read()
    self._mine = True

  def read(self) -> None:
    """Reads what was written since the last call. Of several records of a step, the last one counts."""
    if not self.path.is_file():
      return
    with self.path.open("rb") as file:
      if file.read(len(self._head)) != self._head:  # MaxText has begun the file again
        self._position, self._head, self._records = 0, b"", {}
      file.seek(self._position)
      # After the last newline there may be a line that is still being written.
      whole, newline, _ = file.read().rpartition(b"\n")
      if self._position == 0:
        self._head = (whole + newline)[:_HEAD_BYTES]
    self._position += len(whole) + len(newline)
    for line in filter(None, whole.split(b"\n")):
      self._add(json.loads(line))

  def _add(self, record: dict[str, float]) -> None:
    if LOSS not in record:  # of an evaluation
      return
    step, seconds = int(record.get("step", len(self._records))), record.get(_SECONDS, 0.0)
    tokens = seconds * record.get(_RATE, 0.0)
    self._records[step] = _Record(record[LOSS], record.get(MTP_LOSS, 0.0), seconds, tokens, self._mine)
    if self._mine:
      self.last = step, record[LOSS]

  @property
  def losses(self) -> Losses:
    """The losses of all steps, in the order of the steps."""
    return self._losses(self._records)

  def trained(self) -> Losses:
    """The losses of the steps of this run alone."""
    return self._losses(step for step, record in self._records.items() if record.mine)

  def _losses(self, steps: Iterable[int]) -> Losses:
    ordered = sorted(steps)
    records = [self._records[step] for step in ordered]
    return Losses([record.loss for record in records], [record.mtp for record in records], ordered)

  def tokens_per_second(self) -> float | None:
    """Tokens per second and device over this run's steps but the first two, in which programs start; None: too few."""
    records = [self._records[step] for step in self.trained().steps[2:]]
    seconds = sum(record.seconds for record in records)
    return sum(record.tokens for record in records) / seconds if seconds else None
