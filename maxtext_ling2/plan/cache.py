"""Estimates that were made before, found again by all that their figures follow from.

The key is a digest of

  - MaxText's resolved config: the base YAML and its parents, the model's YAML, the command line and M_* variables;
  - the environment variables that JAX, XLA, libtpu and MaxText read while they compile;
  - the versions of the packages that make the program, and the sources of this package and of MaxText.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

import maxtext_ling2
from maxtext_ling2.maxtext_api.start import maxtext_folder
from maxtext_ling2.plan.estimate import Estimate

REPORTED = ("maxtext-ling2", "maxtext", "jax", "libtpu")
"""Packages whose versions are named in the JSON."""
PACKAGES = (*REPORTED, "jaxlib", "flax", "optax", "qwix", "aqtp", "tokamax")
"""Packages on whose versions a compiled train step depends."""

# The last three are read by kernels of tokamax.
_COMPILERS = re.compile(r"(XLA|LIBTPU|TPU|JAX|MAXTEXT|MLA|MOE|PALLAS)_")
_NO_EFFECT = {"CACHE", "LOG", "LOGGING"}  # words in the names of variables that change no program
_NOT_COMPILED = {
  "hf_access_token",  # a secret, from HF_TOKEN
  # Where a run writes. MaxText puts the minute of the clock into the name of a run that has none, and that into the rest.
  "run_name",
  "base_output_directory",
  "checkpoint_dir",
  "metrics_dir",
  "tensorboard_dir",
  "managed_mldiagnostics_dir",
  "dump_hlo_gcs_dir",
  "dump_jaxpr_gcs_dir",
}
"""Fields of MaxText's config without effect on the program."""


def environment() -> dict[str, str]:
  """The variables that change what is compiled."""
  return {
    name: value
    for name, value in sorted(os.environ.items())
    if _COMPILERS.match(name) and not _NO_EFFECT & set(name.split("_"))
  }


def versions(packages: tuple[str, ...] = REPORTED) -> dict[str, str]:
  """Versions by the name of the package; "" for one that is not installed."""
  found = {}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = ""
  return found


def key(config: Any, topology: str, mesh: str) -> str:
  """What an estimate is kept under.

  Args:
    config: MaxText's, as `planned_config` returns it.
    topology: as MaxText's compile_topology.
    mesh: its text in the report.
  """
  fields = {name: value for name, value in config.get_keys().items() if name not in _NOT_COMPILED}
  quantization = _digest(Path(fields.get("quant_cfg_path") or ""))  # MaxText reads this file while it builds the model
  parts = [topology, mesh, fields, quantization, environment(), versions(PACKAGES), _sources()]
  return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def read(key: str) -> Estimate | None:
  """The estimate under a key, or None."""
  file = _file(key)
  return Estimate.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def write(key: str, estimate: Estimate) -> None:
  """Keeps an estimate; another process sees all of it or nothing."""
  file = _file(key)
  file.parent.mkdir(parents=True, exist_ok=True)
  partial = file.with_suffix(f".{os.getpid()}")
  partial.write_text(json.dumps(dataclasses.asdict(estimate)), encoding="utf-8")
  partial.replace(file)


def digest_of(folder: Path, suffixes: tuple[str, ...]) -> str:
  """Digest of the files of a folder whose names have one of the suffixes: paths within the folder, and bytes."""
  total = hashlib.sha256()
  for path in sorted(path for path in folder.rglob("*") if path.suffix in suffixes):
    total.update(f"{path.relative_to(folder)}\0{_digest(path)}\0".encode())
  return total.hexdigest()


@functools.cache
def _sources() -> tuple[str, str]:
  """Of this package (its cycle counts are JSON) and of MaxText, whose YAML files are in the resolved config."""
  return digest_of(Path(maxtext_ling2.__file__).parent, (".py", ".json")), digest_of(maxtext_folder(), (".py",))


def _digest(path: Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _file(key: str) -> Path:
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxtext-ling2" / "plan" / f"{key}.json"
