"""LING2's entries in MaxText's conversion tables, derived from `mapping.py` and `stacking.py`.

MaxText's commands use them to check that every tensor is accounted for. The weights of a LING2 model are converted by
`import_hf.py` and `export_hf.py`; the hooks do the same per tensor, for MaxText's tools that call them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from numpy.typing import NDArray

from maxtext_ling2.checkpoint import hf_config, mapping, stacking
from maxtext_ling2.checkpoint.mapping import Entry

Array = NDArray[Any]
Hook = Callable[[Array, Any], Array]

REPOSITORIES = {"ling2.6-flash": "inclusionAI/Ling-2.6-flash", "ling2.5-1t": "inclusionAI/Ling-2.5-1T"}
"""Hugging Face repositories of published weights, MaxText's HF_IDS."""


def tables(ymls: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
  """Builds all entries: table -> model name -> entry.

  Args:
    ymls: the model's YAML file per model name.
  """
  return {
    "HF_IDS": {name: REPOSITORIES.get(name, "") for name in ymls},
    "PARAM_MAPPING": dict.fromkeys(ymls, param_mapping),
    "HOOK_FNS": dict.fromkeys(ymls, hook_functions),
    "HF_SHAPE": dict.fromkeys(ymls, hf_shapes),
    "HF_MODEL_CONFIGS": {name: HfModelConfig(path) for name, path in ymls.items()},
  }


class HfModelConfig:
  """Takes the place of a transformers configuration object in MaxText's table.

  It has no attributes, so MaxText compares none with the run's settings, which the exported config.json is made from.
  """

  def __init__(self, yml: Path):
    self._yml = yml

  def to_dict(self) -> dict[str, Any]:
    """config.json of the model that the YAML file defines; empty if the file does not set the sizes."""
    import yaml

    settings = yaml.safe_load(self._yml.read_text(encoding="utf-8"))
    return hf_config.from_maxtext(structure(settings)) if "base_emb_dim" in settings else {}


def structure(settings: Mapping[str, Any]) -> SimpleNamespace:
  """Completes the settings of a model's YAML file, enough to list the model's tensors without MaxText."""
  from maxtext_ling2.configs.fields import DEFAULTS

  names = {"base_num_decoder_layers", "base_emb_dim", "base_mlp_dim", "base_moe_mlp_dim", "base_num_query_heads"}
  derived = {name.removeprefix("base_"): settings[name] for name in names}
  defaults = {"scan_layers": False, "param_scan_axis": 1, "rope_type": "default"}
  defaults |= {"mtp_loss_scaling_factor": hf_config.MTP_LOSS_SCALING_FACTOR}
  return SimpleNamespace(**{**DEFAULTS, **defaults, "rope_min_timescale": 1, **settings, **derived})


def param_mapping(hf: Mapping[str, Any], config: Any, scan_layers: bool = False) -> dict[str, Any]:
  """MaxText's key -> Hugging Face's name, or nested lists of names, the outermost stacked axis first."""
  del hf, scan_layers  # the MaxText config knows both
  return {leaf.table_key: _names(leaf) for leaf in stacking.leaves(config)}


def _names(leaf: stacking.Leaf) -> Any:
  """The names by expert, then cycle, then layer, as far as these axes exist."""

  def stacked(expert: int) -> Any:
    names = [[entry.names[expert] for entry in cycle] for cycle in leaf.entries]
    return (names[0][0], [cycle[0] for cycle in names], names)[leaf.num_stacked_axes]

  experts = len(leaf.first.names)
  return stacked(0) if experts == 1 else [stacked(expert) for expert in range(experts)]


def hook_functions(
  hf: Mapping[str, Any], config: Any, scan_layers: bool = False, saving_to_hf: bool = False
) -> dict[str, Hook]:
  """MaxText's key -> the function that converts one Hugging Face tensor to MaxText's layout, or back."""
  del hf, scan_layers

  def hook(entry: Entry) -> Hook:
    return lambda tensor, shape: entry.to_hf(tensor) if saving_to_hf else entry.from_hf(tensor)

  return {leaf.table_key: hook(leaf.first) for leaf in stacking.leaves(config)}


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Hugging Face's name -> shape, for a config.json."""
  if not hf:
    return {}
  config = structure(hf_config.to_maxtext(dict(hf)))
  return {name: entry.hf_shape for entry in mapping.entries(config) for name in entry.names}
