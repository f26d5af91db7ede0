"""The commands `train`, `sft`, `convert` and `export` of `maxtext-ling2`."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from maxtext_ling2.errors import describe

_WORDS = typer.Argument(metavar="[BASE_YML] [KEY=VALUE]...", help="As for MaxText's trainer.")
_DRY_RUN = typer.Option("--dry-run", help="Print the command and check the settings; train nothing.")
_EXAMPLE = "Example: maxtext-ling2 {} model_name=ling2-tiny "


def register(app: typer.Typer) -> None:
  """Adds the commands to an application."""
  app.command(epilog=_EXAMPLE.format("train") + "dataset_type=synthetic steps=5")(train)
  app.command(epilog="Example: maxtext-ling2 sft tune.yml run_name=chats steps=100")(sft)


def train(words: Annotated[list[str] | None, _WORDS] = None, dry_run: Annotated[bool, _DRY_RUN] = False) -> None:
  """Pre-train with MaxText's trainer: prints its command, then progress, and at the end loss, plot and checkpoint.

  What this machine needs and you have not set is added, and shown. Ctrl-C saves a checkpoint.
  """
  _train("train", words, dry_run)


def sft(words: Annotated[list[str] | None, _WORDS] = None, dry_run: Annotated[bool, _DRY_RUN] = False) -> None:
  """Fine-tune on conversations with MaxText's native trainer; otherwise as `train`."""
  _train("sft", words, dry_run)


def _train(command: str, words: list[str] | None, dry_run: bool) -> None:
  console = _console()
  # At once: importing what follows and finding the devices take seconds.
  console.print(f"maxtext-ling2 {command}: reading the settings, looking for devices ...")
  from maxtext_ling2.stock_command import train as training

  raise typer.Exit(_guarded(lambda: training.run(command, words or (), dry_run, console)))


def _guarded(work: Any) -> int:
  """The exit code of some work; an error of ours, or of the operating system, is printed in place of a traceback."""
  from maxtext_ling2.stock_command.errors import StockCommandError

  try:
    return int(work())
  except StockCommandError as error:
    _print_error(str(error))
    return error.code
  except (ValueError, OSError) as error:
    _print_error(describe(error) if isinstance(error, OSError) else str(error))
    return 1
  except KeyboardInterrupt:
    return 130


def _print_error(text: str) -> None:
  Console(stderr=True, soft_wrap=True, highlight=False, emoji=False).print(f"[red]error:[/] {escape(text)}")


def _console() -> Console:
  return Console(soft_wrap=True, highlight=False, emoji=False)
