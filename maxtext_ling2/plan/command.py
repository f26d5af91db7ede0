"""What `maxtext-ling2 plan` does: compile each topology and mesh, keep and print the results, name the cheapest."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import maxtext_ling2
from maxtext_ling2 import overrides
from maxtext_ling2.checkpoint.verify_mesh import VerifyMesh
from maxtext_ling2.configs.validation import CUSTOM_MODEL
from maxtext_ling2.plan.estimate import Option, make_option

SEARCHED = ("", "expert=4", "expert=8", "tensor=4")
"""Meshes that --search tries; what is left of the devices is FSDP's."""

DEFAULTS: dict[str, Any] = {
  "override_model_config": True,
  "scan_layers": True,
  "per_device_batch_size": 1,
  "compile_topology_num_slices": 1,
  "log_config": False,
  "jax_cache_dir": "",
}
ASSUMPTIONS = (
  "lower bound: computing at peak, the HBM at full bandwidth or all links at full bandwidth, whichever takes longest; "
  "upper figure: one after the other. Neither knows waiting, small transfers, or rematerialised operations; bytes "
  "are those of the compiled program, loops counted as often as they run. Real steps are slower than the lower bound."
)


def run(
  console: Console,
  model: str,
  topologies: Sequence[str],
  meshes: Sequence[str],
  words: Sequence[str],
  json_file: Path | None,
  png: Path | None,
  cached: bool,
) -> bool:
  """Makes and prints all options; returns whether one of them fits.

  Args:
    console: where to print.
    model: a model_name, or a yml such as `maxtext-ling2 config` writes.
    topologies: MaxText's compile_topology of each.
    meshes: such as "expert=8", for each topology; "" is FSDP over all devices.
    words: further settings of MaxText, KEY=VALUE.
    json_file: where to write the options as JSON, or None.
    png: where to draw them, or None.
    cached: whether to take what the same program gave before.

  Raises:
    ValueError: an argument is not what it must be; the text names it.
  """
  yml, settings = _model(model)
  settings |= overrides.texts(DEFAULTS) | overrides.parse(words)
  options = []
  for topology in topologies:
    for mesh in meshes:
      option = _cached(yml, topology, mesh, settings | _mesh(mesh), cached)
      options.append(option)
      console.print(_line(option))
  console.print(_table(options))
  console.print(ASSUMPTIONS)
  fitting = [option for option in options if option.fits]
  if fitting:
    best = min(fitting, key=lambda option: option.device_seconds_per_token)
    console.print(f"cheapest that fits (device seconds a token, no prices): {best.topology}, {best.mesh or 'fsdp'}")
  else:
    console.print("nothing fits: take more chips, another mesh, or remat_policy=full, or weight_dtype=bfloat16")
  if json_file is not None:
    made = {"model": model, "settings": settings, "versions": _versions(), "options": [_to_json(one) for one in options]}
    json_file.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
  if png is not None:
    _draw(options, model, png)
  return bool(fitting)


def _model(model: str) -> tuple[str, dict[str, str]]:
  """(base yml, settings) of a model's name or yml."""
  from maxtext_ling2.demo.data import maxtext_folder

  if not model.endswith((".yml", ".yaml")):
    return str(maxtext_folder() / "configs" / "base.yml"), overrides.texts({"model_name": model})
  if not Path(model).is_file():
    raise ValueError(
      f"{model}: no such file; pass a model_name such as ling2, or the yml that `maxtext-ling2 config` writes"
    )
  _check_yml(Path(model))
  return model, overrides.texts({"model_name": CUSTOM_MODEL})


def _check_yml(path: Path) -> None:
  """Raises ValueError if a file holds no settings."""
  import yaml

  try:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: not a yml ({error}); write it anew with `maxtext-ling2 config`") from error
  if not isinstance(settings, dict):
    found = "nothing" if settings is None else f"a {type(settings).__name__}"
    raise ValueError(f"{path}: holds {found} instead of settings; write it anew with `maxtext-ling2 config`")


def _mesh(text: str) -> dict[str, str]:
  """MaxText's settings of a mesh; fsdp takes the rest of the devices unless it is named."""
  mesh = VerifyMesh.read(text)
  sizes: dict[str, Any] = {f"ici_{axis}_parallelism": size for axis, size in mesh.sizes.items()}
  if mesh.length > 1:
    sizes["context_parallel_load_balance"] = False
  return overrides.texts(sizes)


