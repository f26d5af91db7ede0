"""A progress bar of a conversion: bytes, tensors, speed and remaining time."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int, int], None]
"""Called with the bytes and the tensors that are done since the last call."""


@contextlib.contextmanager
def bar(console: Console, title: str, size: int, tensors: int) -> Iterator[Advance]:
  """Shows a bar for the time of the block; on a console that is no terminal, one line when it is over.

  Args:
    console: where to.
    title: what is done.
    size: bytes of the whole.
    tensors: number of tensors of the whole.
  """
  columns = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(binary_units=True),
    TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors"),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
  )
  with Progress(*columns, console=console) as progress:
    task = progress.add_task(title, total=size, done=0, tensors=tensors)
    done = 0

    def advance(nbytes: int, count: int) -> None:
      nonlocal done
      done += count
      progress.update(task, advance=nbytes, done=done)

    yield advance
