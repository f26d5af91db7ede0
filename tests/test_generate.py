"""Text from a trained model, and the loss of a text, on a golden Hugging Face folder with a stand-in tokenizer."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from maxtext_ling2.cli import app
from maxtext_ling2.inference import evaluate, generate, saved_model
from maxtext_ling2.inference.saved_model import SavedModelError
from maxtext_ling2.verify.model import Float32Model

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


PROMPT = "Hello?"


@pytest.fixture(scope="module")
def greedy():
  """Six tokens after PROMPT."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(saved_model, "_tokenizer", lambda path: Letters())
    return "".join(generate.generate(FOLDER, PROMPT, 6))


def test_greedy_text_is_the_argmax_of_the_full_pass(greedy):
  assert len(greedy) == 6
  ids = np.array([Letters().encode(PROMPT + greedy)])
  logits = Float32Model(FOLDER, 1, ids.shape[1]).logits(ids)
  assert text_of(logits[0, len(PROMPT) - 1 : -1].argmax(-1)) == greedy


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
  reference = {size: Float32Model(FOLDER, 1, size) for size in (8, 4)}
  for start in range(0, 28, length):
    window = ids[start : start + length + 1]
    logits = reference[len(window) - 1].logits(window[None, :-1])[0].astype(np.float64)
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
    ((FOLDER, None, None, {}, ["temperature"]), "'temperature': not a setting of MaxText; write KEY=VALUE"),
  ],
)
def test_what_cannot_be_opened(arguments, message):
  with pytest.raises(ValueError, match=message):
    saved_model.open_model(*arguments)


def test_words_are_read_as_maxtext_reads_them():
  words = ["run_name=2024-01-01", "data_shuffle_seed=010", "jax_cache_dir=", "max_target_length=16"]
  config = saved_model.open_model(FOLDER, None, None, {"max_target_length": 8}, words).config
  assert (config.run_name, config.data_shuffle_seed, config.jax_cache_dir) == ("2024-01-01", 8, None)
  assert config.max_target_length == 16


# End of sequence


def folder_with(target, **files):
  """A folder with these JSON files, or files of other text."""
  target.mkdir()
  for name, content in files.items():
    (target / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
  return target


def model_with(eos):
  """A model with 10 tokens and a tokenizer with this end token, as far as it matters here."""
  return SimpleNamespace(config=SimpleNamespace(vocab_size=10), tokenizer=SimpleNamespace(eos_id=eos))


@pytest.mark.parametrize(
  ("tokenizer", "files", "expected"),
  [
    (None, {}, set()),
    (2, {}, {2}),
    (2, {"generation_config": {"eos_token_id": [7, 9]}, "config": {"eos_token_id": 1}}, {1, 2, 7, 9}),
    (2, {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [2, 3]}}, {2, 3}),
    (None, {"generation_config": {"eos_token_id": 0}, "config": {}}, {0}),
    (None, {"generation_config": {"eos_token_id": []}}, set()),
  ],
)
def test_end_tokens(tmp_path, tokenizer, files, expected):
  folder = folder_with(tmp_path / "hf", **files)
  assert saved_model.end_tokens(model_with(tokenizer), folder, None, tmp_path / "nowhere") == expected


@pytest.mark.parametrize("file", ["generation_config", "config"])
@pytest.mark.parametrize(
  ("value", "culprit"),
  [
    ("</s>", '"</s>"'),
    (-1, "-1"),
    (10, "10"),
    (True, "true"),
    (1.0, "1.0"),
    ([1, "2"], '"2"'),
    ([[1]], "[1]"),
    ({}, "{}"),
  ],
)
def test_what_is_no_end_token(tmp_path, file, value, culprit):
  folder = folder_with(tmp_path / "hf", **{file: {"eos_token_id": value}})
  with pytest.raises(SavedModelError) as error:
    saved_model.end_tokens(model_with(2), folder)
  says = f"{folder / file}.json: eos_token_id={json.dumps(value)}: {culprit} is not a token id from 0 to 9; correct it, "
  assert str(error.value) == f"{says}or remove the key"


@pytest.mark.parametrize(
  ("text", "why"),
  [
    ("{", "not valid JSON"),
    ("[1]", "a list instead of a JSON object"),
    ('{"eos_token_id": 1, "eos_token_id": 2}', "twice"),
    ("\xff", "not valid JSON"),
  ],
)
def test_damaged_generation_config(tmp_path, text, why):
  folder = folder_with(tmp_path / "hf")
  (folder / "generation_config.json").write_bytes(text.encode("latin1"))
  with pytest.raises(ValueError, match=f"generation_config.json: .*{why}"):
    saved_model.end_tokens(model_with(2), folder)


def test_text_ends_at_each_end_token(tmp_path, greedy):
  """Of the folder, and of a folder with a tokenizer."""
  tokens = Letters().encode(greedy)
  place = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
  folder = tmp_path / "hf"
  shutil.copytree(FOLDER, folder)
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [383, tokens[place]]}))
  ended = text_of(tokens[:place])
  assert "".join(generate.generate(folder, PROMPT, 6)) == ended
  assert "".join(generate.generate(FOLDER, PROMPT, 6, tokenizer=folder)) == ended


# Multi-token prediction


@pytest.mark.slow
def test_mtp_weights_that_are_not_wanted(greedy):
  """A folder with MTP weights, opened without: the same text and the same loss."""
  words = ["mtp_num_layers=0"]
  opened = saved_model.open_model(FOLDER, None, None, {}, words)
  assert not [path for path in opened.weights if "mtp" in "/".join(map(str, path))]
  assert [path for path in saved_model.open_model(FOLDER, None, None, {}).weights if "mtp" in "/".join(map(str, path))]
  assert "".join(generate.generate(FOLDER, PROMPT, 6, overrides=words)) == greedy
  with_mtp, without = (evaluate.evaluate(FOLDER, "Hello, hello", length=8, overrides=some) for some in ([], words))
  assert without.nats == pytest.approx(with_mtp.nats, rel=1e-6)


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


@pytest.mark.parametrize(
  ("case", "scan"),
  [
    ("trailing_mtp", ["--scan"]),
    pytest.param("trailing_mtp", [], marks=pytest.mark.slow),
    pytest.param("one_cycle", [], marks=pytest.mark.slow),
    pytest.param("one_cycle", ["--scan"], marks=pytest.mark.slow),
  ],
)
def test_verify_by_decoding(case, scan):
  """Prompts of 10 tokens, the rest step by step, equal the recorded logits of the official code."""
  reference = ["--reference", str(GOLDEN / case / "io_short.npz"), "--decay-offset", "1", "--decode", "10"]
  done = CliRunner().invoke(app, ["verify", str(GOLDEN / case), *reference, *scan])
  assert done.exit_code == 0, done.output
  assert "30 positions" in done.output and "PASS" in done.output
