"""MaxText -> Hugging Face: safetensors files laid out first, then filled a block at a time.

Memory: a few blocks as the checkpoint stores them. The files are mapped, so that a tensor which is spread over many
blocks (a scanned layer) needs no collecting, and what is written goes to the disk whenever the system sees fit.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
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
  orbax_store,
  progress,
  safetensors_file,
  stacking,
)
from maxtext_ling2.checkpoint.hf_folder import INDEX
from maxtext_ling2.checkpoint.import_hf import check_space
from maxtext_ling2.checkpoint.safetensors_file import NewTensor
from maxtext_ling2.checkpoint.stacking import Leaf
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.model import yarn
from maxtext_ling2.model.layer_layout import FORMER_NAMES

logger = logging.getLogger("maxtext_ling2")
Array = NDArray[Any]

SHARD_BYTES = 4 * 2**30
_READ_AHEAD = 4 * blocks.BLOCK_BYTES
_WRITERS = 2  # threads: most of the time goes into writing
_TOKENIZER_FILES = (
  *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
  *("*.model", "*.tiktoken", "generation_config.json", "LICENSE*", "NOTICE*"),
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# The id that the official config class (inclusionAI/Ring-V2.5) takes for padding and end where a config.json names none;
# a model whose vocabulary does not hold it would not even load there.
_OFFICIAL_SPECIAL_TOKEN = 156892

# Where MaxText's checkpoints keep the model: training states and converted ones; a model saved by itself. Router biases
# stand with the weights, or, written without this plugin's seam, where MaxText keeps variables that are no parameters.
_ROOTS = (("params", "params"), ("params", "MoEBiasVar"), ("nnx_aux", "model"), ("params",), ("model",), ("base",), ())


class Export:
  """One conversion, checked.

  Args:
    checkpoint: a MaxText checkpoint: the folder of a step, or its `items`.
    config: MaxText config of the model, in the layout of the checkpoint (`scan_layers`).

  Raises:
    CheckpointError: the checkpoint is not one of this model, or Hugging Face's code cannot represent the model.
  """

  def __init__(self, checkpoint: epath.Path, config: Any):
    self.checkpoint, self.config = checkpoint, config
    self.hf_config = hf_config.from_maxtext(config)
    self.leaves, self.stores = match(checkpoint, config)

  def run(self, target: Path, dtype: str, tokenizer: Path | None, console: Console) -> None:
    """Writes the folder, which appears when it is whole.

    Args:
      target: the folder; must not exist, or be empty.
      dtype: of all weights but router biases, which stay float32.
      tokenizer: a folder with a tokenizer's files, to be copied.
      console: for the progress bar.

    Raises:
      CheckpointError: the target is taken, or the disk is too small.
    """
    if target.is_dir() and any(target.iterdir()) or target.is_file():
      raise CheckpointError(f"{target}: not an empty folder, because something is in it; delete it, or choose another")
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
    """File name -> its tensors (name, shape, dtype), in the order of the layers."""
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
      stack.enter_context(disk.written_back(lambda: [folder / file for file in files]))
      pool = stack.enter_context(ThreadPoolExecutor(_WRITERS))
      for leaf in self.leaves:
        self._write_leaf(leaf, new, pool, advance)
    if len(files) > 1:
      weight_map = {name: file for file, tensors in files.items() for name, _, _ in tensors}
      size = sum(tensor.array.nbytes for tensor in new.values())
      _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})

  def _write_leaf(self, leaf: Leaf, new: Mapping[str, NewTensor], pool: Executor, advance: progress.Advance) -> None:
    itemsize = new[leaf.members[0][0].names[0]].array.dtype.itemsize

    def write(box: blocks.Box, block: Array) -> bool:
      blocks.spill(leaf, box, block, new.__getitem__)
      advance(block.size * itemsize, 0)
      return blocks.all_finite(block)

    finite = True
    writing: deque[Future[bool]] = deque()
    for box, block in read_blocks(self.stores[leaf.path]):
      writing.append(pool.submit(write, box, block))
      if len(writing) > _WRITERS:
        finite &= writing.popleft().result()
    finite &= all(future.result() for future in list(writing))
    if not finite:
      logger.warning("%s: %s holds NaN or infinity; exported as it is.", self.checkpoint, "/".join(leaf.path))
    advance(0, sum(len(entry.names) for block in leaf.members for entry in block))

  def _write_texts(self, folder: Path, tokenizer: Path | None) -> None:
    """config.json, the PyTorch code, and the tokenizer's files with the ids of its special tokens."""
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
  """What other readers of the export do not compute, one sentence each; docs/convert.md has where that was read."""
  from maxtext_ling2.model.mla import LATENT_EPSILON  # with MaxText and JAX, which an export has loaded

  layers, cycle = config.num_decoder_layers, config.inhomogeneous_layer_cycle_interval
  if config.gla_decay_layer_offset == 1:
    yield "gla_decay_layer_offset=1: vLLM, SGLang and mlx-lm compute 0, whatever config.json says."
  if layers % cycle:
    yield (
      f"num_hidden_layers={layers} is no multiple of layer_group_size={cycle}: the layers after the last whole group are "
      "MLA here, as in the official code; vLLM, SGLang and sglang-jax have no such rule."
    )
  if not config.shared_experts:
    yield "num_shared_experts=null, which is none in the official code: vLLM, SGLang and mlx-lm fail on it."
  if config.use_linear_silu:
    yield "linear_silu=true: mlx-lm has no such key and computes without."
  if config.num_experts_per_tok == 1:
    yield "num_experts_per_tok=1: vLLM and SGLang normalise the weight of a single expert, the official code does not."
  if yarn.softmax_mscale(config):
    yield "rope_scaling.mscale_all_dim: vLLM's MLA has no softmax factor."
  if yarn.is_yarn(config):
    yield "rope_scaling.attention_factor: SGLang and mlx-lm take transformers' rule instead, and mlx-lm always truncates."
  if config.normalization_layer_epsilon != LATENT_EPSILON:
    yield (
      f"rms_norm_eps={config.normalization_layer_epsilon}: vLLM, SGLang and mlx-lm take it for the norms of MLA's "
      f"latents, too, which have {LATENT_EPSILON} here, as in the official code."
    )


