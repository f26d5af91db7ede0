"""Seams: conversations are read as the tokenizer's own template of the whole, in both of MaxText's pipelines for SFT.

MaxText 0.2.5 applies the template to each round alone: one that opens with a header, as Ling's, repeats it before each
later round, without the system prompt; messages of tools are left out; and each piece is decoded and tokenized again.
Packing, batches and masks stay MaxText's. Its trainers take any error of the data for the end of it; a conversation that
cannot be read ends a LING2 run instead.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from maxtext_ling2.host.contract import Expectation, expect
from maxtext_ling2.host.patches import Call, replaced
from maxtext_ling2.host.seam import Handlers, Seam, Use
from maxtext_ling2.training import chats

_HF = "maxtext.input_pipeline.hf_data_processing"
_GRAIN = "maxtext.input_pipeline.grain_data_processing"
_TRANSFORMS = "maxtext.input_pipeline.input_pipeline_utils"
_STEPS = "maxtext.input_pipeline.data_processing_utils"
_LOADER = "maxtext.common.data_loader"
_PARAMETERS = ("dataset", "config", "data_columns", "tokenize", "grain_worker_count", "grain_per_worker_buffer_size")
_REPLACED = ("apply_chat_template", "tokenization", "combine_columns", "is_conversational")
_MASKING = expect(_TRANSFORMS, "SFTPromptMasking(text_column_name, completion_only, max_target_length, unk_id)")[0]
_WITHOUT = "convert the data to token ids and pre-train on them"


def _reads_chats(config: Any, *kinds: str) -> bool:
  return bool(getattr(config, "use_sft", False) and config.dataset_type in kinds)


class HfChatsSeam(Seam):
  """Lets MaxText's pipeline of Hugging Face data find our functions for conversations."""

  name = "chats of hf"
  module = _HF
  use = Use("use_sft=true and dataset_type=hf", lambda config: _reads_chats(config, "hf"), _WITHOUT)
  expectations = (
    Expectation(
      f"{_HF}:preprocessing_pipeline",
      parameters=("config", "packing", "use_sft"),
      holds=lambda function: {*_REPLACED, "SFTPromptMasking"} <= set(inspect.unwrap(function).__code__.co_names),
      meaning=f"which calls {', '.join(_REPLACED)} and SFTPromptMasking",
    ),
    *expect(
      _TRANSFORMS,
      "apply_chat_template(example, tokenizer_model, data_column_name)",
      "tokenization(example, hf_tokenizer, truncation, max_length, column_names)",
      "combine_columns(example, columns, data_column)",
      "is_conversational(features, data_columns)",
    ),
    _MASKING,
    *expect(_HF, "_get_pad_id(tokenizer)"),
  )

  def handlers(self) -> Handlers:
    return {"preprocessing_pipeline": _hf_pipeline}


def _hf_pipeline(call: Call) -> Any:
  """MaxText's `preprocessing_pipeline`; for SFT with our functions, which the data set keeps."""
  if not call.get("use_sft", False):
    return call.original()
  from maxtext.input_pipeline import input_pipeline_utils

  known = input_pipeline_utils.is_conversational
  ours = (
    _HfChatTokens(call.get("packing", True)),
    _kept,
    _joined,
    lambda features, columns: known(features, columns) or any(_is_list_of_json(features[name]) for name in columns),
  )
  with replaced(input_pipeline_utils, **dict(zip(_REPLACED, ours, strict=True))):
    return call.original()


@dataclasses.dataclass(frozen=True)
class _HfChatTokens:
  """`chats.ChatTokens` for a tokenizer that MaxText opens later.

  Attributes:
    packing: MaxText's setting.
  """

  packing: bool

  def __call__(self, example: dict[str, Any], tokenizer_model: Any, data_column_name: str) -> dict[str, Any]:
    from maxtext.input_pipeline import hf_data_processing

    pad = hf_data_processing._get_pad_id(tokenizer_model)
    ignored = frozenset({pad, tokenizer_model.bos_token_id} - {None})  # its ShiftData gets both
    tokens = chats.ChatTokens(ignored, None if self.packing else pad)
    return tokens(example, tokenizer_model, data_column_name)


def _kept(example: dict[str, Any], **_: Any) -> dict[str, Any]:
  """In place of MaxText's `tokenization`: these are token ids already."""
  return example


