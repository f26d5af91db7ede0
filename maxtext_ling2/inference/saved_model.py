"""Opens a trained model for `generate` and `eval`, from a MaxText checkpoint or a Hugging Face folder."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxtext_ling2.checkpoint import decay_offset as offsets
from maxtext_ling2.checkpoint import hf_config
from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.maxtext_api import own_model, start
from maxtext_ling2.maxtext_api.overrides import parse

logger = logging.getLogger("maxtext_ling2")

DEFAULT_MODEL = "ling2"
DEMO_MODEL = "ling2-tiny"

NO_WEIGHTS = {"load_parameters_path": "", "load_full_state_path": ""}
"""A run's yml may name others; here the checkpoint is given."""

_EOS = "eos_token_id"
_EOS_FILES = ("generation_config.json", "config.json")


class SavedModelError(Ling2Error, ValueError):
  """A checkpoint, a tokenizer or a setting is not usable; the text says which and why."""


@dataclasses.dataclass(frozen=True)
class SavedModel:
  """A model: config, weights and tokenizer.

  Attributes:
    config: MaxText config.
    weights: arrays for all parameters and router biases, by path in the model.
    tokenizer: MaxText's tokenizer: `encode(text)`, `decode(ids)`, `eos_id`.
    stated_offset: gla_decay_layer_offset in the config.json of a Hugging Face folder; None if it has none.
  """

  config: Any
  weights: Mapping[Any, Any]
  tokenizer: Any
  stated_offset: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a model comes from; nothing of it is read yet.

  Attributes:
    checkpoint: as given.
    items: the `items` of a MaxText checkpoint; None: a Hugging Face folder.
    model: the model of a MaxText checkpoint.
    overrides: KEY=VALUE settings of the user.
  """

  checkpoint: Path
  items: Path | None
  model: own_model.Model
  overrides: Sequence[str]


def locate(checkpoint: Path, model_name: str | None, overrides: Sequence[str] = ()) -> Source:
  """Finds out what a checkpoint is; for the arguments and errors see `open_model`."""
  start.set_environment()
  if not own_model.is_yml(model_name or ""):
    model_name = parse(overrides).get("model_name", model_name)
  items = None if is_hugging_face(checkpoint) else _step(checkpoint)
  if items is None and model_name is not None:
    raise SavedModelError(
      f"--model {model_name}: {checkpoint} is a Hugging Face folder, which says itself what it is; leave it out"
    )
  return Source(checkpoint, items, own_model.read(model_name or DEFAULT_MODEL), overrides)


def make_config(source: Source, sizes: Mapping[str, Any]) -> tuple[Any, int | None]:
  """MaxText's config of a model, and the decay offset that a Hugging Face folder states.

  Args:
    source: the model.
    sizes: settings of the caller, over which the user's overrides win.

  Raises:
    ValueError: see `open_model`.
  """
  import jax

  from maxtext_ling2.maxtext_api import session

  settings = {**session.platform_settings(jax.default_backend()), **sizes}
  if source.items is None:
    return _config_of(source.checkpoint, settings, source.overrides)
  scanned = session.is_scanned(str(source.items))
  layout = {} if scanned is None else {"scan_layers": scanned}
  model = source.model
  config = session.make_config(
    base_yml=model.yml, **{"model_name": model.name, **NO_WEIGHTS, **layout, **settings}, overrides=source.overrides
  )
  return config, None


def read_weights(source: Source, config: Any) -> dict[Any, Any]:
  """Arrays for all parameters and router biases by path in the model; for errors see `open_model`."""
  if source.items is None:
    return _weights_of(source.checkpoint, config)
  return _from_maxtext(source.items, source.model, config)


def read_tokenizer(source: Source, tokenizer: Path | None) -> Any:
  """The tokenizer that is given, else that of the Hugging Face folder, or for `ling2-tiny` the demo's.

  Raises:
    SavedModelError: there is none, or it cannot be read.
  """
  if tokenizer is None and source.items is not None and source.model.name == DEMO_MODEL:
    from maxtext_ling2.demo.data import tokenizer_file

    tokenizer = tokenizer_file()
    logger.warning("--tokenizer: the Llama 2 tokenizer that the demo trains %s with (%s)", DEMO_MODEL, tokenizer)
  return _tokenizer(tokenizer or source.checkpoint)


def open_model(
  checkpoint: Path,
  model_name: str | None,
  tokenizer: Path | None,
  sizes: Mapping[str, Any],
  overrides: Sequence[str] = (),
  offset_matters: bool = True,
) -> SavedModel:
  """Opens a model.

  Args:
    checkpoint: a MaxText checkpoint (the folder of a step, its `items`, or a run's `checkpoints`, of which the last step
      is taken), or a Hugging Face folder.
    model_name: MaxText's model_name, which a MaxText checkpoint does not record, or the yml of a model, such as
      `maxtext-ling2 config` writes; None: `ling2`.
    tokenizer: a sentencepiece model, or a folder with a Hugging Face tokenizer; None: see `read_tokenizer`.
    sizes: settings of the caller, such as max_target_length.
    overrides: KEY=VALUE settings of the user, which win over all others.
    offset_matters: whether to check that the config's gla_decay_layer_offset is that of the folder.

  Raises:
    SavedModelError: the arguments do not fit together.
    OverrideError: an override is not KEY=VALUE.
    CheckpointError: the Hugging Face folder is not a complete LING2 checkpoint, or states another decay offset.
    ValueError: MaxText refuses the settings, or does not find the weights in the checkpoint.
  """
  source = locate(checkpoint, model_name, overrides)
  built = read_tokenizer(source, tokenizer)  # before the weights, which take longer
  config, stated = make_config(source, sizes)
  if offset_matters:
    check_offset(source, config, stated)
  return SavedModel(config, read_weights(source, config), built, stated)


def check_offset(source: Source, config: Any, stated: int | None) -> None:
  """Raises CheckpointError if a Hugging Face folder states another decay offset than the config's."""
  if source.items is None:
    offsets.check(source.checkpoint, stated, config.gla_decay_layer_offset)


