"""`demo`."""

from pathlib import Path
from typing import Annotated

import typer

from maxtext_ling2 import terminal
from maxtext_ling2.cli.app import App


def register(app: App) -> None:
  """Adds the commands."""
  app.add(demo, "maxtext-ling2 demo", "maxtext-ling2 demo --output runs --steps 200")


def demo(
  output: Annotated[Path, typer.Option(help="Folder for data, checkpoint, metrics and plot.")] = Path("demo_output"),
  steps: Annotated[int | None, typer.Option(min=1, help="Training steps; the default takes minutes on 2 cores.")] = None,
) -> None:
  """Train ling2-tiny on real English text with the stock command and draw the loss curve."""
  terminal.say_loading()
  from maxtext_ling2 import demo as demonstration

  raise typer.Exit(demonstration.run(output, steps))
