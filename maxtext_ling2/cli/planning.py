"""`plan` and `recipe`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from maxtext_ling2 import terminal
from maxtext_ling2.cli import options
from maxtext_ling2.cli.app import App


def register(app: App) -> None:
  """Adds the commands."""
  app.add(recipe, "maxtext-ling2 recipe", "maxtext-ling2 recipe ling2-v6e-64")
  app.add(
    plan,
    "maxtext-ling2 plan ling2 --topology v6e-64",
    "maxtext-ling2 plan ling2 --topology v6e-64 --mesh expert=8 --mesh expert=4 per_device_batch_size=2",
  )


def plan(
  model: Annotated[str, typer.Argument(metavar="MODEL", help="model_name, or a YAML file written by `config`.")],
  topology: Annotated[list[str], typer.Option(help="MaxText's compile_topology, such as v6e-64; may be repeated.")],
  overrides: Annotated[list[str] | None, options.OVERRIDES] = None,
  mesh: Annotated[list[str] | None, typer.Option(help="Such as expert=8; may be repeated; the rest is FSDP.")] = None,
  recipe: Annotated[str | None, typer.Option(help="Name or file of a recipe; `maxtext-ling2 recipe` lists them.")] = None,
  search: Annotated[bool, typer.Option("--search", help="Rank meshes and batches, and compile the best two.")] = False,
  json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
  png: Annotated[Path | None, typer.Option(help="File for a plot.")] = None,
  no_cache: Annotated[bool, typer.Option("--no-cache", help="Compile also what has been compiled before.")] = False,
) -> None:
  """Compile a train step for chips without having them; print memory, time and whether it fits; exit 1 if not."""
  # The chips are described, not used: ignore those of this machine, and allow other compilers at the same time.
  os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  terminal.say_loading()
  from maxtext_ling2.plan import command

  chosen = {"--mesh": mesh, "--recipe": recipe, "--search": search}
  if len([option for option, value in chosen.items() if value]) > 1:
    both = " and ".join(option for option, value in chosen.items() if value)
    raise typer.BadParameter(f"{both}: each of them chooses a mesh; leave all but one out")
  request = command.Request(model, topology, mesh or [""], overrides or (), recipe, search, not no_cache)
  options.check_output(json_file, "--json")
  options.check_output(png, "--png", (".png", ".pdf", ".svg"))
  fits = command.run(terminal.console(width=160), request, json_file, png)
  raise typer.Exit(0 if fits else 1)


def recipe(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of the recipe.")] = None) -> None:
  """Print the path of a recipe, a base YAML file for training; without a name, list all recipes."""
  from maxtext_ling2.maxtext_api import recipes

  every = [*recipes.names(), *recipes.trainings()]
  lines = [str(recipes.file_of(name))] if name else [f"{one}: {recipes.title(one)}" for one in every]
  for line in lines:
    print(line)
