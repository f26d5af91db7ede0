"""What `maxtext-ling2 plan` does: compile each topology and mesh, keep and print the results, name the cheapest."""

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from maxtext_ling2.configs.validation import CUSTOM_MODEL
from maxtext_ling2.maxtext_api import overrides, own_model, recipes
from maxtext_ling2.maxtext_api.mesh import MeshSpec
from maxtext_ling2.maxtext_api.start import ConfigError, maxtext_folder
from maxtext_ling2.plan import cache, check, own_chip, report, search
from maxtext_ling2.plan.estimate import Estimate, estimate, refused
from maxtext_ling2.plan.resolved import planned_config

QUIET: dict[str, Any] = {"compile_topology_num_slices": 1, "log_config": False, "jax_cache_dir": ""}
"""How a step is compiled."""
DEFAULTS: dict[str, Any] = {**QUIET, "override_model_config": True, "scan_layers": True, "per_device_batch_size": 1}
"""And what is compiled where no recipe says it."""


Made = tuple[Estimate, str, Mapping[str, str]]
"""An option, and the base yml and settings that it was compiled with."""


@dataclasses.dataclass(frozen=True)
class Request:
  """What to compile.

  Attributes:
    model: a model_name, or a yml such as `maxtext-ling2 config` writes.
    topologies: MaxText's compile_topology of each.
    meshes: such as "expert=8", for each topology; "" is FSDP over all devices.
    words: further settings of MaxText, KEY=VALUE.
    recipe: name or file of a recipe, which has its own mesh and batch; or None.
    search: whether to rank meshes and batches by arithmetic, and to compile the best and the topology's recipe.
    cached: whether to take what the same program gave before.
    figures: of the user's own chip, in place of those of the topologies' (`plan.own_chip`).
  """

  model: str
  topologies: Sequence[str]
  meshes: Sequence[str] = ("",)
  words: Sequence[str] = ()
  recipe: str | None = None
  search: bool = False
  cached: bool = True
  figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Maker:
  """Makes estimates, or takes them from the cache.

  Attributes:
    named: the model_name that the user asks for; None: a YAML file that names none.
    cached: as `Request.cached`.
    figures: as `Request.figures`.
  """

  named: str | None
  cached: bool
  figures: Mapping[str, Any]

  def make(self, yml: str, topology: str, mesh: str, settings: Mapping[str, str]) -> Estimate:
    """The estimate; raises what `planned_config` and `estimate` raise."""
    config = planned_config(yml, topology, settings, self.named)
    key = cache.key(config, topology, mesh, self.figures)
    if self.cached and (known := cache.read(key)) is not None:
      return known
    option = estimate(yml, topology, mesh, settings, self.figures)
    cache.write(key, option)
    return option


def run(console: Console, request: Request, json_file: Path | None, png: Path | None) -> bool:
  """Makes and prints all options; returns whether one of them fits.

  Args:
    console: where to print.
    request: what to compile.
    json_file: where to write the options as JSON, or None.
    png: where to draw them, or None.

  Raises:
    ValueError: an argument is not what it must be; the text names it.
  """
  yml, settings = _settings(request)
  maker = _Maker(_named(request.model), request.cached, request.figures)
  options, commands = [], []
  for option, base, words in _options(console, request, maker, yml, settings):
    options.append(option)
    commands.append(_training(base, words))
    console.print(report.line(option))
  console.print(report.summary(options))
  for option in options:
    if option.fits:
      report.print_parts(console, option)
  console.print(report.ASSUMPTIONS)
  fitting = [option for option in options if option.fits]
  if fitting:
    best = min(fitting, key=lambda option: option.device_seconds_per_token)
    console.print(
      f"cheapest that fits (pessimistic device seconds per token, no prices): {best.topology}, {best.mesh or 'fsdp'}"
    )
    console.print(f"its training command: {commands[options.index(best)]}")
  else:
    console.print("nothing fits: take more chips, another mesh, or remat_policy=full, or weight_dtype=bfloat16")
  if json_file is not None:
    made = {
      "model": request.model,
      "settings": settings,
      "figures": dict(request.figures),
      "versions": cache.versions(),
      "options": [_to_json(one) for one in options],
    }
    json_file.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
  if png is not None:
    report.draw(options, request.model, png)
  return bool(fitting)


def check_only(console: Console, request: Request) -> bool:
  """Prints whether MaxText takes the settings for each topology and mesh; compiles nothing; returns whether it does.

  Raises:
    ValueError: as `run`.
  """
  yml, settings = _settings(request)
  meshes = {mesh: _with_mesh(settings, mesh, _mesh(mesh)) for mesh in request.meshes}
  if request.recipe is not None:
    meshes = {_titled(request.recipe): settings}
  asked = [(topology, mesh, yml, words) for topology in request.topologies for mesh, words in meshes.items()]
  return check.run(console, asked, _named(request.model))


def _settings(request: Request) -> tuple[str, dict[str, str]]:
  """(base yml, settings) without those of a mesh."""
  yml, settings = _model(request.model) if request.recipe is None else _recipe(request.model, request.recipe)
  given = overrides.parse(request.words)
  if "compile_topology" in given:
    raise ValueError(
      f"compile_topology={given['compile_topology']}: this command takes it from --topology; leave compile_topology out"
    )
  for topology in request.topologies:
    own_chip.check(request.figures, topology)
  return yml, settings | given


