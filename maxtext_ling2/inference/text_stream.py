"""The text of tokens as they arrive: whole characters only, up to a stop text."""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"  # incomplete UTF-8 decodes to this character
_WINDOW = 16  # tokens in front of a new one that are decoded with it


class Detokenizer:
  """Decodes tokens as they arrive.

  Tokenizers drop a space at the start of a text, and a character's bytes may be spread over several tokens. So a new
  token is decoded together with some in front of it, whose text is cut off, and held back until its characters are
  complete. The cost per token does not grow with the text.

  Args:
    tokenizer: `decode(ids)`.
    prompt: the token ids in front of the first one.
  """

  def __init__(self, tokenizer: Any, prompt: Sequence[int]):
    self._tokenizer = tokenizer
    self._tokens = list(prompt)
    self._shown = len(self._tokens)  # tokens whose text has been returned

  def feed(self, token: int) -> str:
    """The text that a token completes; "" while a character is incomplete."""
    self._tokens.append(token)
    return self._new(last=False)

  def finish(self) -> str:
    """What is left at the end, such as an incomplete character, as the tokenizer shows it."""
    return self._new(last=True)

  def _new(self, last: bool) -> str:
    start = max(0, self._shown - _WINDOW)
    before = self._tokenizer.decode(self._tokens[start : self._shown])
    text = self._tokenizer.decode(self._tokens[start:])
    if not text.startswith(before) or (text.endswith(_REPLACEMENT) and not last):
      return ""
    self._shown = len(self._tokens)
    return str(text[len(before) :])


class StopTexts:
  """Cuts a text, which arrives in pieces, in front of the stop text that is complete first.

  What could be the beginning of a stop text is held back. The result does not depend on how the text is cut into pieces.

  Attributes:
    found: whether a stop text has been seen; the text has ended then.

  Args:
    texts: stop texts; not empty.
  """

  def __init__(self, texts: Sequence[str]):
    self._texts = tuple(texts)
    self._held = ""
    self.found = False

  def feed(self, piece: str) -> str:
    """The text that is certain to come before any stop text."""
    text = self._held + piece
    places = [(place + len(stop), place) for stop in self._texts if (place := text.find(stop)) >= 0]
    if places:
      self.found, self._held = True, ""
      return text[: min(places)[1]]
    held = max((_overlap(text, stop) for stop in self._texts), default=0)
    self._held = text[len(text) - held :]
    return text[: len(text) - held]

  def finish(self) -> str:
    """What was held back, when no more text comes."""
    held, self._held = self._held, ""
    return held


def _overlap(text: str, stop: str) -> int:
  """The length of the longest end of a text that a stop text begins with."""
  longest = min(len(text), len(stop) - 1)
  return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class Answer:
  """One prompt's generated text, token by token.

  Attributes:
    text: the text so far.
    tokens: number of generated tokens, without an end token.
    reason: why it has ended, "stop" (an end token or a stop text) or "length"; None: it has not.

  Args:
    tokenizer: `decode(ids)`.
    prompt: its token ids.
    count: maximum number of tokens.
    end: ids of end tokens.
    stops: stop texts.
  """

  def __init__(self, tokenizer: Any, prompt: Sequence[int], count: int, end: frozenset[int], stops: Sequence[str] = ()):
    self._detokenizer, self._stops = Detokenizer(tokenizer, prompt), StopTexts(stops)
    self._count, self._end = count, end
    self.text, self.tokens = "", 0
    self.reason: str | None = None

  def take(self, token: int) -> bool:
    """Takes the next token; returns whether the text has ended."""
    if token in self._end:
      self.reason = "stop"
    else:
      self.tokens += 1
      self._add(self._detokenizer.feed(token))
      if self.reason is None and self.tokens == self._count:
        self.reason = "length"
    if self.reason is not None and not self._stops.found:
      self._add(self._detokenizer.finish())
      self.text += self._stops.finish()
    return self.reason is not None

  def _add(self, piece: str) -> None:
    self.text += self._stops.feed(piece)
    if self._stops.found:
      self.reason = "stop"
