"""`doctor`, `run` and `--version`."""

import contextlib
import json
import sys
from typing import Annotated

import typer

import maxtext_ling2
from maxtext_ling2 import terminal
from maxtext_ling2.cli.app import App


def register(app: App) -> None:
  """Adds the commands."""
  app.add(doctor, "maxtext-ling2 doctor", "maxtext-ling2 doctor --json")
  # What the module raises is its own, as with `python -m`; so are all words after its name.
  settings = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
  example = "maxtext-ling2 run maxtext.trainers.pre_train.train my.yml model_name=ling2-tiny"
  app.add(run, example, cls=None, context_settings=settings)


def version() -> str:
  """The name and the version of this package."""
  return f"maxtext-ling2 {maxtext_ling2.__version__}"


_VERBOSE = "Check every seam again, list them, and show what MaxText prints meanwhile."


def doctor(
  verbose: Annotated[bool, typer.Option("--verbose", "-v", help=_VERBOSE)] = False,
  as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every seam.")] = False,
) -> None:
  """Tell whether a LING2 run would work here; exit 0 only if it would."""
  terminal.say_loading()
  from maxtext_ling2 import doctor as checks

  # MaxText prints while it is imported; stdout is for the diagnosis.
  with contextlib.redirect_stdout(sys.stderr), contextlib.nullcontext() if verbose else terminal.quiet():
    found = checks.diagnose(again=verbose or as_json)
  if as_json:
    print(json.dumps(found.to_json(), indent=2))
  else:
    console = terminal.console()
    for line in checks.lines(found, verbose=verbose):
      console.print(line)
  raise typer.Exit(0 if found.ok else 1)


def run(context: typer.Context, module: Annotated[str, typer.Argument(help="As for python -m.")]) -> None:
  """Run `python -m MODULE ARGS...` with LING2, also where Python does not process .pth files."""
  from maxtext_ling2.run_module import run as run_module

  run_module([module, *context.args])