def _cached(yml: str, topology: str, mesh: str, settings: Mapping[str, str], use: bool) -> Option:
  """The option, from the cache if the same program has been compiled before."""
  sources = sorted(Path(maxtext_ling2.__file__).parent.rglob("*.py"))
  parts = [json.dumps([topology, mesh, settings, _versions()], sort_keys=True, default=str), Path(yml).read_text()]
  parts += [path.read_text(encoding="utf-8") for path in sources]
  key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
  folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxtext-ling2" / "plan"
  file = folder / f"{key}.json"
  if use and file.is_file():
    return Option(**json.loads(file.read_text(encoding="utf-8")))
  option = make_option(yml, topology, mesh, settings)
  folder.mkdir(parents=True, exist_ok=True)
  partial = file.with_suffix(f".{os.getpid()}")
  partial.write_text(json.dumps(dataclasses.asdict(option)), encoding="utf-8")
  partial.replace(file)
  return option


def _versions() -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in ("maxtext-ling2", "maxtext", "jax", "libtpu")}


def _to_json(option: Option) -> dict[str, Any]:
  """The fields, and what follows from them."""
  derived: dict[str, Any] = {}
  if option.fits:
    derived = {
      "seconds": [option.lower_seconds, option.upper_seconds],
      "tokens_per_second": list(option.tokens_per_second),
      "mfu": list(option.mfu),
    }
  fields = dataclasses.asdict(option) | derived
  return {key: None if value != value else value for key, value in fields.items()}  # NaN is no JSON


def _line(option: Option) -> str:
  """What is told of an option as soon as it is there."""
  where = f"{option.topology}, {option.mesh or 'fsdp'}: compiled in {option.compile_seconds / 60:.1f} min"
  return where if option.fits else f"{where}; does not fit: {option.problem}"


def _table(options: Sequence[Option]) -> Table:
  columns = (
    "topology",
    "mesh",
    "devices",
    "fits",
    "GiB a device",
    "TFLOP",
    "GiB moved",
    "GiB sent",
    "step s",
    "tokens/s",
  )
  table = Table(*columns, "MFU", title="a train step, a device")
  for one in options:
    cells = [one.topology, one.mesh or "fsdp", str(one.devices), "yes" if one.fits else "NO"]
    cells.append(f"{one.memory / 2**30:.1f} of {one.capacity / 2**30:.1f}")
    if one.fits and one.tflops is not None and one.bytes_moved is not None:
      sent = sum(size for _, size in one.collectives.values())
      cells += [f"{one.tflops:.1f}", f"{one.bytes_moved / 2**30:.0f}", f"{sent / 2**30:.1f}"]
      cells.append(f"{one.lower_seconds:.3f} to {one.upper_seconds:.3f}")
      slow, fast = one.tokens_per_second
      cells.append(f"{slow:,.0f} to {fast:,.0f}")
      cells.append(f"{one.mfu[0]:.0%} to {one.mfu[1]:.0%}")
    table.add_row(*cells)
  return table


def _draw(options: Sequence[Option], model: str, path: Path) -> None:
  """Memory and time of each option, as bars."""
  from matplotlib.figure import Figure

  names = [f"{one.topology}\n{one.mesh or 'fsdp'}" for one in options]
  figure = Figure(figsize=(1.5 + 1.6 * len(options), 7), layout="constrained")
  memory, seconds = figure.subplots(2)
  memory.bar(names, [one.memory / 2**30 for one in options], color=["C0" if one.fits else "C3" for one in options])
  memory.plot(names, [one.capacity / 2**30 for one in options], "k_", markersize=30, label="there")
  memory.set(title=model, ylabel="GiB a device")
  memory.legend()
  bottom = [0.0] * len(options)
  for label in ("compute", "memory", "link"):
    values = [getattr(one, f"{label}_seconds") if one.fits else 0.0 for one in options]
    seconds.bar(names, values, bottom=bottom, label=label)
    bottom = [low + value for low, value in zip(bottom, values, strict=True)]
  seconds.set(ylabel="seconds a step, no overlap")
  seconds.legend()
  figure.savefig(path, dpi=120)
