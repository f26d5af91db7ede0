"""`maxtext-ling2 plan --check`: whether settings, mesh and topology go together; nothing is compiled."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from maxtext_ling2.host.compile_step import make_mesh
from maxtext_ling2.maxtext_api import overrides
from maxtext_ling2.maxtext_api.start import ConfigError
from maxtext_ling2.plan.resolved import planned_config


def run(console: Console, asked: Iterable[tuple[str, str, str, Mapping[str, str]]], named: str | None) -> bool:
  """Prints a line for each topology and mesh; returns whether all are valid.

  Args:
    console: where to print.
    asked: (topology, mesh in words, base yml, settings) of each.
    named: as for `planned_config`.

  Raises:
    TopologyError, ModelError: as `planned_config`.
  """
  valid = True
  for topology, mesh, yml, settings in asked:
    where = f"{topology}, {mesh or 'fsdp'}"
    try:
      config = planned_config(yml, topology, settings, named)
      axes = make_mesh(yml, overrides.join({**settings, "compile_topology": topology}))
    except ConfigError as error:
      console.print(f"{where}: not valid: {error}")
      valid = False
    else:
      console.print(f"{where}: valid: {_described(config, axes)}")
  console.print("nothing was compiled: whether it fits the memory is what `plan` without --check finds out")
  return valid


def _described(config: Any, axes: Mapping[str, int]) -> str:
  cut = " x ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "one device"
  rows, length = int(config.global_batch_size_to_train_on), int(config.max_target_length)
  return f"{config.model_name}, mesh {cut}, {rows} sequences of {length} tokens per step"
