"""LING2's entries in MaxText's conversion tables, derived from `mapping.py` and `stacking.py`.

MaxText's commands check with them that every tensor is accounted for. What moves the weights of a LING2 model is
`import_hf.py` and `export_hf.py`; the hooks say the same a tensor at a time, for MaxText's tools that ask for them.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.checkpoint import hf_config, mapping, stacking
from maxtext_ling2.checkpoint.mapping import Entry

Array = NDArray[Any]
Hook = Callable[[Array, Any], Array]

REPOSITORIES = {"ling2.6-flash": "inclusionAI/Ling-2.6-flash", "ling2.5-1t": "inclusionAI/Ling-2.5-1T"}
"""Where the weights of a model are published; MaxText calls them HF_IDS."""


def tables(ymls: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
  """All entries: table -> model name -> entry.

  Args:
    ymls: the model yml of each model name.
  """
  return {
    "HF_IDS": {name: REPOSITORIES.get(name, "") for name in ymls},
    "PARAM_MAPPING": dict.fromkeys(ymls, param_mapping),
    "HOOK_FNS": dict.fromkeys(ymls, hook_functions),
    "HF_SHAPE": dict.fromkeys(ymls, hf_shapes),
    "HF_MODEL_CONFIGS": {name: HfModelConfig(path) for name, path in ymls.items()},
  }


class HfModelConfig:
  """Stands where MaxText keeps a transformers configuration object.

  It has no attributes, so MaxText compares none with the run's settings: the exported config.json is made from these.
  """

  def __init__(self, yml: Path):
    self._yml = yml

  def to_dict(self) -> dict[str, Any]:
    """config.json of the model as its yml defines it; empty for a yml that leaves the sizes open."""
    import yaml

    settings = yaml.safe_load(self._yml.read_text(encoding="utf-8"))
    return hf_config.from_maxtext(structure(settings)) if "base_emb_dim" in settings else {}


def structure(settings: Mapping[str, Any]) -> SimpleNamespace:
  """Settings of a model yml with MaxText's derived names, enough to list the model's tensors without MaxText."""
  from maxtext_ling2.configs.fields import DEFAULTS

  names = {"base_num_decoder_layers", "base_emb_dim", "base_mlp_dim", "base_moe_mlp_dim", "base_num_query_heads"}
  derived = {name.removeprefix("base_"): settings[name] for name in names}
  defaults = {"scan_layers": False, "param_scan_axis": 1, "mtp_loss_scaling_factor": 0.1, "rope_type": "default"}
  return SimpleNamespace(**{**DEFAULTS, **defaults, "rope_min_timescale": 1, **settings, **derived})


def param_mapping(hf: Mapping[str, Any], config: Any, scan_layers: bool = False) -> dict[str, Any]:
  """MaxText's key -> Hugging Face's name, or nested lists of names, the outermost stacked axis first."""
  del hf, scan_layers  # the MaxText config knows both
  return {leaf.table_key: _names(leaf) for leaf in stacking.leaves(config)}


def _names(leaf: stacking.Leaf) -> Any:
  """The names by expert (if any), then block, then layer, as far as these axes exist."""

  def stacked(name_of: Callable[[Entry], str]) -> Any:
    if leaf.depth == 0:
      return name_of(leaf.members[0][0])
    if leaf.depth == 1:
      return [name_of(block[0]) for block in leaf.members]
    return [[name_of(entry) for entry in block] for block in leaf.members]

  experts = len(leaf.members[0][0].names)
  if experts == 1:
    return stacked(lambda entry: entry.names[0])
  return [stacked(lambda entry, e=expert: entry.names[e]) for expert in range(experts)]  # type: ignore[misc]


def hook_functions(
  hf: Mapping[str, Any], config: Any, scan_layers: bool = False, saving_to_hf: bool = False
) -> dict[str, Hook]:
  """MaxText's key -> what turns one Hugging Face tensor into MaxText's, or back."""
  del hf, scan_layers
  turn = _to_hf if saving_to_hf else _to_maxtext
  return {leaf.table_key: functools.partial(turn, leaf.members[0][0]) for leaf in stacking.leaves(config)}


def _to_maxtext(entry: Entry, tensor: Array, shape: Any) -> Array:
  del shape
  return entry.view(tensor)


def _to_hf(entry: Entry, tensor: Array, shape: Any) -> Array:
  return tensor.reshape(shape[::-1]).T if entry.linear else tensor


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Hugging Face's name -> shape, for a config.json."""
  if not hf:
    return {}
  config = structure(hf_config.to_maxtext(dict(hf)))
  return {name: entry.hf_shape for entry in mapping.entries(config) for name in entry.names}


def parameter_count(config: Any) -> int:
  """Number of parameters of a LING2 model, router biases included."""
  return sum(int(np.prod(leaf.shape)) for leaf in stacking.leaves(config))
