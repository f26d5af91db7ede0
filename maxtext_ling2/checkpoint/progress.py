"""The progress bar of a conversion: bytes, tensors, speed and remaining time."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from maxtext_ling2 import terminal

Advance = Callable[[int, int], None]
"""Called with the number of bytes and tensors finished since the last call."""


def console() -> Console:
  """The console of the progress bar: standard error; wide if redirected, so that its line is not wrapped."""
  return terminal.console(stderr=True, width=120, soft_wrap=False)


@contextlib.contextmanager
def bar(console: Console, title: str, size: int, tensors: int) -> Iterator[Advance]:
  """Shows a bar within the context; on a console that is not a terminal, prints a line per percent.

  Args:
    console: where the bar is shown.
    title: text before the bar.
    size: total bytes.
    tensors: total number of tensors.
  """
  columns = (
    terminal.text_column("{task.description}"),
    BarColumn(),
    DownloadColumn(binary_units=True),
    terminal.text_column("{task.fields[done]}/{task.fields[tensors]} tensors"),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
  )
  with Progress(*columns, console=console) as progress:
    task = progress.add_task(title, total=size, done=0, tensors=tensors)
    done = written = percent = 0

    def advance(nbytes: int, count: int) -> None:
      nonlocal done, written, percent
      done += count
      written += nbytes
      progress.update(task, advance=nbytes, done=done)
      if not console.is_terminal and 100 * written // size > percent:
        percent = 100 * written // size
        console.print(f"{title}: {written:,} of {size:,} bytes, {done:,} of {tensors:,} tensors", soft_wrap=True)

    yield advance
