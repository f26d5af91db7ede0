"""Hugging Face -> MaxText: checks first, then writes the checkpoint block by block.

Memory: a few blocks (`blocks.BLOCK_BYTES`), independently of the size of the model. Everything that can be checked
without reading the weights is checked before anything is written.
"""

import collections
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import NDArray
from rich.console import Console

from maxtext_ling2.checkpoint import (
  blocks,
  decay_offset,
  hf_config,
  mapping,
  orbax_store,
  progress,
  safetensors_file,
  stacking,
)
from maxtext_ling2.checkpoint.hf_checkpoint import HfCheckpoint
from maxtext_ling2.checkpoint.orbax_handlers import StreamedLeaf
from maxtext_ling2.checkpoint.orbax_store import Storage
from maxtext_ling2.checkpoint.stacking import Leaf
from maxtext_ling2.checkpoint.stored_weights import ROOT
from maxtext_ling2.errors import CheckpointError

logger = logging.getLogger("maxtext_ling2")
Array = NDArray[Any]

SAVE_DTYPES = ("float32", "bfloat16")

COMPRESS = "MAXTEXT_LING2_COMPRESS"
"""Environment variable: 1 compresses converted checkpoints, as MaxText does."""

# Settings that config.json determines, but that concern training, not the weights; or that are compared separately.
_NOT_COMPARED = {
  *("decoder_block", "mtp_num_layers", "shared_experts", "moe_shared_expert_dim", "enable_dropout", "float32_logits"),
  *("routed_bias_dtype", "enable_routed_bias_grad"),
}
# Lengths that only YaRN uses.
_YARN_ONLY = {"max_position_embeddings", "original_max_position_embeddings"}


class Import:
  """One conversion, checked.

  Args:
    folder: the Hugging Face folder.
    config: MaxText config (HyperParameters) of the model, in the layout to write (`scan_layers`).
    output: folder of the step to write, such as DIR/0.
    save_dtype: dtype of all weights but router biases, which are float32 on both sides.
    change: gets the name and values of each Hugging Face tensor and returns those to write; None: as they are.

  Raises:
    CheckpointError: the folder is not a checkpoint of this model, the output exists, or the disk is too small.
  """

  def __init__(
    self,
    folder: Path,
    config: Any,
    output: epath.Path,
    save_dtype: str,
    change: Callable[[str, Array], Array] | None = None,
  ):
    if save_dtype not in SAVE_DTYPES:
      raise CheckpointError(f"save_dtype={save_dtype}: not one of {', '.join(SAVE_DTYPES)}, which LING2 has; choose one")
    self.folder, self.config, self.output, self.change = Path(folder), config, output, change
    self.dtype = safetensors_file.dtype(save_dtype)
    self.leaves = stacking.leaves(config)
    self._check_target()
    self.says_offset = decay_offset.FIELD in check_same_model(self.folder, config)
    with HfCheckpoint(self.folder) as tensors:
      tensors.check(config)

  @property
  def nbytes(self) -> int:
    """Bytes of the weights in the checkpoint, uncompressed."""
    return sum(math.prod(leaf.shape) * self._dtype_of(leaf).itemsize for leaf in self.leaves)

  def _dtype_of(self, leaf: Leaf) -> np.dtype[Any]:
    return np.dtype(np.float32) if leaf.keeps_dtype else self.dtype

  def _check_target(self) -> None:
    if self.output.exists():
      raise CheckpointError(f"{self.output}: already exists; delete it, or choose another base_output_directory")
    check_space(self.output, self.nbytes)

  def run(self, storage: Storage, console: Console) -> None:
    """Writes the checkpoint, which appears when it is complete. Weights that are NaN or infinite are named and kept.

    Raises:
      CheckpointError: the disk is full.
    """
    if not self.says_offset:
      logger.warning(decay_offset.unstated(self.folder, self.config.gla_decay_layer_offset))
    metadata = {"scan_layers": bool(self.config.scan_layers)}
    title = f"{self.folder.name} -> {self.output}"
    names = sum(len(entry.names) for entry in mapping.entries(self.config))
    with HfCheckpoint(self.folder) as source, progress.bar(console, title, self.nbytes, names) as advance:
      self._source, self._advance = source, advance
      self._non_finite: set[str] = set()
      weights = nested({(*ROOT, *leaf.path): self._streamed(leaf) for leaf in self.leaves})
      tree = {**weights, "step": 0, "opt_state": {}}
      self.output.parent.mkdir(parents=True, exist_ok=True)
      orbax_store.write(self.output, tree, metadata, storage)

  def _streamed(self, leaf: Leaf) -> StreamedLeaf:
    dtype = self._dtype_of(leaf)
    shape = blocks.block_shape(leaf, dtype.itemsize)
    unfinished = collections.Counter(
      name for block in blocks.block_slices(leaf.shape, shape) for _, name, _, _ in blocks.hf_slices(leaf, block)
    )

    def get(name: str) -> Array:
      return self.change(name, self._source[name]) if self.change else self._source[name]

    def read(block: blocks.Slices) -> Array:
      values = blocks.read_block(leaf, block, get, dtype)
      if not blocks.all_finite(values):
        self._warn_of_non_finite(leaf, block)
      finished = 0
      for _, name, _, _ in blocks.hf_slices(leaf, block):
        unfinished[name] -= 1
        finished += unfinished[name] == 0
      self._advance(values.nbytes, finished)
      return values

    return StreamedLeaf(leaf.shape, dtype, shape, read)

  def _warn_of_non_finite(self, leaf: Leaf, block: blocks.Slices) -> None:
    """Warns once per tensor that holds NaN or infinity."""
    names = [name for _, name, _, _ in blocks.hf_slices(leaf, block) if not blocks.all_finite(self._source[name])]
    for name in names or [f"{'/'.join(leaf.path)} (too large for {self.dtype})"]:
      if name not in self._non_finite:
        self._non_finite.add(name)
        logger.warning("%s: %s holds NaN or infinity; converted as it is, but do not train from it.", self.folder, name)


