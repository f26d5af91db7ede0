"""Text from a trained model through MaxText's engine: prompts decode together, each in a slot of its own."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maxtext_ling2.inference import saved_model
from maxtext_ling2.inference.chats import ChatTemplate, Message
from maxtext_ling2.inference.saved_model import SavedModelError
from maxtext_ling2.inference.text_stream import Answer
from maxtext_ling2.maxtext_api.engine import Engine, padded_length
from maxtext_ling2.maxtext_api.overrides import parse

logger = logging.getLogger("maxtext_ling2")

TOKENS = 100
BATCH = 8

_PROMPT, _TOTAL = "max_prefill_predict_length", "max_target_length"


@dataclasses.dataclass(frozen=True)
class Options:
  """How text is generated.

  Attributes:
    tokens: maximum number of tokens per prompt; a text ends earlier at an end token or a stop text.
    temperature: sampling temperature; 0 takes the most likely token.
    top_k: sampling is restricted to so many most likely tokens; 0: to none.
    top_p: sampling is restricted to the most likely tokens that together have this probability.
    seed: seed of the sampling.
    stop: texts in front of which a text ends.
    batch_size: maximum number of prompts that decode together; others wait for a free slot.
    chat_template: a Jinja file in place of the tokenizer's template, for conversations.
  """

  tokens: int = TOKENS
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  stop: Sequence[str] = ()
  batch_size: int = BATCH
  chat_template: Path | None = None

  def check(self) -> None:
    """Raises SavedModelError if a value is invalid."""
    if self.tokens < 1:
      raise SavedModelError(f"--tokens {self.tokens}: nothing to generate; pass at least 1")
    if not 0.0 <= self.temperature < math.inf or not 0.0 < self.top_p <= 1.0:  # NaN is neither
      raise SavedModelError(
        f"--temperature {self.temperature} --top-p {self.top_p}: a finite temperature >= 0 and 0 < top-p <= 1 are needed"
      )
    if self.top_k < 0:
      raise SavedModelError(f"--top-k {self.top_k}: not a number of tokens; pass at least 1, or leave it out")
    if self.temperature == 0.0 and (self.top_k > 0 or self.top_p < 1.0):
      raise SavedModelError(
        f"--temperature 0.0 --top-k {self.top_k} --top-p {self.top_p}: without a temperature the most likely token is "
        "taken, whatever these say; pass --temperature 1, or leave them out"
      )
    if "" in self.stop:
      raise SavedModelError("--stop '': every text begins with it; pass a text that is not empty")
    if self.batch_size < 1:
      raise SavedModelError(f"--batch-size {self.batch_size}: no prompt would be decoded; pass at least 1")

  def sampling(self) -> dict[str, Any]:
    """MaxText's settings for it.

    MaxText applies top-k, then top-p to what is left, and the temperature last; other tools apply the temperature first,
    so that with a temperature other than 1 the same top-p leaves other tokens.
    """
    if self.temperature == 0.0:
      return {"decode_sampling_strategy": "greedy"}
    strategy = {(False, False): "weighted", (False, True): "nucleus", (True, False): "topk", (True, True): "composite"}
    return {
      "decode_sampling_strategy": strategy[self.top_k > 0, self.top_p < 1.0],
      "decode_sampling_temperature": self.temperature,
      "decode_sampling_nucleus_p": self.top_p,
      "decode_sampling_top_k": self.top_k,
    }


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a prompt's answer.

  Attributes:
    index: of the prompt.
    text: the new text, which may be empty.
    is_last: whether the answer has ended with it.
    answer: all of the answer so far.
  """

  index: int
  text: str
  is_last: bool
  answer: Answer