def _options(console: Console, request: Request, maker: _Maker, yml: str, settings: Mapping[str, str]) -> Iterator[Made]:
  """All options, each as soon as it is there."""
  for topology in request.topologies:
    if request.search:
      yield from _searched(console, request, maker, yml, topology, settings)
    elif request.recipe is not None:
      yield maker.make(yml, topology, _titled(request.recipe), settings), yml, settings
    else:
      for mesh in request.meshes:
        words = _with_mesh(settings, mesh, _mesh(mesh))
        try:
          option = maker.make(yml, topology, mesh, words)
        except ConfigError as error:
          if len(request.topologies) * len(request.meshes) == 1:
            raise
          option = refused(topology, mesh, words, str(error))
        yield option, yml, words


def _titled(recipe: str) -> str:
  """Named in a report in place of a mesh."""
  return f"recipe {Path(recipe).stem}"


def _with_mesh(settings: Mapping[str, str], mesh: str, cut: Mapping[str, str]) -> dict[str, str]:
  """Settings with those of a mesh.

  Raises:
    ValueError: the user sets one of them otherwise.
  """
  for key, value in cut.items():
    if settings.get(key, value) != value:
      raise ValueError(f"--mesh {mesh}, {key}={settings[key]}: the mesh says {value}; leave one of them out")
  return {**settings, **cut}


def _searched(
  console: Console, request: Request, maker: _Maker, yml: str, topology: str, settings: Mapping[str, str]
) -> Iterator[Made]:
  """Compiles the recipe for model and topology, if there is one, and the first candidates by arithmetic that fit."""
  axes = [key for key in overrides.parse(request.words) if key.endswith("_parallelism")]
  if axes:
    raise ValueError(f"--search, {axes[0]}: the search chooses the mesh; leave one of them out")
  meshes = {mesh: _mesh(mesh) | search.settings_of(mesh) for mesh in search.MESHES}
  rows = search.ROWS if (given := overrides.parse(request.words).get(search.BATCH)) is None else [given]
  found = search.ranked(yml, topology, meshes, settings, rows, maker.named, maker.figures)
  console.print(report.ranking(topology, found))
  name = f"{request.model}-{topology}"
  if name in recipes.names():
    base, words = _recipe(request.model, name)
    words |= overrides.parse(request.words)
    yield maker.make(base, topology, _titled(name), words), base, words
  fitting = tried = 0
  for one in found:
    words = {**meshes[one.mesh], **settings, search.BATCH: one.rows}
    try:
      option = maker.make(yml, topology, one.name, words)
    except ConfigError as error:  # such as a mesh that these chips cannot form
      console.print(f"{topology}, {one.name}: {error}")
      continue
    yield option, yml, words
    fitting += option.fits
    tried += 1
    if fitting == search.COMPILED or tried == search.TRIES:
      return


def _training(yml: str, settings: Mapping[str, str]) -> str:
  """The command that trains with a base yml and settings."""
  words = overrides.join({key: value for key, value in settings.items() if key not in QUIET})
  return " ".join(["python -m maxtext.trainers.pre_train.train", *map(shlex.quote, [yml, *words])])


def _recipe(model: str, recipe: str) -> tuple[str, dict[str, str]]:
  """(base yml, settings) of a recipe, whose own values stay."""
  file = recipes.file_of(recipe)
  given = own_model.settings_of_file(file)
  theirs = given.get("model_name", model)
  if theirs != model:
    raise recipes.RecipeError(
      f"--recipe {recipe}: it is for {theirs}, not for {model}; name that model or another recipe"
    )
  return str(file), _unless_given(QUIET, given, model)


def _model(model: str) -> tuple[str, dict[str, str]]:
  """(base yml, settings) of a model's name, or of a yml, whose own values stay."""
  if not own_model.is_yml(model):
    return str(maxtext_folder() / "configs" / "base.yml"), _unless_given(DEFAULTS, {}, model)
  given = own_model.settings(model)
  return model, _unless_given(DEFAULTS, given, str(given.get("model_name", CUSTOM_MODEL)))


def _named(model: str) -> str | None:
  """The model_name that a user asks for by name or by YAML file; None: the file names none."""
  if not model.endswith(".yml"):
    return model
  name = own_model.settings(model).get("model_name")
  return None if name is None else str(name)


def _unless_given(defaults: Mapping[str, Any], given: Mapping[str, Any], model_name: str) -> dict[str, str]:
  """Defaults, or a yml's own values for them, as text."""
  return overrides.texts({key: given.get(key, value) for key, value in defaults.items()} | {"model_name": model_name})


def _mesh(text: str) -> dict[str, str]:
  """MaxText's settings of a mesh; fsdp takes the rest of the devices unless it is named."""
  return overrides.texts(MeshSpec.read(text).settings())


def _to_json(option: Estimate) -> dict[str, Any]:
  """The fields, and what follows from them."""
  derived: dict[str, Any] = {}
  if option.fits:
    derived = {
      "seconds": [option.lower_seconds, option.upper_seconds],
      "tokens_per_second": list(option.tokens_per_second),
      "mfu": list(option.mfu),
    }
    derived["parts"] = [dataclasses.asdict(part) | {"bound": part.bound} for part in option.parts]
  return _without_nan(dataclasses.asdict(option) | derived)


def _without_nan(value: Any) -> Any:
  """None for each NaN, which is no JSON."""
  if isinstance(value, dict):
    return {key: _without_nan(one) for key, one in value.items()}
  if isinstance(value, (list, tuple)):
    return [_without_nan(one) for one in value]
  return None if value != value else value
