"""`batch`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from maxtext_ling2 import terminal
from maxtext_ling2.cli.app import App


def register(app: App) -> None:
  """Adds the commands."""
  app.add(batch, "maxtext-ling2 batch my.yml model_name=ling2-tiny use_sft=true --rows 2")


def batch(
  settings: Annotated[
    list[str], typer.Argument(metavar="SETTINGS", help="As for MaxText's trainer: a base YAML file, KEY=VALUE.")
  ],
  step: Annotated[int, typer.Option(min=0, help="Which batch, counted from 0.")] = 0,
  rows: Annotated[int, typer.Option(min=1, help="Number of rows to print.")] = 4,
  ids: Annotated[bool, typer.Option("--ids", help="Print a line per token: id, segment, position, target.")] = False,
  evaluation: Annotated[bool, typer.Option("--eval", help="Read the data of evaluation.")] = False,
  tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer for the text; the default is the settings'.")] = None,
  as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
  """Print a training batch as text with its loss marked, read by MaxText's data pipeline with these settings.

  For fine-tuning pass use_sft=true, which MaxText's trainers for it set themselves. The batch is that of this machine's
  devices.
  """
  terminal.say_loading()
  from maxtext_ling2.batch import read, show

  with contextlib.redirect_stdout(sys.stderr):  # MaxText prints; stdout is for the batch
    found = read.read(settings, step, evaluation, tokenizer)
  if as_json:
    print(json.dumps(show.to_json(found, rows)))
  else:
    show.print_lines(terminal.console(), found, rows, ids)
