"""Reads a batch as MaxText's trainer would, from its own data pipeline, without a model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.errors import Ling2Error

_PARTS = ("inputs", "targets", "inputs_segmentation", "targets_segmentation", "inputs_position")


class BatchError(Ling2Error, ValueError):
  """There is no such batch; the text says why."""


@dataclasses.dataclass(frozen=True)
class Batch:
  """A global batch of pre-training or supervised fine-tuning.

  Attributes:
    step: its number, from 0.
    inputs: token ids [B, T].
    targets: token ids [B, T]; each the next token, unless the pipeline masked it.
    segments: documents of the inputs [B, T], from 1; 0 is padding.
    positions: positions of the inputs [B, T].
    trained: whether the loss counts the target [B, T].
    tokenizer: MaxText's, with `decode(ids)`; None: it could not be opened.
    tokenizer_path: where it is.
    note: why there is no tokenizer.
  """

  step: int
  inputs: NDArray[np.int32]
  targets: NDArray[np.int32]
  segments: NDArray[np.int32]
  positions: NDArray[np.int32]
  trained: NDArray[np.bool_]
  tokenizer: Any
  tokenizer_path: str
  note: str = ""


def read(words: Sequence[str], step: int = 0, evaluation: bool = False, tokenizer: Path | None = None) -> Batch:
  """Reads the batch of a step.

  Args:
    words: as MaxText's trainer takes them: a base YAML file, if not base.yml, and KEY=VALUE.
    step: which batch, from 0.
    evaluation: from the data of evaluation.
    tokenizer: sentencepiece model or folder that decodes; None: that of the settings.

  Raises:
    OverrideError: a word is not KEY=VALUE.
    ConfigError: MaxText refuses the settings.
    BatchError: MaxText's pipeline fails with them, has no such batch, or is one of pairs (DPO).
  """
  from maxtext_ling2.maxtext_api import session

  yml = words[0] if words and words[0].endswith((".yml", ".yaml")) else None
  if yml is not None and not Path(yml).is_file():
    raise BatchError(f"{yml}: there is no such file; pass a base YAML file, or only KEY=VALUE for MaxText's base.yml")
  config = session.trainer_config(words[0 if yml is None else 1 :], yml)
  if config.use_dpo:
    raise BatchError(
      "use_dpo=true: a batch of preferences has pairs of answers; batches of pre-training and of supervised fine-tuning "
      "can be shown, leave it out"
    )
  found = _nth(config, step, evaluation)
  inputs, targets, segments, counted, positions = (found[part] for part in _PARTS)
  opened, path, note = _tokenizer(config, tokenizer)
  return Batch(step, inputs, targets, segments, positions, counted != 0, opened, path, note)


def _nth(config: Any, step: int, evaluation: bool) -> dict[str, NDArray[Any]]:
  """The arrays of a batch; all errors of the pipeline as BatchError."""
  from absl import flags
  from maxtext.input_pipeline import input_pipeline_interface

  from maxtext_ling2.maxtext_api import session

  if not flags.FLAGS.is_parsed():  # grain asks for flags where it starts processes; MaxText's commands parse them
    flags.FLAGS.mark_as_parsed()
  done = 0
  try:
    with session.model_context(config, mesh := session.make_mesh(config)):
      train, evaluate = input_pipeline_interface.create_data_iterator(config, mesh)
      iterator = evaluate if evaluation else train
      if iterator is None:
        raise BatchError(f"--eval: eval_interval={config.eval_interval}, so that nothing is evaluated; set eval_interval")
      iterator = iterator[0] if isinstance(iterator, list) else iterator
      while done < step + 1:
        batch = next(iterator)
        done += 1
      found = {name: np.asarray(value) for name, value in batch.items()}
      if hasattr(iterator, "close"):  # ends its processes
        iterator.close()
      return found
  except BatchError:
    raise
  except StopIteration as error:
    raise BatchError(
      f"--step {step}: the data ends after {done} batches of {config.global_batch_size_to_load} rows; take an earlier "
      "step, more data, or fewer rows (per_device_batch_size)"
    ) from error
  except Exception as error:  # the pipelines raise whatever their libraries raise
    reason, kind = str(error) or "without a text", getattr(config.dataset_type, "value", config.dataset_type)
    raise BatchError(
      f"MaxText's data pipeline fails with dataset_type={kind} ({type(error).__name__}: {reason}); "
      "correct the settings of the data, or the data"
    ) from error


def _tokenizer(config: Any, path: Path | None) -> tuple[Any, str, str]:
  """(MaxText's tokenizer or None, its path, why there is none)."""
  from maxtext.input_pipeline.tokenizer import build_tokenizer

  kind = config.tokenizer_type if path is None else "sentencepiece" if path.is_file() else "huggingface"
  name = str(path or config.tokenizer_path)
  try:
    return build_tokenizer(name, getattr(kind, "value", kind), False, False, config.hf_access_token), name, ""
  except Exception as error:  # tokenizer libraries have no common error
    if path is not None:
      raise BatchError(f"--tokenizer {path}: not a tokenizer that {kind} can read ({error}); pass another one") from error
    return None, name, f"{type(error).__name__}: {' '.join(str(error).split())}"
