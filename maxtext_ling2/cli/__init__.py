"""The command `maxtext-ling2`.

Each module here has the commands of a theme and adds them in its `register`. What a command needs is imported when it is
called, so that help costs no start of JAX.
"""

import io
import sys
from typing import Annotated

import typer

from maxtext_ling2.cli import checkpoints, data, environment, inference, planning, stock_commands, training
from maxtext_ling2.cli.app import App

app = App()


def _version(wanted: bool) -> None:
  if wanted:
    print(environment.version())
    raise typer.Exit


@app.callback()
def options(
  version: Annotated[
    bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
  ] = False,
) -> None:
  """LING2 for stock MaxText."""


for theme in (environment, training, stock_commands, data, checkpoints, inference, planning):
  theme.register(app)


def main() -> None:
  """Entry point of the console script."""
  if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.encoding.lower().startswith("utf"):
    sys.stdout.reconfigure(errors="backslashreplace")  # generated text in a locale that lacks its letters
  app()
