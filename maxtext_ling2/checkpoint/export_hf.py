"""MaxText -> Hugging Face: allocates the safetensors files, then writes them block by block.

Memory: a few blocks as the checkpoint stores them. The files are mapped, so a tensor that is spread over many blocks
(of a scanned layer) is never held whole.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import NDArray
from rich.console import Console

from maxtext_ling2.checkpoint import (
  blocks,
  disk,
  exported_code,
  hf_config,
  mapping,
  progress,
  safetensors_file,
  stored_weights,
)
from maxtext_ling2.checkpoint.hf_checkpoint import INDEX
from maxtext_ling2.checkpoint.import_hf import check_space
from maxtext_ling2.checkpoint.safetensors_file import NewTensor
from maxtext_ling2.checkpoint.stacking import Leaf
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.model import yarn

logger = logging.getLogger("maxtext_ling2")
Array = NDArray[Any]
type Change = Callable[[Leaf, blocks.Slices, Array], Array]

SHARD_BYTES = 4 * 2**30
_WRITERS = 2  # threads; writing takes most of the time
_TOKENIZER_FILES = (
  *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
  *("*.model", "*.tiktoken", "generation_config.json", "LICENSE*", "NOTICE*"),
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Default of the official config class (inclusionAI/Ring-V2.5) for the ids of padding and end of text; a model with a
# smaller vocabulary would not load there.
_OFFICIAL_SPECIAL_TOKEN = 156892


class Export:
  """One conversion, checked.

  Args:
    checkpoint: a MaxText checkpoint, the folder of a step or its `items`; a path or a URL.
    config: MaxText config of the model, in the layout of the checkpoint (`scan_layers`).
    change: gets each block (leaf, its slices, its values) and returns the values to write; None: as they are.

  Raises:
    CheckpointError: the checkpoint is not of this model, or Hugging Face's code cannot represent the model.
  """

  def __init__(self, checkpoint: epath.PathLike, config: Any, change: Change | None = None):
    self.checkpoint, self.config, self.change = epath.Path(checkpoint), config, change
    self.hf_config = hf_config.from_maxtext(config)
    self.leaves, self.stores = stored_weights.open_weights(self.checkpoint, config)

  def keys(self) -> list[str]:
    """MaxText's keys of the tensors, as in its conversion tables."""
    return [leaf.table_key for leaf in self.leaves]

  def write(self, folder: str, tokenizer: str | None) -> None:
    """Writes the folder in the config's `weight_dtype`, as MaxText's command asks for it; see `run`."""
    dtype = str(getattr(self.config.weight_dtype, "value", self.config.weight_dtype))
    self.run(Path(folder), dtype, Path(tokenizer) if tokenizer else None, progress.console())

  def run(self, target: Path, dtype: str, tokenizer: Path | None, console: Console) -> None:
    """Writes the folder, which appears when it is complete.

    Args:
      target: the folder; must not exist, or be empty.
      dtype: of all weights but router biases, which stay float32.
      tokenizer: a folder whose tokenizer files are copied.
      console: for the progress bar.

    Raises:
      CheckpointError: the target is not empty, or the disk is too small.
    """
    if target.is_dir() and any(target.iterdir()) or target.is_file():
      raise CheckpointError(f"{target}: not an empty folder; delete it, or choose another")
    for caveat in _caveats(self.config):
      logger.warning("%s: %s", target, caveat)
    files = self._plan(dtype)
    size = sum(math.prod(shape) * one.itemsize for tensors in files.values() for _, shape, one in tensors)
    check_space(epath.Path(target), size)
    partial = target.parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
      partial.mkdir(parents=True)
      with progress.bar(console, f"{self.checkpoint} -> {target.name}", size, sum(map(len, files.values()))) as advance:
        self._write_weights(partial, files, advance)
      self._write_texts(partial, tokenizer)
      os.replace(partial, target)
    except BaseException:
      shutil.rmtree(partial, ignore_errors=True)
      raise

  def _plan(self, dtype: str) -> dict[str, list[tuple[str, tuple[int, ...], np.dtype[Any]]]]:
    """Assigns tensors to files: file name -> (name, shape, dtype) of each tensor, in the order of the layers."""
    shards: list[list[tuple[str, tuple[int, ...], np.dtype[Any]]]] = [[]]
    room = SHARD_BYTES
    for entry in mapping.entries(self.config):
      one = safetensors_file.DTYPES["F32"] if entry.keeps_dtype else safetensors_file.dtype(dtype)
      nbytes = math.prod(entry.hf_shape) * one.itemsize
      for name in entry.names:
        if nbytes > room and shards[-1]:
          shards.append([])
          room = SHARD_BYTES
        shards[-1].append((name, entry.hf_shape, one))
        room -= nbytes
    if len(shards) == 1:
      return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}

  def _write_weights(self, folder: Path, files: Mapping[str, Any], advance: progress.Advance) -> None:
    with contextlib.ExitStack() as stack:
      new: dict[str, NewTensor] = {}
      for file, tensors in files.items():
        new |= stack.enter_context(safetensors_file.create(folder / file, tensors))
      stack.enter_context(disk.background_fsync(lambda: [folder / file for file in files]))
      pool = stack.enter_context(ThreadPoolExecutor(_WRITERS))
      for leaf in self.leaves:
        self._write_leaf(leaf, new, pool, advance)
    if len(files) > 1:
      weight_map = {name: file for file, tensors in files.items() for name, _, _ in tensors}
      size = sum(tensor.array.nbytes for tensor in new.values())
      _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})

  def _write_leaf(self, leaf: Leaf, new: Mapping[str, NewTensor], pool: Executor, advance: progress.Advance) -> None:
    itemsize = new[leaf.first.names[0]].array.dtype.itemsize

    def write(block: blocks.Slices, values: Array) -> bool:
      values = self.change(leaf, block, values) if self.change else values
      blocks.write_block(leaf, block, values, new.__getitem__)
      advance(values.size * itemsize, 0)
      return blocks.all_finite(values)

    finite = True
    writing: deque[Future[bool]] = deque()
    for block, values in stored_weights.read_blocks(self.stores[leaf.path]):
      writing.append(pool.submit(write, block, values))
      if len(writing) > _WRITERS:
        finite &= writing.popleft().result()
    finite &= all(future.result() for future in list(writing))
    if not finite:
      logger.warning("%s: %s holds NaN or infinity; exported as it is.", self.checkpoint, "/".join(leaf.path))
    advance(0, len(list(leaf.names)))

  def _write_texts(self, folder: Path, tokenizer: Path | None) -> None:
    """Writes config.json, the PyTorch code, and the tokenizer's files; its special tokens go into config.json."""
    config = self.hf_config | exported_code.keys()
    config["torch_dtype"] = config["dtype"] = self._torch_dtype(folder)
    if tokenizer is not None:
      found = {path for pattern in _TOKENIZER_FILES for path in tokenizer.glob(pattern) if path.is_file()}
      if not found:
        logger.warning("%s: holds no tokenizer files; exported without a tokenizer.", tokenizer)
      for path in sorted(found):
        _copy_text(path, folder / path.name)
      if (tokenizer / "config.json").is_file():
        theirs = hf_config.read(tokenizer)
        config |= {key: theirs[key] for key in _SPECIAL_TOKENS if key in theirs}
    if self.config.vocab_size <= _OFFICIAL_SPECIAL_TOKEN:
      config = {"pad_token_id": None, "eos_token_id": None} | config
    _write_json(folder / "config.json", dict(sorted(config.items())))
    exported_code.write(folder)

  def _torch_dtype(self, folder: Path) -> str:
    specs, _ = safetensors_file.read_header(min(folder.glob("*.safetensors")))
    return safetensors_file.DTYPES[next(iter(specs.values())).dtype].name


