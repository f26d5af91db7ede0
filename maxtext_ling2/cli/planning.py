"""`plan` and `recipe`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from maxtext_ling2 import terminal
from maxtext_ling2.cli import options
from maxtext_ling2.cli.app import App
from maxtext_ling2.errors import OptionError


def register(app: App) -> None:
  """Adds the commands."""
  app.add(recipe, "maxtext-ling2 recipe", "maxtext-ling2 recipe ling2-v6e-64")
  app.add(
    plan,
    "maxtext-ling2 plan ling2 --topology v6e-64",
    "maxtext-ling2 plan ling2 per_device_batch_size=2 --topology v6e-64 --mesh expert=8 --mesh expert=4",
    "maxtext-ling2 plan ling2 --topology v6e-64 --mesh expert=8 --check",
    "maxtext-ling2 plan --list",
  )


_MODEL = typer.Argument(metavar="MODEL", help="model_name, or a YAML file written by `config`.")
_TOPOLOGY = typer.Option(help="MaxText's compile_topology, such as v6e-64; may be repeated.")
_CHIP = typer.Option(
  help="YAML file with figures of your own chip, such as flops or memory_bandwidth, in place of the topology's."
)


def plan(
  model: Annotated[str | None, _MODEL] = None,
  overrides: Annotated[list[str] | None, options.OVERRIDES] = None,
  topology: Annotated[list[str] | None, _TOPOLOGY] = None,
  mesh: Annotated[list[str] | None, typer.Option(help="Such as expert=8; may be repeated; the rest is FSDP.")] = None,
  recipe: Annotated[str | None, typer.Option(help="Name or file of a recipe; `maxtext-ling2 recipe` lists them.")] = None,
  search: Annotated[bool, typer.Option("--search", help="Rank meshes and batches, and compile the best two.")] = False,
  chip: Annotated[Path | None, _CHIP] = None,
  check: Annotated[bool, typer.Option("--check", help="Only say whether the settings are valid.")] = False,
  show: Annotated[bool, typer.Option("--list", help="Print all models, chips, topologies and recipes.")] = False,
  json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
  png: Annotated[Path | None, typer.Option(help="File for a plot.")] = None,
  no_cache: Annotated[bool, typer.Option("--no-cache", help="Compile also what has been compiled before.")] = False,
) -> None:
  """Compile a train step for chips without having them; print memory, time and whether it fits; exit 1 if not."""
  # The chips are described, not used: ignore those of this machine, and allow other compilers at the same time.
  os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  console = terminal.console(width=160)
  if show:
    _list(console)
    return
  if model is None:
    raise OptionError("missing argument 'MODEL': give a model_name such as ling2, or a YAML file; --list shows all")
  if not topology:
    raise OptionError("missing option '--topology': give what to plan for, such as v6e-64; --list shows all")
  _check_choices({"--mesh": mesh, "--recipe": recipe, "--search": search}, "each of them chooses a mesh")
  _check_choices({"--check": check, "--search": search}, "a check compiles nothing that could be searched")
  for option, file in {"--json": json_file, "--png": png, "--chip": chip}.items():
    if check and file is not None:
      raise OptionError(f"--check, {option} {file}: a check has no figures; leave one of them out")
  options.check_output(json_file, "--json")
  options.check_output(png, "--png", (".png", ".pdf", ".svg"))
  terminal.say_loading()
  from maxtext_ling2.plan import command, own_chip

  figures = {} if chip is None else own_chip.read(chip)
  request = command.Request(model, topology, mesh or [""], overrides or (), recipe, search, not no_cache, figures)
  passed = command.check_only(console, request) if check else command.run(console, request, json_file, png)
  raise typer.Exit(0 if passed else 1)


def _list(console: Console) -> None:
  terminal.say_loading()
  from maxtext_ling2.plan import listing

  listing.print_all(console)


def _check_choices(chosen: dict[str, object], why: str) -> None:
  """Raises OptionError if more than one of these options is given."""
  given = [option for option, value in chosen.items() if value]
  if len(given) > 1:
    raise OptionError(f"{' and '.join(given)}: {why}; leave all but one out")


def recipe(name: Annotated[str | None, typer.Argument(metavar="NAME", help="Name of the recipe.")] = None) -> None:
  """Print the path of a recipe, a base YAML file for training; without a name, list all recipes."""
  from maxtext_ling2.maxtext_api import recipes

  every = [*recipes.names(), *recipes.trainings()]
  lines = [str(recipes.file_of(name))] if name else [f"{one}: {recipes.title(one)}" for one in every]
  for line in lines:
    print(line)
