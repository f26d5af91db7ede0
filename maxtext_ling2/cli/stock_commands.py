"""The commands `train`, `sft`, `convert` and `export` of `maxtext-ling2`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from maxtext_ling2 import terminal
from maxtext_ling2.cli.app import App

_WORDS = typer.Argument(metavar="SETTINGS", help="As for MaxText's trainer: a base YAML file, KEY=VALUE.")
_CONVERSION_WORDS = typer.Argument(
  metavar="SETTINGS", help="As for MaxText's command: a base YAML file, KEY=VALUE, --flags."
)
_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}
_DRY_RUN = typer.Option("--dry-run", help="Print the command and check the settings; train nothing.")


def register(app: App) -> None:
  """Adds the commands."""
  app.add(train, "maxtext-ling2 train model_name=ling2-tiny dataset_type=synthetic steps=5")
  app.add(sft, "maxtext-ling2 sft tune.yml run_name=chats steps=100")
  app.add(convert, "maxtext-ling2 convert HF_DIR OUT scan_layers=true", context_settings=_FLAGS)
  app.add(export, "maxtext-ling2 export OUT/0/items HF_DIR model_name=ling2", context_settings=_FLAGS)


def convert(
  folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face folder: config.json and safetensors.")],
  output: Annotated[str, typer.Argument(metavar="OUT", help="Folder; the checkpoint is OUT/0/items.")],
  words: Annotated[list[str] | None, _CONVERSION_WORDS] = None,
) -> None:
  """Convert a Hugging Face folder to a MaxText checkpoint.

  Prints the command of MaxText that it runs. Without model_name and a base YAML file the model's sizes are read from the
  folder and written into OUT/model.yml.
  """
  console = _started("convert", "reading the folder")
  from maxtext_ling2.stock_command import convert as conversion

  raise typer.Exit(_guarded(lambda: conversion.convert(folder, output, words or (), console)))


def export(
  checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="MaxText checkpoint, or a run's checkpoints.")],
  folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="The new folder.")],
  words: Annotated[list[str] | None, _CONVERSION_WORDS] = None,
) -> None:
  """Export a MaxText checkpoint to a Hugging Face folder.

  Prints the command of MaxText that it runs. --hf_model_path=DIR takes the tokenizer's files from DIR.
  """
  console = _started("export", "reading the settings")
  from maxtext_ling2.stock_command import convert as conversion

  raise typer.Exit(_guarded(lambda: conversion.export(checkpoint, folder, words or (), console)))


def train(words: Annotated[list[str] | None, _WORDS] = None, dry_run: Annotated[bool, _DRY_RUN] = False) -> None:
  """Pre-train with MaxText's trainer, and follow it.

  Prints the command that it runs, progress, and at the end loss, plot, checkpoint and the next commands.

  What this machine needs and you have not set is added, and shown. Ctrl-C saves a checkpoint.
  """
  _train("train", words, dry_run)


def sft(words: Annotated[list[str] | None, _WORDS] = None, dry_run: Annotated[bool, _DRY_RUN] = False) -> None:
  """Fine-tune on conversations with MaxText's native trainer, and follow it as `train` does."""
  _train("sft", words, dry_run)


def _train(command: str, words: list[str] | None, dry_run: bool) -> None:
  console = _started(command, "reading the settings, looking for devices")
  from maxtext_ling2.stock_command import train as training

  raise typer.Exit(_guarded(lambda: training.run(command, words or (), dry_run, console)))


def _started(command: str, what: str) -> Console:
  """Prints a first line: importing what follows, and finding the devices, take seconds."""
  console = terminal.console()
  console.print(f"maxtext-ling2 {command}: {what} ...")
  return console


def _guarded(work: Callable[[], int]) -> int:
  """The exit code of some work; an error that has MaxText's own exit code is printed here, others by `app.Command`."""
  from maxtext_ling2.stock_command.errors import StockCommandError

  try:
    return work()
  except StockCommandError as error:
    terminal.print_error(str(error))
    return error.code
