"""Hugging Face -> MaxText: a checked plan first, then the checkpoint a block at a time.

Memory: a few blocks (`blocks.BLOCK_BYTES`), however many layers or experts the model has. Everything that can be told
without reading the weights is told before anything is written.
"""

import collections
import logging
import math
import shutil
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
from maxtext_ling2.checkpoint.hf_folder import HfFolder
from maxtext_ling2.checkpoint.orbax_store import Storage, StreamedLeaf
from maxtext_ling2.checkpoint.stacking import Leaf
from maxtext_ling2.errors import CheckpointError

logger = logging.getLogger("maxtext_ling2")
Array = NDArray[Any]

SAVE_DTYPES = ("float32", "bfloat16")

# Settings of a config.json that say how to train, not what the weights are; or that are compared in another way.
_FREE = {
  *("decoder_block", "mtp_num_layers", "shared_experts", "moe_shared_expert_dim", "enable_dropout", "float32_logits"),
  *("routed_bias_dtype", "enable_routed_bias_grad"),
}
# The lengths that only YaRN looks at.
_YARN_ONLY = {"max_position_embeddings", "original_max_position_embeddings"}


class Import:
  """One conversion, checked.

  Args:
    folder: the Hugging Face folder.
    config: MaxText config (HyperParameters) of the model, in the layout to be written (`scan_layers`).
    output: folder of the step to be written, such as DIR/0.
    save_dtype: of all weights but router biases, which are float32 on both sides.

  Raises:
    CheckpointError: the folder is not a checkpoint of this model, the target exists, or the disk is too small.
  """

  def __init__(self, folder: Path, config: Any, output: epath.Path, save_dtype: str):
    if save_dtype not in SAVE_DTYPES:
      raise CheckpointError(f"save_dtype={save_dtype}: not one of {', '.join(SAVE_DTYPES)}, which LING2 has; choose one")
    self.folder, self.config, self.output = Path(folder), config, output
    self.dtype = safetensors_file.dtype(save_dtype)
    self.leaves = stacking.leaves(config)
    self._check_target()
    self.says_offset = decay_offset.FIELD in check_same_model(self.folder, config)
    with HfFolder(self.folder) as tensors:
      tensors.check(config)

  @property
  def nbytes(self) -> int:
    """Bytes of the weights in the checkpoint, uncompressed."""
    return sum(math.prod(leaf.shape) * self._dtype_of(leaf).itemsize for leaf in self.leaves)

  def _dtype_of(self, leaf: Leaf) -> np.dtype[Any]:
    return np.dtype(np.float32) if leaf.keeps_dtype else self.dtype

  def _check_target(self) -> None:
    if self.output.exists():
      raise CheckpointError(
        f"{self.output}: already there, because something was saved under it; delete it, or choose another "
        "base_output_directory"
      )
    check_space(self.output, self.nbytes)

  def run(self, storage: Storage, console: Console) -> None:
    """Writes the checkpoint, which appears when it is whole. Weights that are NaN or infinite are named and kept.

    Raises:
      CheckpointError: the disk is full.
    """
    if not self.says_offset:
      logger.warning(decay_offset.unstated(self.folder, self.config.gla_decay_layer_offset))
    metadata = {"scan_layers": bool(self.config.scan_layers)}
    title = f"{self.folder.name} -> {self.output}"
    names = sum(len(entry.names) for entry in mapping.entries(self.config))
    with HfFolder(self.folder) as source, progress.bar(console, title, self.nbytes, names) as advance:
      self._source, self._advance = source, advance
      self._doubtful: set[str] = set()
      tree = {"params": nested({leaf.keys: self._streamed(leaf) for leaf in self.leaves}), "step": 0, "opt_state": {}}
      self.output.parent.mkdir(parents=True, exist_ok=True)
      orbax_store.write(self.output, tree, metadata, storage)

  def _streamed(self, leaf: Leaf) -> StreamedLeaf:
    dtype = self._dtype_of(leaf)
    shape = blocks.block_shape(leaf, dtype.itemsize)
    unfinished = collections.Counter(entry_name for _, entry_name, _, _ in _all_parts(leaf, shape))

    def make(box: blocks.Box) -> Array:
      block = blocks.fill(leaf, box, self._source.__getitem__, dtype)
      if not blocks.all_finite(block):
        self._name_doubtful(leaf, box)
      finished = 0
      for _, name, _, _ in blocks.parts(leaf, box):
        unfinished[name] -= 1
        finished += unfinished[name] == 0
      self._advance(block.nbytes, finished)
      return block

    return StreamedLeaf(leaf.shape, dtype, shape, make)

  def _name_doubtful(self, leaf: Leaf, box: blocks.Box) -> None:
    """Warns once of each tensor that holds NaN or infinity."""
    names = [name for _, name, _, _ in blocks.parts(leaf, box) if not blocks.all_finite(self._source[name])]
    for name in names or [f"{'/'.join(leaf.path)} (too large for {self.dtype})"]:
      if name not in self._doubtful:
        self._doubtful.add(name)
        logger.warning("%s: %s holds NaN or infinity; converted as it is, but do not train from it.", self.folder, name)


def _all_parts(leaf: Leaf, shape: tuple[int, ...]) -> Any:
  return (part for box in blocks.boxes(leaf.shape, shape) for part in blocks.parts(leaf, box))


def nested(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
  """Values by path as dicts in dicts."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree


def check_space(target: epath.Path, needed: int) -> None:
  """Raises CheckpointError if the disk of a local target is too small for so many bytes."""
  if "://" in str(target):
    return
  place = Path(target)
  while not place.exists():
    place = place.parent
  free = shutil.disk_usage(place).free
  if free < needed:
    raise CheckpointError(
      f"{target}: needs {needed / 2**30:.2f} GiB, but {place} has {free / 2**30:.2f} free; make room, or write elsewhere"
    )


def check_same_model(folder: Path, config: Any) -> dict[str, Any]:
  """Compares config.json with the MaxText config, so that no weights end up in a model that computes something else.

  Returns:
    The MaxText settings that config.json stands for.

  Raises:
    CheckpointError: config.json is not LING2's, or a setting differs; all are named.
  """
  settings = hf_config.to_maxtext(hf_config.read(folder))
  problems = []
  free = _FREE if settings["rope_type"] == "yarn" else _FREE | _YARN_ONLY
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
      f"{folder}: not the model that MaxText was told, because {'; '.join(problems)}; pass these settings with "
      "override_model_config=true, or use the YAML file that `maxtext-ling2 config` writes for the folder"
    )
  return settings
