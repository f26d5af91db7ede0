"""Text from a trained model, token by token, through MaxText's engine."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maxtext_ling2.inference import saved_model
from maxtext_ling2.inference.saved_model import SavedModelError
from maxtext_ling2.maxtext_api.engine import Engine

_HALF_A_CHARACTER = "\ufffd"  # what bytes that are no UTF-8 decode to

PROMPT_STEP = 128
"""Prompts are padded to a multiple of this, so that prompts of similar length share a compiled program."""


def generate(
  checkpoint: Path,
  prompt: str,
  count: int,
  *,
  model_name: str | None = None,
  tokenizer: Path | None = None,
  temperature: float = 0.0,
  nucleus: float = 1.0,
  seed: int = 0,
  overrides: Sequence[str] = (),
) -> Iterator[str]:
  """Yields the text that a model writes after a prompt, piece by piece.

  Args:
    checkpoint: see `saved_model.open_model`, as for model_name, tokenizer and overrides.
    prompt: must give at least one token.
    count: tokens at most; the text ends earlier at an end-of-sequence token (`saved_model.end_tokens`), of the folders
      `checkpoint` and `tokenizer`.
    model_name: MaxText's.
    tokenizer: file or folder.
    temperature: of sampling; 0 takes the most likely token.
    nucleus: samples among the most likely tokens that together have this probability.
    seed: of sampling.
    overrides: KEY=VALUE settings of MaxText.

  Raises:
    SavedModelError: an argument does not fit.
    ValueError: see `saved_model.open_model`.
  """
  if count < 1:
    raise SavedModelError(f"--tokens {count}: nothing to generate; pass at least 1")
  if not 0.0 <= temperature < math.inf or not 0.0 < nucleus <= 1.0:  # NaN is neither
    raise SavedModelError(
      f"--temperature {temperature} --top-p {nucleus}: a finite temperature >= 0 and 0 < top-p <= 1 are needed"
    )
  sampling = {"decode_sampling_strategy": "greedy"} if temperature == 0.0 else _sampling(temperature, nucleus)
  longest = _padded(len(prompt.encode()))  # a token is at least a byte
  sizes = {
    "max_prefill_predict_length": longest,
    "max_target_length": longest + count,
    "per_device_batch_size": 1,
    **sampling,
  }
  opened = saved_model.open_model(checkpoint, model_name, tokenizer, sizes, overrides)
  ids = opened.tokenizer.encode(prompt)
  if not ids:
    raise SavedModelError("the prompt gives no token; write at least a word")
  saved_model.check_vocabulary(opened, ids)
  end = saved_model.end_tokens(opened, checkpoint, tokenizer)
  engine = Engine(opened.config, opened.weights, seed)
  yield from pieces(ids, engine.stream(ids, count, tuple(end)), opened.tokenizer)


def pieces(prompt: Sequence[int], tokens: Iterator[int], tokenizer: Any) -> Iterator[str]:
  """Text of tokens as they come.

  Decoded together with the prompt, because tokenizers drop a space at the start of a text. A character whose bytes are
  spread over tokens is held back until it is whole.
  """
  seen = list(prompt)
  text = shown = tokenizer.decode(seen)
  for token in tokens:
    seen.append(token)
    text = tokenizer.decode(seen)
    if not text.endswith(_HALF_A_CHARACTER) and text.startswith(shown):
      yield text[len(shown) :]
      shown = text
  if text.startswith(shown) and text != shown:
    yield text[len(shown) :]


def _sampling(temperature: float, nucleus: float) -> dict[str, Any]:
  strategy = "weighted" if nucleus == 1.0 else "nucleus"
  return {
    "decode_sampling_strategy": strategy,
    "decode_sampling_temperature": temperature,
    "decode_sampling_nucleus_p": nucleus,
  }


def _padded(length: int) -> int:
  return -(-max(length, 1) // PROMPT_STEP) * PROMPT_STEP
