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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import maxtext_ling2
from maxtext_ling2 import kept
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


def key(config: Any, topology: str, mesh: str, figures: Mapping[str, Any] | None = None) -> str:
  """What an estimate is kept under.

  Args:
    config: MaxText's, as `planned_config` returns it.
    topology: as MaxText's compile_topology.
    mesh: its text in the report.
    figures: of the user's own chip.
  """
  fields = {name: value for name, value in config.get_keys().items() if name not in _NOT_COMPILED}
  # MaxText reads this file while it builds the model.
  quantization = kept.digest(Path(fields.get("quant_cfg_path") or ""))
  parts = [topology, mesh, figures or {}, fields, quantization, environment(), versions(PACKAGES), _sources()]
  return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def read(key: str) -> Estimate | None:
  """The estimate under a key, or None."""
  file = _file(key)
  return Estimate.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def write(key: str, estimate: Estimate) -> None:
  """Keeps an estimate; another process sees all of it or nothing."""
  kept.write(_file(key), json.dumps(dataclasses.asdict(estimate)))


@functools.cache
def _sources() -> tuple[str, str]:
  """Of this package (its cycle counts are JSON) and of MaxText, whose YAML files are in the resolved config."""
  ours = kept.digest_of(Path(maxtext_ling2.__file__).parent, (".py", ".json"))
  return ours, kept.digest_of(maxtext_folder(), (".py",))


def _file(key: str) -> Path:
  return kept.folder() / "plan" / f"{key}.json"
