"""How every command behaves: its help, and its errors in one line."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from maxtext_ling2 import terminal
from maxtext_ling2.errors import Ling2Error, OptionError, describe, missing_dependency

INTERRUPTED = 130
"""The shell's exit code for a process that SIGINT ended."""


class Command(TyperCommand):
  """A command whose errors are one line: exit 2 for its options, 1 for what they name, 130 after Ctrl-C."""

  def invoke(self, ctx: Any) -> Any:
    with one_line_errors(ctx):
      return super().invoke(ctx)


class Group(TyperGroup):
  """All commands; the help has the whole first sentence of each."""

  def format_commands(self, ctx: Any, formatter: Any) -> None:
    rows = []
    for name in self.list_commands(ctx):
      command = self.get_command(ctx, name)
      if command is not None and not command.hidden:
        rows.append((name, first_sentence(command.help or "")))
    with formatter.section("Commands"):
      formatter.write_dl(rows)


class App(typer.Typer):
  """The application, which modules add their commands to."""

  def __init__(self) -> None:
    super().__init__(
      cls=Group, no_args_is_help=True, rich_markup_mode=None, context_settings={"help_option_names": ["--help", "-h"]}
    )

  def add(self, function: Callable[..., None], *examples: str, name: str | None = None, **options: Any) -> None:
    """Adds a command.

    Args:
      function: what it does; its docstring is the help.
      *examples: command lines, which the help ends with.
      name: of the command; None: that of the function.
      **options: as of `typer.Typer.command`.
    """
    options = {"cls": Command, "epilog": _epilog(examples), **options}
    self.command(name, **options)(function)


def first_sentence(text: str) -> str:
  """The first paragraph of a docstring, on one line."""
  return " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())


def examples_of(command: Any) -> list[str]:
  """The examples that a command was added with."""
  return [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]


def _epilog(examples: Sequence[str]) -> str:
  return "\b\n" + "\n".join([f"Example{'s' if len(examples) > 1 else ''}:", *(f"  {one}" for one in examples)])


@contextmanager
def one_line_errors(ctx: Any) -> Iterator[None]:
  """Turns the errors that a user can correct into a line and an exit code; others keep their traceback.

  Args:
    ctx: typer's context of the command, for the usage before errors of options.
  """
  try:
    yield
  except OptionError as error:
    raise typer.BadParameter(str(error), ctx=ctx) from error
  except BrokenPipeError:  # the reader, such as `head`, has seen enough
    raise
  except OSError as error:
    _fail(describe(error), error)
  except (ValueError, Ling2Error) as error:
    _fail(str(error), error)
  except ImportError as error:
    if (text := missing_dependency(error)) is None:
      raise
    _fail(text, error)
  except KeyboardInterrupt as error:
    raise typer.Exit(INTERRUPTED) from error


def _fail(text: str, error: BaseException) -> None:
  terminal.print_error(text)
  raise typer.Exit(1) from error
