"""LoRA adapters: MaxText's arrays in a checkpoint <-> peft's `adapter_model.safetensors`, and their sum with the base.

An adapter of a weight W [out, in] is A [r, in] and B [out, r]; the adapted weight is W + alpha / r * B A (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). MaxText keeps A as `kernel_lora_a` [in, r] and B as `kernel_lora_b` [r, out], in a scan
stacked where its kernels are. Of routed experts the factor on the side of the model's width is one for all experts.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import NDArray

from maxtext_ling2.checkpoint import (
  blocks,
  export_hf,
  mapping,
  orbax_store,
  safetensors_file,
  stacking,
  stored_weights,
)
from maxtext_ling2.checkpoint.orbax_handlers import StreamedLeaf
from maxtext_ling2.checkpoint.stacking import Leaf
from maxtext_ling2.checkpoint.stock_tables import REPOSITORIES
from maxtext_ling2.errors import CheckpointError

Array = NDArray[Any]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files of an adapter's folder, as peft names them."""

_A, _B = "_lora_a", "_lora_b"
_PREFIX = "base_model.model."
_TUNIX_ITEM = "model_params"
_HINT = "pass the folder that the run with this adapter saved, such as RUN/checkpoints/STEP/model_params"


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The adapter of one Hugging Face weight [out, in].

  Attributes:
    a: [r, in], peft's lora_A.
    b: [out, r], peft's lora_B.
  """

  a: Array
  b: Array

  @property
  def rank(self) -> int:
    """r."""
    return int(self.a.shape[0])

  @property
  def product(self) -> Array:
    """B A, [out, in] float32."""
    return self.b.astype(np.float32) @ self.a.astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
  """All adapters of a model.

  Attributes:
    by_name: by the Hugging Face name of the weight.
    alpha: the scale's numerator.
  """

  by_name: Mapping[str, Adapter]
  alpha: float

  @property
  def rank(self) -> int:
    """The rank of all of them."""
    return next(iter(self.by_name.values())).rank

  @functools.lru_cache(maxsize=1)  # noqa: B019  a weight's blocks follow each other
  def delta(self, name: str) -> Array:
    """alpha / r * B A of one weight, [out, in] float32."""
    return self.by_name[name].product * np.float32(self.alpha / self.rank)

  def added(self, leaf: Leaf, block: blocks.Slices, values: Array) -> Array:
    """A block of a leaf with its adapters added, in float32; the block itself if it has none."""
    parts = [part for part in blocks.hf_slices(leaf, block) if part[1] in self.by_name]
    if not parts:
      return values
    result = values.astype(np.float32)
    for entry, name, index, inner in parts:
      result[index] += entry.from_hf(self.delta(name))[inner]
    return result

  def merged(self, name: str, weight: Array) -> Array:
    """A Hugging Face weight with its adapter added, in float32; the weight itself if it has none."""
    return weight.astype(np.float32) + self.delta(name) if name in self.by_name else weight


def from_checkpoint(checkpoint: epath.PathLike, config: Any) -> Adapters:
  """Reads the adapters that a LoRA run has saved.

  Args:
    checkpoint: `lora.lora_restore_path`: folder of a step, or the item in it.
    config: MaxText config of the model, in the run's layout (`scan_layers`), with its lora_alpha.

  Raises:
    CheckpointError: there are none, they are not this model's, or lora_rank or lora_alpha is not theirs.
  """
  folder = epath.Path(checkpoint)
  folder = folder / _TUNIX_ITEM if (folder / _TUNIX_ITEM).is_dir() else folder
  arrays = {stored_weights.in_model(path): array for path, array in orbax_store.open_arrays(folder).items()}
  arrays = {path: array for path, array in arrays.items() if path[-1].endswith((_A, _B))}
  found: dict[str, Adapter] = {}
  for leaf in stacking.leaves(config):
    a, b = (arrays.pop((*leaf.path[:-1], leaf.path[-1] + suffix), None) for suffix in (_A, _B))
    if a is not None and b is not None:
      found |= _unstacked(leaf, np.asarray(a.read().result()), np.asarray(b.read().result()), folder)
    elif a is not None or b is not None:
      raise CheckpointError(f"{folder}: {'/'.join(leaf.path)} has one of two factors of an adapter; {_HINT}")
  if arrays or not found:
    names = ", ".join("/".join(path) for path in sorted(arrays)[:4])
    what = f"{names} are adapters of no weight of this model" if arrays else "there is no adapter in it"
    raise CheckpointError(f"{folder}: {what}; {_HINT}, and its scan_layers={config.scan_layers}")
  return Adapters(found, _checked_alpha(folder, found, config))


def _checked_alpha(folder: Any, found: Mapping[str, Adapter], config: Any) -> float:
  """The run's alpha; MaxText's trainers save neither alpha nor rank with their adapters."""
  ranks = {adapter.rank for adapter in found.values()}
  if len(ranks) > 1 or config.lora.lora_rank not in (0, *ranks):
    raise CheckpointError(f"{folder}: its adapters have rank {sorted(ranks)}, not lora.lora_rank={config.lora.lora_rank}")
  if not config.lora.lora_alpha > 0:
    raise CheckpointError(
      f"lora.lora_alpha={config.lora.lora_alpha}: the scale of the adapters is lora_alpha / rank, and {folder} does not "
      "say it; pass the lora_alpha of the run"
    )
  return float(config.lora.lora_alpha)


def _unstacked(leaf: Leaf, a: Array, b: Array, folder: Any) -> dict[str, Adapter]:
  """The adapters of a leaf by Hugging Face name, from its factors in MaxText's layout."""
  stacked = (len(leaf.entries), len(leaf.entries[0]))[: leaf.num_stacked_axes]
  axis = min(leaf.axis, 1)
  for name, factor in (("a", a), ("b", b)):
    if factor.shape[axis : axis + len(stacked)] != stacked:
      raise CheckpointError(
        f"{folder}: {'/'.join(leaf.path)}_lora_{name} is {factor.shape}, which is not stacked as {stacked}"
      )
  front = range(len(stacked))
  a, b = (np.moveaxis(x, [axis + i for i in front], front) for x in (a, b))
  found: dict[str, Adapter] = {}
  for cycle, entries in enumerate(leaf.entries):
    for layer, entry in enumerate(entries):
      at = (cycle, layer)[: len(stacked)]
      for expert, name in enumerate(entry.names):
        one_a, one_b = _of_expert(a[at], b[at], expert) if len(entry.names) > 1 else (a[at], b[at])
        found[name] = _checked(entry, one_a, one_b, folder)
  return found