def _joined(example: dict[str, Any], columns: Any, data_column: str) -> dict[str, Any]:
  """In place of MaxText's `combine_columns`, whose result it casts to role and content."""
  chats.joined(example, columns, data_column)
  others = sorted({key for message in example[data_column] for key in message} - {"role", "content"})
  if others:
    raise chats.ChatError(
      f"columns {' and '.join(columns)}: messages have {', '.join(others)}, of which MaxText keeps only role and content "
      "where two columns are joined; write each conversation in one column, messages"
    )
  return example


def _is_list_of_json(feature: Any) -> bool:
  """Whether a column has lists of objects of which not all have the same keys, such as messages of tools."""
  import datasets

  return isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Json)


class GrainChatsSeam(Seam):
  """Builds LING2's pipeline for SFT of MaxText's other steps."""

  name = "chats of grain"
  module = _GRAIN
  use = Use("use_sft=true and dataset_type=grain", lambda config: _reads_chats(config, "grain"), _WITHOUT)
  expectations = (
    Expectation(f"{_GRAIN}:sft_preprocessing_pipeline", parameters=_PARAMETERS),
    *expect(
      _STEPS,
      "parse_and_keep_features(dataset, config, data_columns, tokenize)",
      "get_tokenizer_and_pad_id(config)",
      "validate_and_configure_sft_columns(data_columns, tokenizer_model, chat_template)",
      "get_local_batch_size(config)",
      "format_and_batch(dataset, config, batch_size, pad_id, data_columns, tokenizer_model)",
      "apply_multiprocessing_and_prefetch(dataset, config, grain_worker_count, grain_per_worker_buffer_size)",
    ),
    _MASKING,
  )

  def handlers(self) -> Handlers:
    return {"sft_preprocessing_pipeline": lambda call: _grain_pipeline(*(call[name] for name in _PARAMETERS))}


def _grain_pipeline(
  dataset: Any, config: Any, data_columns: Any, tokenize: bool, grain_worker_count: int, grain_per_worker_buffer_size: int
) -> Any:
  """As MaxText's `sft_preprocessing_pipeline`, in its order, with whole conversations."""
  from maxtext.input_pipeline import data_processing_utils as steps
  from maxtext.input_pipeline import input_pipeline_utils as transforms

  dataset = steps.parse_and_keep_features(dataset, config, data_columns, tokenize)
  opened, pad_id = steps.get_tokenizer_and_pad_id(config)
  tokenizer = getattr(opened, "tokenizer", opened)  # transformers' in MaxText's
  steps.validate_and_configure_sft_columns(data_columns, tokenizer, config.chat_template)
  tokens = chats.ChatTokens(frozenset({pad_id}), None if config.packing else pad_id)
  dataset = dataset.map(_GrainChat(tokens, tokenizer, tuple(data_columns)))
  masking = transforms.SFTPromptMasking(
    text_column_name=data_columns[0],
    completion_only=config.sft_train_on_completion_only,
    max_target_length=config.max_target_length,
    unk_id=pad_id,
  )
  size = steps.get_local_batch_size(config)
  dataset = steps.format_and_batch(dataset.map(masking), config, size, pad_id, ("inputs", "targets"), opened)
  return steps.apply_multiprocessing_and_prefetch(dataset, config, grain_worker_count, grain_per_worker_buffer_size)


@dataclasses.dataclass(frozen=True)
class _GrainChat:
  """A row of MaxText's pipeline, whose columns are a conversation, as pieces of token ids in its first column.

  Attributes:
    tokens: what makes token ids of it.
    tokenizer: of transformers.
    columns: the names of its columns.
  """

  tokens: chats.ChatTokens
  tokenizer: Any
  columns: tuple[str, ...]

  def __call__(self, element: dict[str, Any]) -> dict[str, Any]:
    first = self.columns[0]
    if len(self.columns) > 1:
      element = chats.joined(dict(element), self.columns, first)
    return self.tokens(element, self.tokenizer, first)


class ChatErrorsSeam(Seam):
  """Ends a run at a conversation that cannot be read, where MaxText logs it and ends as if the data had."""

  name = "errors in chats"
  module = _LOADER
  use = Use("use_sft=true and conversations", lambda config: _reads_chats(config, "hf", "grain"), _WITHOUT)
  expectations = expect(_LOADER, "loader_exception_guard(config)")

  def handlers(self) -> Handlers:
    return {"loader_exception_guard": _guard}


@contextlib.contextmanager
def _guard(call: Call) -> Iterator[None]:
  """As MaxText's guard of `next(iterator)`; an error of ours becomes an exit, which its trainers do not catch."""
  try:
    with call.original():
      yield
  except Exception as error:
    if (reason := chats.reason(error)) is not None:
      raise SystemExit(f"Error: {reason}") from error
    raise