def _copy_text(source: Path, target: Path) -> None:
  """Copies a file of a tokenizer's folder, without an `auto_map`, which would name code that does not come along."""
  if source.name == "tokenizer_config.json":
    with contextlib.suppress(ValueError, RecursionError):  # a damaged file travels as it is: transformers will name it
      settings = json.loads(source.read_text(encoding="utf-8"))
      if isinstance(settings, dict) and settings.pop("auto_map", None) is not None:
        logger.warning("%s: its auto_map is left out, since no code of the tokenizer's folder is exported.", source)
        _write_json(target, settings)
        return
  shutil.copyfile(source, target)


def match(checkpoint: epath.Path, config: Any) -> tuple[list[Leaf], dict[mapping.Path, Any]]:
  """Opens a checkpoint and finds each tensor of a model in it, in one of several roots.

  Returns:
    The model's tensors, and {path: opened array}.

  Raises:
    CheckpointError: tensors are missing or misshapen, or the checkpoint has some that the model does not have; they are
      named. Only MTP layers may be left out, which one log line says.
  """
  leaves, opened = stacking.leaves(config), orbax_store.open_arrays(checkpoint)
  arrays = {tuple(FORMER_NAMES.get(word, word) for word in path): array for path, array in opened.items()}
  stores, problems = {}, []
  for leaf in leaves:
    store = _find(leaf, arrays)
    if store is None:
      problems.append(f"{'/'.join(leaf.path)} is missing")
    elif tuple(store.shape) != leaf.shape:
      problems.append(f"{'/'.join(leaf.path)} is {tuple(store.shape)}, expected {leaf.shape}")
    stores[leaf.path] = store
  left_over = sorted({path for path in map(_in_model, arrays) if "rngs" not in path} - set(stores))
  mtp = [path for path in left_over if path[0] == "mtp_block"]
  if mtp and len(mtp) < len(left_over) or not config.mtp_num_layers < _mtp_layers(mtp):
    mtp = []
  problems += [f"{'/'.join(path)} is in the checkpoint, but not in the model" for path in left_over if path not in mtp]
  if problems:
    raise CheckpointError(
      f"{checkpoint}: not a checkpoint of this model, because {len(problems)} tensors do not fit: "
      f"{'; '.join(problems[:8])}{' ...' * (len(problems) > 8)}; pass the settings it was saved with"
    )
  if mtp:
    logger.warning(
      "%s: %d tensors of MTP (%s ...) are left out, as mtp_num_layers=%d says.",
      *(checkpoint, len(mtp), "/".join(mtp[0]), config.mtp_num_layers),
    )
  return leaves, stores


def _mtp_layers(paths: list[mapping.Path]) -> int:
  """How many MTP layers a checkpoint has, told from paths such as mtp_block/mtp_layer_1/..."""
  numbers = [int(path[1].rpartition("_")[2]) for path in paths if path[1].startswith("mtp_layer_")]
  return max(numbers, default=0)


def _in_model(path: tuple[str, ...]) -> mapping.Path:
  """Where an array stands in the model: its path in the checkpoint without the root, and without "value" at its end."""
  root = next(root for root in _ROOTS if path[: len(root)] == root)
  rest = path[len(root) :]
  return rest[:-1] if rest[-1:] == ("value",) else rest


def _find(leaf: Leaf, arrays: Mapping[tuple[str, ...], Any]) -> Any:
  for start in _ROOTS:
    for end in ((), ("value",)):
      if (*start, *leaf.path, *end) in arrays:
        return arrays[*start, *leaf.path, *end]
  return None


def read_blocks(store: Any) -> Iterator[tuple[blocks.Box, Array]]:
  """Reads an opened array in the chunks in which it is stored, the next ones while the last one is used."""
  chunk = tuple(min(size, step) for size, step in zip(store.shape, store.chunk_layout.read_chunk.shape, strict=True))
  itemsize = store.dtype.numpy_dtype.itemsize
  ahead = max(1, _READ_AHEAD // (math.prod(chunk) * itemsize))
  reading: deque[tuple[blocks.Box, Any]] = deque()
  for box in blocks.boxes(tuple(store.shape), chunk):
    reading.append((box, store[box].read()))
    if len(reading) > ahead:
      done, block = reading.popleft()
      yield done, block.result()
  while reading:
    done, block = reading.popleft()
    yield done, block.result()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  disk.sync(path)