def is_hugging_face(checkpoint: Path) -> bool:
  """Whether a folder is a Hugging Face folder rather than a MaxText checkpoint."""
  return (checkpoint / "config.json").is_file()


def check_vocabulary(config: Any, ids: Any) -> None:
  """Raises SavedModelError if token ids exceed the model's vocabulary."""
  if max(ids) >= config.vocab_size:
    raise SavedModelError(
      f"the tokenizer gives token {max(ids)}, but vocab_size={config.vocab_size}: it is not this model's "
      "tokenizer; pass --tokenizer"
    )


def end_tokens(tokenizer: Any, vocab_size: int, *folders: Path | None) -> frozenset[int]:
  """Collects all end-of-sequence ids: the tokenizer's, and those of generation_config.json and config.json.

  Chat models list several in these files (end of a turn, end of a text), where a tokenizer has one.

  Args:
    tokenizer: MaxText's tokenizer.
    vocab_size: the ids' bound.
    folders: folders with these files; others are ignored.

  Raises:
    SavedModelError: `eos_token_id` is not a token id, a list of token ids, or null.
  """
  ids = set() if tokenizer.eos_id is None else {int(tokenizer.eos_id)}
  for file in (folder / name for folder in folders if folder is not None for name in _EOS_FILES):
    if file.is_file():
      ids |= _end_tokens_of(file, vocab_size)
  return frozenset(ids)


def _end_tokens_of(file: Path, vocab_size: int) -> set[int]:
  value = hf_config.read_json(file).get(_EOS)
  ids = value if isinstance(value, list) else [] if value is None else [value]
  for one in ids:
    if type(one) is not int or not 0 <= one < vocab_size:  # True is an int, but not an id
      raise SavedModelError(
        f"{file}: {_EOS}={json.dumps(value)}: {json.dumps(one)} is not a token id from 0 to {vocab_size - 1}; correct "
        "it, or remove the key"
      )
  return set(ids)


def _config_of(folder: Path, settings: Mapping[str, Any], overrides: Sequence[str]) -> tuple[Any, int | None]:
  """MaxText's config of a Hugging Face folder, and the decay offset in its config.json."""
  from maxtext_ling2.maxtext_api import session

  stated = hf_config.to_maxtext(hf_config.read(folder))
  config = session.make_config(model_name="default", **{**stated, **settings}, overrides=overrides)
  return config, stated.get(offsets.FIELD)


def _weights_of(folder: Path, config: Any) -> dict[Any, Any]:
  from maxtext_ling2.checkpoint import blocks, stacking
  from maxtext_ling2.checkpoint.hf_checkpoint import HfCheckpoint

  with HfCheckpoint(folder) as tensors:
    tensors.check(config)
    return {leaf.path: blocks.stack(leaf, tensors.__getitem__) for leaf in stacking.leaves(config)}


def _from_maxtext(items: Path, model: own_model.Model, config: Any) -> dict[Any, Any]:
  from maxtext_ling2.maxtext_api import session

  try:
    return session.restore(config, session.make_mesh(config), str(items))
  except (ValueError, KeyError) as error:
    raise SavedModelError(
      f"{items}: no weights of --model {model.given} can be read ({error}); pass a complete step, and its model"
    ) from error


def _step(checkpoint: Path) -> Path:
  """The `items` of a step's folder, or of the last step in a run's `checkpoints`."""
  if not checkpoint.is_dir():
    raise SavedModelError(f"{checkpoint}: there is no such folder; pass that of a checkpoint")
  steps = [int(path.name) for path in checkpoint.iterdir() if path.name.isdigit()]
  if steps:
    checkpoint = checkpoint / str(max(steps))
  if checkpoint.name != "items":
    checkpoint = checkpoint / "items"
  if not checkpoint.is_dir():
    raise SavedModelError(
      f"{checkpoint.parent}: neither a Hugging Face folder (with config.json) nor a MaxText checkpoint (with items); "
      "pass a folder that is one"
    )
  return checkpoint.resolve()


def _tokenizer(path: Path) -> Any:
  """MaxText's tokenizer for a sentencepiece model or a Hugging Face folder, without BOS and EOS."""
  from maxtext.input_pipeline.tokenizer import build_tokenizer

  kind = "sentencepiece" if path.is_file() else "huggingface"
  if kind == "huggingface" and not any(path.glob("tokenizer*")):
    raise SavedModelError(
      f"{path}: there is no tokenizer in it; pass --tokenizer with a sentencepiece model or a folder with Hugging Face's "
      "tokenizer files"
    )
  try:
    return build_tokenizer(str(path), kind, False, False, None)
  except Exception as error:  # tokenizer libraries have no common error
    raise SavedModelError(
      f"{path}: not a tokenizer that {kind} can read ({error}); pass --tokenizer with another one"
    ) from error
