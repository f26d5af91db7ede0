"""Shows how far a stock command is: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn

from maxtext_ling2 import terminal
from maxtext_ling2.stock_command.log import Log
from maxtext_ling2.stock_command.metrics import MetricsFile

_LINE_SECONDS = 10
_LINES = 50  # per run, roughly: a line when this part of the time has passed since the last one

STARTING = "starting MaxText, compiling"


def duration(seconds: float) -> str:
  """A duration in the two largest of its units."""
  whole = round(seconds)
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    return f"{whole // 60} min {whole % 60:02} s"
  return f"{whole // 3600} h {whole % 3600 // 60:02} min"


class Shown:
  """A bar, or lines, for a count that rises to a total; lines of a log go above the bar.

  Args:
    console: where it is shown.
    waiting: what is done before the first count.
    unit: name of what is counted.
    digits: decimals of the counts.
  """

  def __init__(self, console: Console, waiting: str, unit: str, digits: int = 0):
    self.console, self.unit, self._digits = console, unit, digits
    columns = (
      terminal.text_column("{task.description}"),
      BarColumn(bar_width=20),  # the whole fits 80 columns
      terminal.text_column("{task.fields[text]}"),
      TimeElapsedColumn(),
    )
    self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
    self._task = self._bar.add_task(waiting, total=None, text="")
    self._began = self._line = time.monotonic()
    self._first: tuple[float, float] | None = None
    self._last_line = ""
    if not console.is_terminal:
      console.print(f"{waiting} ...")

  def __enter__(self) -> Self:
    self._bar.start()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    if self._last_line:
      self.console.print(self._last_line)
    self._bar.stop()

  def say(self, text: str) -> None:
    """Prints a line."""
    self._bar.console.print(text)

  def stage(self, text: str) -> None:
    """Changes what is done before the first count."""
    self._bar.update(self._task, description=text)

  def advance(self, count: float, total: float, text: str) -> None:
    """Shows a new count.

    Args:
      count: how much is done.
      total: how much there is to do.
      text: what else is known, such as the loss.
    """
    now = time.monotonic()
    self._first = self._first or (now, count)
    left = self._left(now, count, total)
    counts = f"{count:,.{self._digits}f}/{total:,.{self._digits}f}"
    self._bar.update(self._task, total=total, completed=count, text=f"{counts} {text}  {left}")
    if not self.console.is_terminal:
      self._last_line = f"{self.unit} {counts}, {text}, {left}"
      if now - self._line >= max(_LINE_SECONDS, (now - self._began) / _LINES):
        self.console.print(self._last_line)
        self._line, self._last_line = now, ""

  def _left(self, now: float, count: float, total: float) -> str:
    began, first = self._first or (now, count)
    if count == first and count < total:
      return "time left not known yet"
    return f"about {duration((now - began) / max(count - first, 1) * (total - count))} left"


class Training:
  """The progress of a trainer, by its metrics_file and its log.

  Args:
    shown: where it is shown.
    metrics: its metrics_file.
    log: its log.
    steps: number of the run's steps.
  """

  def __init__(self, shown: Shown, metrics: MetricsFile, log: Log, steps: int):
    self.shown, self.metrics, self.log, self.steps = shown, metrics, log, steps
    self._step = -1

  def watch(self) -> None:
    """Shows what is new."""
    for line in self.log.news():
      self.shown.say(line)
    self.metrics.read()
    if self.metrics.last is None:
      if self.log.stage:
        self.shown.stage(self.log.stage)
      return
    step, loss = self.metrics.last
    if step != self._step:
      self._step = step
      self.shown.stage("training")
      self.shown.advance(step + 1, self.steps, f"loss {loss:.3f}")
