"""Text from a trained model, token by token, through MaxText's engine."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maxtext_ling2.inference import saved_model
from maxtext_ling2.inference.saved_model import SavedModelError
from maxtext_ling2.maxtext_api.engine import Engine

_REPLACEMENT = "\ufffd"  # incomplete UTF-8 decodes to this character

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
  """Yields the text that a model generates after a prompt, as it is generated.

  Args:
    checkpoint: see `saved_model.open_model`, as for model_name, tokenizer and overrides.
    prompt: at least one token.
    count: maximum number of tokens; the text ends earlier at an end-of-sequence token (`saved_model.end_tokens`) of the
      folders `checkpoint` and `tokenizer`.
    model_name: MaxText's model_name.
    tokenizer: file or folder.
    temperature: sampling temperature; 0 takes the most likely token.
    nucleus: sampling is restricted to the most likely tokens that together have this probability.
    seed: seed of the sampling.
    overrides: KEY=VALUE settings of MaxText.

  Raises:
    SavedModelError: an argument is invalid.
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
  """Yields the text of tokens as they arrive.

  They are decoded together with the prompt, because tokenizers drop a space at the start of a text. A character whose
  bytes are spread over several tokens is held back until it is complete.
  """
  seen = list(prompt)
  text = shown = tokenizer.decode(seen)
  for token in tokens:
    seen.append(token)
    text = tokenizer.decode(seen)
    if not text.endswith(_REPLACEMENT) and text.startswith(shown):
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
