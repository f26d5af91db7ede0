"""Text as it streams: whole characters, spaces kept, cut before stop texts, whatever the pieces are."""

import random

import pytest

from maxtext_ling2.demo.data import tokenizer_file
from maxtext_ling2.inference.text_stream import Answer, Detokenizer, StopTexts

pytestmark = pytest.mark.unit

TEXT = "The Fluß – 河流在流 🌊🌊 ends.  Two  spaces,\n\n\ttabs; naïve don't . "


class Bytes:
  """One token a byte; a space at the start of a text is dropped, as sentencepiece drops it."""

  def encode(self, text):
    return list(text.encode())

  def decode(self, ids):
    return bytes(ids).decode(errors="replace").removeprefix(" ")


class Llama:
  """MaxText's Llama 2 tokenizer: merges spaces, and falls back to bytes."""

  def __init__(self):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file()))
    self.encode, self.decode = model.encode, model.decode


def qwen():
  import transformers

  folder = tokenizer_file().parent / "qwen3-tokenizer"
  return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("make", [Bytes, Llama, qwen])
def test_pieces_are_the_text_of_all_tokens(make):
  """Of each cut into prompt and answer at a whole character."""
  tokenizer = make()
  every = tokenizer.encode(TEXT)
  whole = tokenizer.decode(every)
  cuts = 0
  for cut in range(1, len(every)):
    start = tokenizer.decode(every[:cut])
    if not whole.startswith(start) or start.endswith("\ufffd"):
      continue
    cuts += 1
    stream = Detokenizer(tokenizer, every[:cut])
    pieces = [stream.feed(token) for token in every[cut:]]
    assert stream.finish() == ""
    assert start + "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)
  assert cuts > 20


def test_a_character_is_shown_with_its_last_byte():
  stream = Detokenizer(Bytes(), list(b"to"))
  assert [stream.feed(byte) for byte in " 🌊ß".encode()] == [" ", "", "", "", "🌊", "", "ß"]


def test_an_incomplete_character_is_shown_at_the_end():
  stream = Detokenizer(Bytes(), [])
  assert [stream.feed(byte) for byte in "a🌊".encode()[:3]] == ["a", "", ""]
  assert stream.finish() == "\ufffd"
  assert stream.finish() == ""


def test_the_cost_per_token_does_not_grow():
  lengths = []

  class Counting(Bytes):
    def decode(self, ids):
      lengths.append(len(ids))
      return super().decode(ids)

  stream = Detokenizer(Counting(), [65] * 1000)
  assert "".join(map(stream.feed, [66] * 1000)) == "B" * 1000
  assert max(lengths) == 17


@pytest.mark.parametrize(
  ("pieces", "stops", "shown", "found"),
  [
    (["ab", "cd"], ["bc"], ["a", ""], True),
    (["a", "b", "c"], ["bd"], ["a", "", "bc"], False),
    (["aab", "ab"], ["aabb"], ["", "aabab"], False),
    (["a", "b", "c", "d"], ["abcd", "bc"], ["", "", "a"], True),
    (["abcd"], ["abcd", "bc"], ["a"], True),
    (["x\n", "\nUser"], ["\n\nUser:"], ["x", "\n\nUser"], False),
    (["x"], [], ["x"], False),
  ],
)
def test_stop_texts(pieces, stops, shown, found):
  """By hand; the last entry of `shown` has what is left at the end."""
  stream, texts = StopTexts(stops), []
  for piece in pieces:
    texts.append(stream.feed(piece))
    if stream.found:
      break
  if not stream.found:
    texts[-1] += stream.finish()
  assert (texts, stream.found) == (shown, found)


def test_stop_texts_do_not_depend_on_the_pieces():
  rng = random.Random(0)
  for _ in range(2000):
    text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
    stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    # The stop text whose last letter comes first; of two that end there, the longer one.
    ends = [(end, end - len(stop)) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
    expected = text[: min(ends)[1]] if ends else text
    stream, shown, rest = StopTexts(stops), "", text
    while rest and not stream.found:
      cut = rng.randint(1, len(rest))
      shown, rest = shown + stream.feed(rest[:cut]), rest[cut:]
    assert (shown + stream.finish(), stream.found) == (expected, bool(ends)), (text, stops)


@pytest.mark.parametrize(
  ("tokens", "count", "stops", "expected"),
  [
    ("abc", 3, [], ("abc", 3, "length")),
    ("abcd", 9, ["bc"], ("a", 3, "stop")),
    ("ab\0d", 9, ["bc"], ("ab", 2, "stop")),  # 0 is an end token, and what was held back is shown
    ("ab", 2, ["bc"], ("ab", 2, "length")),
    ("\0", 9, [], ("", 0, "stop")),
    ("abc", 3, ["c"], ("ab", 3, "stop")),
  ],
)
def test_answer(tokens, count, stops, expected):
  answer = Answer(Bytes(), [65], count, frozenset({0}), stops)
  for token in tokens.encode():
    if answer.take(token):
      break
  assert (answer.text, answer.tokens, answer.reason) == expected
