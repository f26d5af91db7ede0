"""Text from a trained model, and the loss of a text, on a golden Hugging Face folder with a stand-in tokenizer."""

import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from maxtext_ling2 import evaluate, generate, saved_model
from maxtext_ling2.checkpoint.verify import Reference
from maxtext_ling2.cli import app
from maxtext_ling2.saved_model import SavedModelError

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "trailing_mtp"


class Letters:
  """One token a character."""

  eos_id = None

  def encode(self, text):
    return [ord(letter) - 32 for letter in text]

  def decode(self, ids):
    return "".join(chr(token + 32) for token in ids)


@pytest.fixture(autouse=True)
def letters(monkeypatch):
  monkeypatch.setattr(saved_model, "_tokenizer", lambda path: Letters())


def text_of(ids):
  return Letters().decode(ids)


def test_greedy_text_is_the_argmax_of_the_full_pass():
  prompt = "Hello?"
  text = "".join(generate.generate(FOLDER, prompt, 6))
  assert len(text) == 6
  ids = np.array([Letters().encode(prompt + text)])
  logits = Reference(FOLDER, 1, ids.shape[1]).logits(ids)
  assert text_of(logits[0, len(prompt) - 1 : -1].argmax(-1)) == text


class Bytes:
  def decode(self, ids):
    return bytes(ids).decode(errors="replace").lstrip(" ")


def test_pieces_are_whole_characters_with_their_spaces():
  prompt, text = list(b"to"), list(" der Fluß – ende".encode())
  pieces = list(generate.pieces(prompt, iter(text), Bytes()))
  assert "".join(pieces) == " der Fluß – ende"
  assert pieces[:2] == [" ", "d"] and "ß" in pieces and "–" in pieces


def test_score_of_a_text():
  """Windows do not see each other, and every token but the first is scored once."""
  text = "".join(chr(33 + (7 * i) % 60) for i in range(29))
  length = 8
  score = evaluate.evaluate(FOLDER, text, length=length)
  assert score.tokens == 28 and score.bytes == 29
  ids = np.array(Letters().encode(text))
  nats = 0.0
  for start in range(0, 28, length):
    window = ids[start : start + length + 1]
    logits = Reference(FOLDER, 1, len(window) - 1).logits(window[None, :-1])[0].astype(np.float64)
    nats -= np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), window[1:, None], -1).sum()
  assert score.nats == pytest.approx(nats, rel=1e-5)
  assert score.perplexity == pytest.approx(math.exp(nats / 28), rel=1e-4)
  assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 29, rel=1e-5)


@pytest.mark.parametrize("count", [2, 8, 9, 10, 32, 33, 34])
def test_batches_hold_every_target_once(count):
  ids = np.arange(1, count + 1, dtype=np.int32)
  seen = []
  for inputs, targets, segments in evaluate.batches(ids, 8, 4):
    assert inputs.shape == (4, 8)
    np.testing.assert_array_equal((inputs + 1)[segments > 0], targets[segments > 0])
    seen.extend(targets[segments > 0])
  assert seen == list(range(2, count + 1))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((GOLDEN, None, None, {}), "neither a Hugging Face folder"),
    ((GOLDEN / "nothing", None, None, {}), "there is no such folder"),
    ((FOLDER, "ling2", None, {}), "--model ling2: .* says itself"),
    ((FOLDER, None, None, {}, ["temperature"]), "'temperature': no setting of MaxText; write key=value"),
  ],
)
def test_what_cannot_be_opened(arguments, message):
  with pytest.raises(SavedModelError, match=message):
    saved_model.open_model(*arguments)


def test_bad_arguments():
  with pytest.raises(SavedModelError, match="--tokens 0"):
    list(generate.generate(FOLDER, "a", 0))
  with pytest.raises(SavedModelError, match="--top-p 0"):
    list(generate.generate(FOLDER, "a", 1, nucleus=0.0))
  with pytest.raises(SavedModelError, match="not this model's tokenizer"):
    list(generate.generate(FOLDER, chr(5000), 1))
  with pytest.raises(SavedModelError, match="needs at least two"):
    evaluate.evaluate(FOLDER, "a")


def test_commands(tmp_path):
  file = tmp_path / "text"
  file.write_text("Hello, hello, hello")
  done = CliRunner().invoke(app, ["eval", str(FOLDER), "--text", str(file), "--length", "8"])
  assert done.exit_code == 0 and "bits per byte" in done.stdout and "18 tokens, 19 bytes" in done.stdout
  done = CliRunner().invoke(app, ["eval", str(GOLDEN), "--text", str(file)])
  assert done.exit_code == 1


@pytest.mark.parametrize("case", ["one_cycle", "trailing_mtp"])
@pytest.mark.parametrize("scan", [[], ["--scan"]])
def test_verify_by_decoding(case, scan):
  """Prompts of 10 tokens, the rest step by step, equal the recorded logits of the official code."""
  reference = ["--reference", str(GOLDEN / case / "io_short.npz"), "--decay-offset", "1", "--decode", "10"]
  done = CliRunner().invoke(app, ["verify", str(GOLDEN / case), *reference, *scan])
  assert done.exit_code == 0, done.output
  assert "30 positions" in done.output and "PASS" in done.output