def _of_expert(a: Array, b: Array, expert: int) -> tuple[Array, Array]:
  """One expert's factors: of `wi_0` a [in, r], b [r, E, out]; of `wo` a [E, in, r], b [r, out]."""
  return (a, b[:, expert]) if a.ndim == 2 else (a[expert], b)


def _checked(entry: mapping.Entry, a: Array, b: Array, folder: Any) -> Adapter:
  """An adapter from MaxText's factors a [in, r] and b [r, out] of one weight."""
  adapter = Adapter(a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T)
  if (adapter.b.shape[0], adapter.a.shape[1]) != entry.hf_shape or adapter.rank != adapter.b.shape[1]:
    raise CheckpointError(
      f"{folder}: factors {a.shape} and {b.shape} do not fit {entry.names[0]} {entry.hf_shape}; pass the run's settings"
    )
  return adapter


def exporter(checkpoint: str, config: Any) -> "export_hf.Export | AdapterExport":
  """What MaxText's to_huggingface writes: a checkpoint, with the adapters of `lora.lora_restore_path` added to it, or,
  without a checkpoint, these alone.

  Raises:
    CheckpointError: see `export_hf.Export` and `from_checkpoint`.
  """
  restored = config.lora.lora_restore_path
  if not checkpoint:
    return AdapterExport(restored, config, REPOSITORIES.get(config.model_name, ""))
  return export_hf.Export(checkpoint, config, from_checkpoint(restored, config).added if restored else None)