def nested(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
  """Turns values by path into nested dicts."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree


def check_space(target: epath.Path, needed: int) -> None:
  """Raises CheckpointError if a local target's disk has fewer than `needed` bytes free."""
  if "://" in str(target):
    return
  parent = Path(target)
  while not parent.exists():
    parent = parent.parent
  free = shutil.disk_usage(parent).free
  if free < needed:
    raise CheckpointError(
      f"{target}: needs {needed / 2**30:.2f} GiB, but {parent} has {free / 2**30:.2f} free; make room, or write elsewhere"
    )


def check_same_model(folder: Path, config: Any) -> dict[str, Any]:
  """Compares config.json with the MaxText config, so that no weights are loaded into a model that computes differently.

  Returns:
    The MaxText settings that config.json determines.

  Raises:
    CheckpointError: config.json is not LING2's, or a setting differs; all are named.
  """
  settings = hf_config.to_maxtext(hf_config.read(folder))
  problems = []
  free = _NOT_COMPARED if settings["rope_type"] == "yarn" else _NOT_COMPARED | _YARN_ONLY
  groups = dict(zip(("n_routing_groups", "topk_routing_group"), hf_config.routing_groups(config), strict=True))
  for field, value in settings.items():
    ours = groups.get(field, hf_config.effective(config, field))
    ours = getattr(ours, "value", ours)
    if field not in free and ours != value:
      problems.append(f"{field}={ours!r} is not {value!r}, as config.json says")
  width = settings["shared_experts"] and settings["moe_shared_expert_dim"]
  if hf_config.shared_width(config) != width:
    problems.append(f"shared experts are {hf_config.shared_width(config)} wide, but {width} in config.json")
  if config.mtp_num_layers > settings["mtp_num_layers"]:
    problems.append(
      f"mtp_num_layers={config.mtp_num_layers}, but config.json has {settings['mtp_num_layers']} MTP layers"
    )
  if problems:
    raise CheckpointError(
      f"{folder}: not the model of the settings, because {'; '.join(problems)}; pass these settings with "
      "override_model_config=true, or use the YAML file that `maxtext-ling2 config` writes for the folder"
    )
  return settings
