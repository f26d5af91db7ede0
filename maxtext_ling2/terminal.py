"""What the commands print: text as it is, in one kind of console."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text


def console(*, stderr: bool = False, width: int | None = None, **options: Any) -> Console:
  """A console that prints text as it is: `[tpu]` is no markup, `:key:` no emoji, a number not coloured.

  A colour is an argument: `print(text, style="red")`.

  Args:
    stderr: standard error in place of standard output.
    width: columns of the tables where the output is no terminal; None: rich's 80. Text is never broken into lines.
    **options: as of rich's Console.
  """
  stream = sys.stderr if stderr else sys.stdout
  columns = None if stream.isatty() else width
  plain = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
  return Console(stderr=stderr, width=columns, **(plain | options))


def labelled(label: str, style: str, text: str) -> Text:
  """A text after a label of another style."""
  return Text.assemble((label, style), " ", text)


def text_column(form: str) -> TextColumn:
  """A column of a progress bar with a text as it is, such as `{task.description}`."""
  return TextColumn(form, markup=False)


def print_error(text: str) -> None:
  """Prints `error: TEXT` on standard error."""
  console(stderr=True).print(labelled("error:", "red", text))


def say_loading() -> None:
  """Says on standard error what the next seconds are spent on."""
  console(stderr=True).print("loading JAX and MaxText ...", style="dim")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps standard error from the screen, also what libraries in C write; shows it after all if an error is raised."""
  sys.stderr.flush()
  screen = os.dup(2)
  with tempfile.TemporaryFile() as kept:
    os.dup2(kept.fileno(), 2)
    try:
      yield
    except BaseException:
      kept.seek(0)
      os.write(screen, kept.read())
      raise
    finally:
      sys.stderr.flush()
      os.dup2(screen, 2)
      os.close(screen)