class AdapterExport:
  """Writes adapters as a folder that peft reads.

  Args:
    checkpoint, config: see `from_checkpoint`.
    base: name or folder of the base model, for peft's config.
  """

  def __init__(self, checkpoint: epath.PathLike, config: Any, base: str):
    self.adapters, self.base = from_checkpoint(checkpoint, config), base
    self._leaves = stacking.leaves(config)

  def keys(self) -> list[str]:
    """MaxText's keys of the tensors, as in its conversion tables."""
    return [leaf.table_key for leaf in self._leaves]

  def write(self, folder: str, tokenizer: str | None) -> None:
    """Writes the folder, float32; `tokenizer` is not needed.

    Raises:
      CheckpointError: the folder is not empty.
    """
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()) or target.is_file():
      raise CheckpointError(f"{target}: not an empty folder; delete it, or choose another")
    target.mkdir(parents=True, exist_ok=True)
    tensors = dict(_peft_tensors(self.adapters))
    specs = [(name, tensor.shape, np.dtype(np.float32)) for name, tensor in tensors.items()]
    with safetensors_file.create(target / WEIGHTS, specs) as new:
      for name, tensor in tensors.items():
        new[name].array[...] = tensor
    settings = {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": self.base or tokenizer,
      "r": self.adapters.rank,
      "lora_alpha": self.adapters.alpha,
      "lora_dropout": 0.0,
      "bias": "none",
      "inference_mode": True,
      # Whole names: short ones such as up_proj would also match the routed experts.
      "target_modules": [name.removesuffix(".weight") for name in self.adapters.by_name],
    }
    (target / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _peft_tensors(adapters: Adapters) -> Iterator[tuple[str, Array]]:
  for name, adapter in adapters.by_name.items():
    module = _PREFIX + name.removesuffix(".weight")
    yield f"{module}.lora_A.weight", adapter.a
    yield f"{module}.lora_B.weight", adapter.b


def from_peft(folder: Path, config: Any) -> Adapters:
  """Reads a folder that peft, or `AdapterExport`, wrote.

  Raises:
    CheckpointError: it is no LoRA adapter of this model, or uses what W + alpha / r * B A does not say.
  """
  settings = _peft_settings(folder)
  known = {name: entry for entry in mapping.entries(config) if entry.linear for name in entry.names}
  factors: dict[str, dict[str, Array]] = {}
  for key, tensor in safetensors_file.read(folder / WEIGHTS).items():
    module, dot, letter = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
    name = f"{module}.weight"
    if not dot or letter not in ("A", "B") or name not in known:
      raise CheckpointError(f"{folder / WEIGHTS}: {key} is no LoRA factor of a weight of this model; pass its adapter")
    factors.setdefault(name, {})[letter] = tensor
  found: dict[str, Adapter] = {}
  for name, pair in factors.items():
    shape = known[name].hf_shape
    fits = pair.keys() == {"A", "B"} and pair["A"].shape == (settings["r"], shape[1])
    if not fits or pair["B"].shape != (shape[0], settings["r"]):
      shapes = {letter: tensor.shape for letter, tensor in pair.items()}
      raise CheckpointError(f"{folder / WEIGHTS}: factors {shapes} of {name} do not fit {shape} with r={settings['r']}")
    found[name] = Adapter(pair["A"], pair["B"])
  if not found:
    raise CheckpointError(f"{folder / WEIGHTS}: no adapter in it; pass a folder that peft saved")
  return Adapters(found, float(settings["lora_alpha"]))


_PLAIN = {
  "peft_type": "LORA",
  "bias": "none",
  "use_dora": False,
  "use_rslora": False,
  "fan_in_fan_out": False,
  "modules_to_save": None,
  "rank_pattern": {},
  "alpha_pattern": {},
  "lora_bias": False,
}
"""Settings of peft that change what an adapter computes, with the values that `Adapters` computes."""


def _peft_settings(folder: Path) -> dict[str, Any]:
  path = folder / CONFIG
  try:
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or type(settings["r"]) is not int or settings["r"] < 1:
      raise ValueError("r is not a positive integer")
    if not (isinstance(settings["lora_alpha"], (int, float)) and math.isfinite(settings["lora_alpha"])):
      raise ValueError("lora_alpha is not a number")
  except (OSError, ValueError, KeyError) as error:
    raise CheckpointError(f"{path}: not an adapter's config ({error}); pass a folder that peft saved") from error
  for key, value in _PLAIN.items():
    if settings.get(key) not in (value, None, [], {}):
      raise CheckpointError(
        f"{path}: {key}={settings[key]!r}, but MaxText's LoRA has {key}={value!r} only; merge it with peft"
      )
  return settings


def check(adapters: Adapters, config: Any, target: epath.Path) -> None:
  """Raises the errors of `write` before anything is written."""
  if target.exists():
    raise CheckpointError(f"{target}: already exists; delete it, or choose another base_output_directory")
  _factors(adapters, config)


def write(adapters: Adapters, config: Any, target: epath.Path, storage: orbax_store.Storage) -> None:
  """Writes adapters as a checkpoint that MaxText's `lora.lora_restore_path` loads, in the layout of a config; float32.

  Raises:
    CheckpointError: the target exists, or MaxText cannot represent the adapters in this layout.
  """
  tree: dict[str, Any] = {}
  for path, array in _factors(adapters, config).items():
    node = functools.reduce(lambda node, key: node.setdefault(key, {}), path[:-1], tree)
    node[path[-1]] = {"value": StreamedLeaf(array.shape, array.dtype, array.shape, array.__getitem__)}
  factors = {"lora_rank": adapters.rank, "lora_alpha": adapters.alpha}
  target.parent.mkdir(parents=True, exist_ok=True)
  orbax_store.write(target, tree, {"scan_layers": bool(config.scan_layers), "lora": factors}, storage)


def _factors(adapters: Adapters, config: Any) -> dict[mapping.Path, Array]:
  """The factors by path in MaxText's model, in its layout."""
  found: dict[mapping.Path, Array] = {}
  for leaf in stacking.leaves(config):
    names = list(leaf.names)
    number = sum(name in adapters.by_name for name in names)
    if 0 < number < len(names):
      raise CheckpointError(
        f"{'/'.join(leaf.path)}: {number} of its {len(names)} weights have an adapter, but MaxText needs all or none; "
        "merge the adapter instead (load_parameters_path), or set scan_layers=false"
      )
    if number:
      for suffix, factor in zip((_A, _B), _stacked(leaf, adapters), strict=True):
        found[*leaf.path[:-1], leaf.path[-1] + suffix] = factor
  return found


def _stacked(leaf: Leaf, adapters: Adapters) -> tuple[Array, Array]:
  """A leaf's factors in MaxText's layout, float32; the inverse of `_unstacked`."""
  if len(leaf.first.names) > 1:
    raise CheckpointError(
      f"{'/'.join(leaf.path)}: MaxText's LoRA has one factor for all experts, which peft's adapters of single experts "
      "need not share; merge the adapter instead (load_parameters_path)"
    )
  found = [[adapters.by_name[entry.names[0]] for entry in cycle] for cycle in leaf.entries]
  a = np.stack([np.stack([adapter.a.T for adapter in cycle]) for cycle in found]).astype(np.float32)  # [.., .., in, r]
  b = np.stack([np.stack([adapter.b.T for adapter in cycle]) for cycle in found]).astype(np.float32)  # [.., .., r, out]
  single = (slice(None),) * leaf.num_stacked_axes + (0,) * (2 - leaf.num_stacked_axes)
  a, b = a[single], b[single]
  front = range(leaf.num_stacked_axes)
  axis = min(leaf.axis, 1)
  moved = [axis + i for i in front]
  a, b = (np.ascontiguousarray(np.moveaxis(x, front, moved)) for x in (a, b))
  return a, b