class Generator:
  """A model in an engine, for prompts that are given or come later.

  Attributes:
    template: the tokenizer's chat template; None: not asked for.

  Args:
    checkpoint: see `saved_model.open_model`, as for model_name, tokenizer and overrides.
    options: how text is generated.
    prompts: texts to continue, or conversations to answer; they decide the engine's sizes.
    longest: length of the longest later prompt, in tokens; 0: no later prompt is longer than `prompts`.
    model_name: MaxText's model_name, or a yml.
    tokenizer: file or folder.
    overrides: KEY=VALUE settings of MaxText.
    chat: whether prompts are conversations.

  Raises:
    SavedModelError: an argument is invalid, or a prompt does not fit.
    ValueError: see `saved_model.open_model`.
  """

  def __init__(
    self,
    checkpoint: Path,
    options: Options,
    prompts: Sequence[str | Sequence[Message]] = (),
    *,
    longest: int = 0,
    model_name: str | None = None,
    tokenizer: Path | None = None,
    overrides: Sequence[str] = (),
    chat: bool = False,
  ):
    options.check()
    self.options = options
    source = saved_model.locate(checkpoint, model_name, overrides)
    self._tokenizer = saved_model.read_tokenizer(source, tokenizer)
    self.template = ChatTemplate(self._tokenizer, options.chat_template) if chat else None
    self._ids = [self._encode(prompt) for prompt in prompts]
    sizes = self._sizes(max([longest, 1, *map(len, self._ids)]), parse(overrides))
    config, stated = saved_model.make_config(source, sizes | self._batch(len(prompts)) | options.sampling())
    saved_model.check_offset(source, config, stated)
    self._config = config
    self._check_config()
    for ids in self._ids:
      self._check(ids)
    self._end = saved_model.end_tokens(self._tokenizer, config.vocab_size, checkpoint, tokenizer)
    if self.template is not None:
      self._end |= self.template.end_tokens()
    if not self._end:
      logger.warning("neither tokenizer nor generation_config.json has an end token: a text ends after --tokens")
    self._engine = Engine(config, saved_model.read_weights(source, config), options.seed)

  def _encode(self, prompt: str | Sequence[Message]) -> list[int]:
    """The token ids of a text or of a conversation."""
    ids: list[int] = self._tokenizer.encode(prompt) if isinstance(prompt, str) else self._chat_ids(prompt)
    if not ids:
      raise SavedModelError("the prompt gives no token; write at least a word")
    return ids

  def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
    assert self.template is not None
    return self.template.prompt(messages)

  def _sizes(self, longest: int, given: Mapping[str, str]) -> dict[str, Any]:
    """MaxText's sizes for prompts of up to `longest` tokens that leave room for the answer, and fit those of the user."""
    prompt, total = (int(given[name]) if given.get(name, "").isdecimal() else None for name in (_PROMPT, _TOTAL))
    length = padded_length(longest) if prompt is None else prompt
    if prompt is None and total is not None:
      length = min(length, max(longest, total - self.options.tokens))
    return {_PROMPT: length, _TOTAL: length + self.options.tokens}

  def _batch(self, prompts: int) -> dict[str, Any]:
    """MaxText's setting for so many prompts: each device has the same number of slots."""
    import jax

    return {"per_device_batch_size": -(-min(max(prompts, 1), self.options.batch_size) // jax.device_count())}

  def _check_config(self) -> None:
    """Raises SavedModelError if the config asks for what is not done here, or contradicts the options."""
    config, top_k = self._config, self.options.top_k
    if top_k > config.vocab_size:
      raise SavedModelError(f"--top-k {top_k}: the model has {config.vocab_size} tokens; pass fewer, or leave it out")
    if config.use_chat_template and self.template is None:
      raise SavedModelError("use_chat_template=true: a --prompt is taken as it is; pass --chat with messages instead")
    if self.template is not None and self.options.chat_template is None:
      for name in ("chat_template", "chat_template_path"):
        if getattr(config, name):
          raise SavedModelError(f"{name}={getattr(config, name)}: not read here; pass --chat-template with a Jinja file")

  def _check(self, ids: Sequence[int]) -> None:
    """Raises SavedModelError if a prompt does not fit the engine, or its tokens the model."""
    saved_model.check_vocabulary(self._config, ids)
    limit, room = self._config.max_prefill_predict_length, self._config.max_target_length
    room -= limit
    if len(ids) > limit:
      raise SavedModelError(
        f"a prompt of {len(ids)} tokens is longer than {_PROMPT}={limit}; shorten it, or pass "
        f"{_PROMPT}={padded_length(len(ids))} {_TOTAL}={padded_length(len(ids)) + self.options.tokens}"
      )
    if self.options.tokens > room:
      raise SavedModelError(
        f"--tokens {self.options.tokens}: {_TOTAL}={self._config.max_target_length} leaves room for {room} after prompts "
        f"of up to {_PROMPT}={limit}; pass fewer, or {_TOTAL}={limit + self.options.tokens}"
      )

  def answer(self, prompts: Sequence[str | Sequence[Message]] | None = None) -> Iterator[Piece]:
    """Yields the answers, piece by piece as they are generated; those of several prompts alternate.

    Args:
      prompts: later prompts; None: those that the generator was made with.

    Raises:
      SavedModelError: a prompt does not fit.
    """
    rows = self._ids if prompts is None else [self._encode(prompt) for prompt in prompts]
    for ids in rows:
      self._check(ids)
    answers = [Answer(self._tokenizer, ids, self.options.tokens, self._end, self.options.stop) for ids in rows]
    shown = [0] * len(rows)
    for index, _, is_last in self._engine.decode(rows, lambda index, token: answers[index].take(token)):
      text, shown[index] = answers[index].text[shown[index] :], len(answers[index].text)
      yield Piece(index, text, is_last, answers[index])


def generate(
  checkpoint: Path,
  prompt: str,
  count: int,
  *,
  model_name: str | None = None,
  tokenizer: Path | None = None,
  overrides: Sequence[str] = (),
  **options: Any,
) -> Iterator[str]:
  """Yields the text that a model generates after one prompt; for the arguments see `Generator` and `Options`."""
  chosen = Options(tokens=count, **options)
  made = Generator(checkpoint, chosen, [prompt], model_name=model_name, tokenizer=tokenizer, overrides=overrides)
  yield from filter(None, (piece.text for piece in made.answer()))


def in_order(pieces: Iterator[Piece]) -> Iterator[Piece]:
  """Reorders pieces by prompt: those of the first unfinished prompt at once, those of later ones in their turn."""
  waiting: dict[int, list[Piece]] = {}
  turn = 0
  for piece in pieces:
    waiting.setdefault(piece.index, []).append(piece)
    while ready := waiting.pop(turn, []):
      yield from ready
      if not ready[-1].is_last:
        break
      turn += 1
