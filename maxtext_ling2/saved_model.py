"""Opens a trained model for our own tools, from a MaxText checkpoint or a Hugging Face folder: generate, eval."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxtext_ling2.errors import Ling2Error

DEFAULT_MODEL = "ling2"


class SavedModelError(Ling2Error, ValueError):
  """A checkpoint, a tokenizer or a setting does not fit; the text says what and why."""


@dataclasses.dataclass(frozen=True)
class SavedModel:
  """A model's config and weights.

  Attributes:
    config: MaxText config.
    values: arrays for all parameters and router biases, by path in the model.
    tokenizer: MaxText's tokenizer: `encode(text)`, `decode(ids)`, `eos_id`.
  """

  config: Any
  values: Mapping[Any, Any]
  tokenizer: Any


def open_model(
  checkpoint: Path,
  model_name: str | None,
  tokenizer: Path | None,
  sizes: Mapping[str, Any],
  words: Sequence[str] = (),
) -> SavedModel:
  """Opens a model.

  Args:
    checkpoint: a MaxText checkpoint (the folder of a step, its `items`, or a run's `checkpoints`, of which the last step
      is taken), or a Hugging Face folder.
    model_name: MaxText's, for a MaxText checkpoint, which does not say it; None: `ling2`.
    tokenizer: a sentencepiece model, or a folder with a Hugging Face tokenizer; None: that of the Hugging Face folder.
    sizes: settings that the caller needs, such as max_target_length.
    words: `key=value` settings of the user, which win over everything else.

  Raises:
    SavedModelError: what is asked for does not fit together.
    CheckpointError: the Hugging Face folder is not a whole LING2 checkpoint.
    ValueError: MaxText refuses the settings, or does not find the weights in the checkpoint.
  """
  settings = {**_platform(), **sizes, **_parsed(words)}
  items = None if (checkpoint / "config.json").is_file() else _step(checkpoint)
  model_name = settings.pop("model_name", model_name)
  if items is None and model_name is not None:
    raise SavedModelError(
      f"--model {model_name}: {checkpoint} is a Hugging Face folder, which says itself what it is; leave it out"
    )
  built = _tokenizer(tokenizer or checkpoint)  # before the weights, which take their time
  if items is None:
    config, values = _from_hugging_face(checkpoint, settings)
  else:
    config, values = _from_maxtext(items, model_name or DEFAULT_MODEL, settings)
  return SavedModel(config, values, built)


def check_vocabulary(model: SavedModel, ids: Any) -> None:
  """Raises SavedModelError if the tokenizer gives ids that the model does not have."""
  if max(ids) >= model.config.vocab_size:
    raise SavedModelError(
      f"the tokenizer gives token {max(ids)}, but vocab_size={model.config.vocab_size}: it is not this model's "
      "tokenizer; pass --tokenizer"
    )


def _platform() -> dict[str, Any]:
  """Few CPUs calculate in bfloat16, and the kernel of sparse_matmul is for accelerators."""
  import jax

  return {"dtype": "float32", "sparse_matmul": False} if jax.default_backend() == "cpu" else {}


def _parsed(words: Sequence[str]) -> dict[str, Any]:
  import yaml

  settings = {}
  for word in words:
    key, equals, value = word.partition("=")
    if not equals or not key:
      raise SavedModelError(f"{word!r}: no setting of MaxText; write key=value")
    try:
      settings[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
      raise SavedModelError(f"{word}: its value does not parse as in a yml ({error}); put quotes around it") from error
  return settings


def _from_hugging_face(folder: Path, settings: Mapping[str, Any]) -> tuple[Any, dict[Any, Any]]:
  from maxtext_ling2.checkpoint import hf_config, mapping, stacking
  from maxtext_ling2.checkpoint.hf_folder import HfFolder
  from maxtext_ling2.host import session

  config = session.make_config(model_name="default", **{**hf_config.to_maxtext(hf_config.read(folder)), **settings})
  with HfFolder(folder) as tensors:
    tensors.check(mapping.entries(config))
    return config, {leaf.path: leaf.assemble(tensors.tensor) for leaf in stacking.leaves(config)}


def _from_maxtext(items: Path, model_name: str, settings: Mapping[str, Any]) -> tuple[Any, dict[Any, Any]]:
  from maxtext_ling2.host import session

  scanned = session.is_scanned(str(items))
  layout = {} if scanned is None else {"scan_layers": scanned}
  config = session.make_config(**{"model_name": model_name, **layout, **settings})
  try:
    return config, session.restore(config, session.make_mesh(config), str(items))
  except (ValueError, KeyError) as error:
    raise SavedModelError(
      f"{items}: no weights of --model {model_name} can be read ({error}); pass a step saved whole, and its model"
    ) from error


def _step(checkpoint: Path) -> Path:
  """The `items` of a step's folder, or of the last step's in a run's `checkpoints`."""
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
  except Exception as error:  # each library of tokenizers has errors of its own
    raise SavedModelError(
      f"{path}: not a tokenizer that {kind} can read ({error}); pass --tokenizer with another one"
    ) from error