def _caveats(config: Any) -> Iterator[str]:
  """What other readers of the export compute differently, one sentence each; docs/convert.md names the sources."""
  from maxtext_ling2.model.mla import LATENT_EPSILON  # with MaxText and JAX, which an export has loaded

  layers, cycle = config.num_decoder_layers, config.inhomogeneous_layer_cycle_interval
  if config.gla_decay_layer_offset == 1:
    yield "gla_decay_layer_offset=1: vLLM, SGLang and mlx-lm compute 0, whatever config.json says."
  if layers % cycle:
    yield (
      f"num_hidden_layers={layers} is not a multiple of layer_group_size={cycle}: the layers after the last whole group "
      "are MLA here, as in the official code; vLLM, SGLang and sglang-jax have no such rule."
    )
  if not config.shared_experts:
    yield "num_shared_experts=null, which is none in the official code: vLLM, SGLang and mlx-lm fail on it."
  if config.use_linear_silu:
    yield "linear_silu=true: mlx-lm has no such key and ignores it."
  if config.num_experts_per_tok == 1:
    yield "num_experts_per_tok=1: vLLM and SGLang normalise the weight of a single expert, the official code does not."
  if yarn.softmax_mscale(config):
    yield "rope_scaling.mscale_all_dim: vLLM's MLA has no softmax factor."
  if yarn.is_yarn(config):
    yield "rope_scaling.attention_factor: SGLang and mlx-lm use transformers' rule instead, and mlx-lm always truncates."
  if config.normalization_layer_epsilon != LATENT_EPSILON:
    yield (
      f"rms_norm_eps={config.normalization_layer_epsilon}: vLLM, SGLang and mlx-lm also use it for the norms "
      f"of MLA's latents, which have {LATENT_EPSILON} here, as in the official code."
    )


def _copy_text(source: Path, target: Path) -> None:
  """Copies a tokenizer file, without an `auto_map`, which would name code that is not exported."""
  if source.name == "tokenizer_config.json":
    with contextlib.suppress(ValueError, RecursionError):  # a damaged file is copied as it is; transformers will name it
      settings = json.loads(source.read_text(encoding="utf-8"))
      if isinstance(settings, dict) and settings.pop("auto_map", None) is not None:
        logger.warning("%s: its auto_map is left out, since no code of the tokenizer's folder is exported.", source)
        _write_json(target, settings)
        return
  shutil.copyfile(source, target)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  disk.sync(path)
