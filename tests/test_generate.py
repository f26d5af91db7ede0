"""Text from a trained model, and the loss of a text, on a golden Hugging Face folder with a stand-in tokenizer."""

import dataclasses
import functools
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from inference import chat_tokenizer
from maxtext_ling2.cli import app
from maxtext_ling2.demo.data import tokenizer_file
from maxtext_ling2.inference import chat_loop, command, evaluate, generate, saved_model
from maxtext_ling2.inference.generate import Generator, Options, in_order
from maxtext_ling2.inference.saved_model import SavedModelError
from maxtext_ling2.maxtext_api.engine import Engine
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
def letters(request, monkeypatch):
  if "chat_folder" not in request.fixturenames:
    monkeypatch.setattr(saved_model, "_tokenizer", lambda path: Letters())


SLOTS, TOKENS = 2, 6
ENGINES = {}  # sizes and sampling -> engine, of which each compiles for 10 to 20 s


@pytest.fixture
def engines(monkeypatch):
  """Engines are made once for all tests: their folders are FOLDER or copies of it."""

  def shared(config, weights, seed):
    names = ("max_prefill_predict_length", "max_target_length", "per_device_batch_size", "decode_sampling_strategy")
    key = tuple(str(getattr(config, name)) for name in names)
    return ENGINES.setdefault(key, None) or ENGINES.update({key: Engine(config, weights, seed)}) or ENGINES[key]

  monkeypatch.setattr(generate, "Engine", shared)
  return ENGINES


def text_of(ids):
  return Letters().decode(ids)


OPTIONS = Options(tokens=TOKENS, batch_size=SLOTS)
SIZES = ["max_prefill_predict_length=256", f"max_target_length={256 + TOKENS}", f"per_device_batch_size={SLOTS}"]
"""As for the longest of PROMPTS, so that all tests share an engine."""

PROMPT = "Hello?"
PROMPTS = [PROMPT, *("".join(chr(33 + (7 * i + n) % 60) for i in range(n)) for n in (1, 127, 128, 129, 150))]


def made(prompts, options=OPTIONS, folder=FOLDER, **arguments):
  return Generator(folder, options, prompts, overrides=SIZES, **arguments)


def answers(generator, *prompts):
  """(text, tokens, reason) of each prompt."""
  last = {piece.index: piece.answer for piece in generator.answer(*prompts)}
  return [(last[i].text, last[i].tokens, last[i].reason) for i in range(len(last))]


@pytest.fixture
def greedy(engines):
  """Six tokens after PROMPT."""
  return answers(made([PROMPT]))[0][0]


@functools.cache
def full_model():
  return Float32Model(FOLDER, len(PROMPTS), 160)


def most_likely(rows, starts):
  """The most likely tokens by the full pass after each row of ids from a position on, [TOKENS] per row."""
  padded = np.zeros((len(PROMPTS), 160), int)
  for target, row in zip(padded, rows, strict=False):
    target[: len(row)] = row
  logits = full_model().logits(padded)
  return [row[start - 1 : start - 1 + TOKENS].argmax(-1).tolist() for row, start in zip(logits, starts, strict=False)]


def tokens_of(generator):
  """The tokens of each prompt, with end tokens, and its answers."""
  tokens, decode = {}, generator._engine.decode

  def recorded(rows, ends):
    for index, token, last in decode(rows, ends):
      tokens.setdefault(index, []).append(token)
      yield index, token, last

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(generator._engine, "decode", recorded)
    found = answers(generator)
  return [tokens[index] for index in range(len(found))], found


def test_greedy_text_of_each_slot_is_the_argmax_of_the_full_pass(engines):
  """Six prompts in two slots: their lengths are padded to 128 and to 256, four wait, and each is as if alone."""
  generator = made(PROMPTS)
  assert generator._engine.slots == SLOTS
  found = answers(generator)
  assert [(tokens, reason) for _, tokens, reason in found] == [(TOKENS, "length")] * len(PROMPTS)
  rows = [Letters().encode(prompt + text) for prompt, (text, *_) in zip(PROMPTS, found, strict=True)]
  assert [text_of(ids) for ids in most_likely(rows, map(len, PROMPTS))] == [text for text, *_ in found]
  assert [answers(generator, [prompt])[0] for prompt in PROMPTS] == found


def test_pieces_are_in_order(engines):
  """Those of the first unfinished prompt come at once, those of the others after it."""
  generator = made(PROMPTS[:3])
  raw = [piece.index for piece in generator.answer()]
  assert raw[:4] == [0, 1, 0, 1] and raw[-TOKENS:] == [2] * TOKENS
  arrived, shown = [], []
  pieces = (arrived.append(piece.index) or piece for piece in generator.answer())
  for piece in in_order(pieces):
    shown.append(piece.index)
    if piece.index == 0:
      assert len(shown) == arrived.count(0)  # not held back
  assert shown == [0] * TOKENS + [1] * TOKENS + [2] * TOKENS


def test_stop_text_over_two_tokens(engines, greedy):
  for stop, expected in ((greedy[2:4], greedy[:2]), (greedy[-1] + "x", greedy)):
    found = answers(made([PROMPT, PROMPTS[1]], Options(tokens=TOKENS, batch_size=SLOTS, stop=[stop])))
    assert found[0] == (expected, 4 if expected != greedy else TOKENS, "stop" if expected != greedy else "length")
    assert stop not in found[1][0]


def test_one_prompt_through_the_function(engines, greedy):
  sizes = [*SIZES[:2], "per_device_batch_size=2"]
  assert list(generate.generate(FOLDER, PROMPT, TOKENS, overrides=sizes)) == list(greedy)


def test_default_tokenizer_of_the_demo(tmp_path, caplog, monkeypatch):
  """A checkpoint of ling2-tiny needs no --tokenizer, any other one does."""
  read = []
  monkeypatch.setattr(saved_model, "_tokenizer", read.append)
  (tmp_path / "items").mkdir()
  for model, expected in (("ling2-tiny", tokenizer_file()), ("ling2", tmp_path)):
    saved_model.read_tokenizer(saved_model.locate(tmp_path, model), None)
    assert read.pop() == expected
  saved_model.read_tokenizer(saved_model.locate(tmp_path, "ling2-tiny"), GOLDEN)
  assert read == [GOLDEN] and caplog.text.count("tokenizer.llama2") == 1


@pytest.mark.parametrize(
  ("options", "settings"),
  [
    ({}, ("greedy",)),
    ({"temperature": 0.7}, ("weighted", 0.7)),
    ({"temperature": 0.7, "top_p": 0.9}, ("nucleus", 0.7, 0.9)),
    ({"temperature": 2.0, "top_k": 5}, ("topk", 2.0, 1.0, 5)),
    ({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, ("composite", 0.7, 0.9, 5)),
  ],
)
def test_settings_of_sampling(options, settings):
  names = ("strategy", "temperature", "nucleus_p", "top_k")
  found = {f"decode_sampling_{name}": value for name, value in zip(names, settings, strict=False)}
  given = Options(**options).sampling()
  assert found.items() <= given.items() and len(given) in (1, 4)


@pytest.mark.slow
def test_sampling_takes_the_most_likely_tokens_alone(engines):
  """Of 60 first tokens and more with top-k 3 and a high temperature each is among the three most likely ones."""
  options = Options(tokens=TOKENS, batch_size=SLOTS, temperature=50.0, top_k=3)
  generator = made([PROMPT] * 60, options)
  texts = [text for text, *_ in answers(generator)]
  rows = np.zeros((len(PROMPTS), 160), int)
  rows[0, : len(PROMPT)] = Letters().encode(PROMPT)
  best = full_model().logits(rows)[0, len(PROMPT) - 1].argsort()[-3:]
  assert {text[0] for text in texts} == set(text_of(best))


def test_sizes_leave_room_for_what_is_asked():
  """{prompt: padded to a power of two or a multiple of 1024; what the user sets stays}."""
  generator = Generator.__new__(Generator)
  generator.options = Options(tokens=100)
  for longest, given, expected in [
    (1, {}, (128, 228)),
    (129, {}, (256, 356)),
    (1024, {}, (1024, 1124)),
    (1025, {}, (2048, 2148)),
    (2049, {}, (3072, 3172)),
    (20, {"max_target_length": "150"}, (50, 150)),
    (60, {"max_target_length": "150"}, (60, 160)),  # too long: MaxText gets the user's 150, and the check says so
    (20, {"max_prefill_predict_length": "64"}, (64, 164)),
  ]:
    assert tuple(generator._sizes(longest, given).values()) == expected


def test_prompts_that_do_not_fit(engines):
  """Before the weights are read."""
  refused = {
    ("max_prefill_predict_length=4",): "6 tokens is longer than max_prefill_predict_length=4; .* max_target_length=134",
    ("max_target_length=10",): "--tokens 6: max_target_length=10 leaves room for 4 after .* or max_target_length=12",
    ("max_prefill_predict_length=8", "max_target_length=12"): "leaves room for 4 after prompts of up to .*=8; pass fewer",
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(saved_model, "read_weights", None)
    for words, message in refused.items():
      with pytest.raises(SavedModelError, match=message):
        Generator(FOLDER, OPTIONS, [PROMPT], overrides=words)
  generator = made([PROMPT])
  with pytest.raises(SavedModelError, match="a prompt of 300 tokens is longer than max_prefill_predict_length=256"):
    answers(generator, ["a" * 300])


# Conversations


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
  """The golden folder with a tokenizer of bytes and a chat template."""
  folder = tmp_path_factory.mktemp("chat") / "hf"
  shutil.copytree(FOLDER, folder)
  return chat_tokenizer.write(folder)


CHAT = [{"role": "user", "content": "Hi"}]


def chat_of(folder, messages=(CHAT,), **arguments):
  return made(list(messages), folder=folder, chat=True, **arguments)


def test_chats_of_one_to_three_turns(engines, chat_folder):
  """Each answer is that of the full pass on the ids that tests/inference/test_chats.py has by hand."""
  turn = [{"role": "assistant", "content": "Ho"}, *CHAT]
  chats = [CHAT, CHAT + turn, [{"role": "system", "content": "short"}, *CHAT, *turn, *turn]]
  generator = chat_of(chat_folder, chats)
  tokens, found = tokens_of(generator)
  prompts = [generator.template.prompt(messages) for messages in chats]
  expected = most_likely([[*a, *b] for a, b in zip(prompts, tokens, strict=True)], map(len, prompts))
  tokenizer = saved_model._tokenizer(chat_folder)
  for ids, most, (text, count, reason) in zip(tokens, expected, found, strict=True):
    assert most[: len(ids)] == ids
    ended = ids[-1] in (0, 1, 3)
    assert (reason, count) == (("stop", len(ids) - 1) if ended else ("length", TOKENS))
    assert text == tokenizer.decode(ids[:count])


def test_a_turn_ends_at_the_tokens_of_template_and_files(engines, chat_folder):
  """The template's end of a turn (3), the tokenizer's eos_token (0), config.json's eos_token_id (1)."""
  assert chat_of(chat_folder)._end == {0, 1, 3}
  assert made(["Hi"], folder=chat_folder)._end == {0, 1}


def test_each_slot_ends_at_its_own_token(engines, chat_folder):
  """With an end token that one of two conversations reaches, the other goes on."""
  generator = chat_of(chat_folder, [CHAT, [{"role": "user", "content": "What?"}]])
  generator._end = frozenset()
  tokens, _ = tokens_of(generator)
  mine = next(token for token in tokens[0] if token not in tokens[1])
  generator._end = frozenset({mine})
  first, second = answers(generator)
  assert first[1:] == (tokens[0].index(mine), "stop")
  assert second[1:] == (TOKENS, "length")


def test_typed_conversation(engines, chat_folder, monkeypatch):
  generator = chat_of(chat_folder)
  asked, original = [], generator.answer
  monkeypatch.setattr(generator, "answer", lambda prompts: asked.append(prompts[0]) or original(prompts))
  lines = iter(["Hi", "", "/help", "again", "/clear", "Hi", "x" * 300, "/exit", "never"])
  shown, told = [], []
  chat_loop.run(generator, "short", lambda: next(lines), shown.append, told.append)
  system = {"role": "system", "content": "short"}
  answer = "".join(shown).splitlines()[0]
  assert asked[0] == asked[2] == [system, *CHAT]
  assert asked[1] == [system, *CHAT, {"role": "assistant", "content": answer}, {"role": "user", "content": "again"}]
  assert asked[3][-1]["content"] == "x" * 300 and "begin a new conversation with /clear" in told[-1]
  assert len(asked) == 4 and told.count(chat_loop.HELP) == 2


def test_ctrl_c_ends_an_answer(engines, chat_folder):
  import signal

  generator = chat_of(chat_folder)
  lines, shown = iter(["Hi"]), []

  def read():
    if (line := next(lines, None)) is None:
      raise EOFError
    return line

  def write(text):
    shown.append(text)
    if len(shown) == 2:
      signal.raise_signal(signal.SIGINT)

  chat_loop.run(generator, None, read, write, lambda text: None)
  assert len(shown) == 3 and shown[-1] == "\n"
  assert answers(generator)[0][1:] == (TOKENS, "length")  # its slot is free again


def test_commands_of_chats(engines, chat_folder, tmp_path):
  """From a file and from standard input; texts, and JSON with why each has ended."""
  file = tmp_path / "chats.jsonl"
  chats = [CHAT, [{"role": "user", "content": "What?"}]]
  file.write_text("\n".join(json.dumps({"messages": messages}) for messages in chats))
  generator = chat_of(chat_folder, chats)
  expected = answers(generator)
  words = ["generate", str(chat_folder), *SIZES, "--max-tokens", str(TOKENS), "--batch-size", str(SLOTS)]
  done = CliRunner().invoke(app, [*words, "--chat", str(file)])
  assert done.stdout == f"==> 1 of 2 <==\n{expected[0][0]}\n==> 2 of 2 <==\n{expected[1][0]}\n", done.output
  done = CliRunner().invoke(app, [*words, "--chat", "-", "--json"], input=json.dumps(CHAT))
  text, tokens, reason = expected[0]
  found = {"messages": CHAT, "text": text, "completion_tokens": tokens, "finish_reason": reason}
  assert json.loads(done.stdout) == found, done.output
  done = CliRunner().invoke(app, [*words, "--prompt", "-", "--json"], input="Hi")
  assert json.loads(done.stdout)["prompt"] == "Hi"
  done = CliRunner().invoke(app, [*words, "--prompt", "Hi"])
  assert done.stdout == "Hi" + answers(made(["Hi"], folder=chat_folder))[0][0] + "\n"


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_typed_command(engines, chat_folder, capsys):
  request = command.Request(chat_folder, SIZES, (), "-", None, None, None, OPTIONS, as_json=False)
  shown = io.StringIO()
  command.run(request, Terminal("Hi\n"), shown)  # the end of the input is that of the conversation
  assert shown.getvalue() == answers(chat_of(chat_folder))[0][0] + "\n"
  assert chat_loop.HELP in capsys.readouterr().err
  with pytest.raises(command.OptionError, match="--json: a typed conversation is printed as it comes"):
    command.run(dataclasses.replace(request, as_json=True), Terminal(""), shown)


def test_chat_settings_of_maxtext_act_or_are_refused(engines, chat_folder):
  with pytest.raises(SavedModelError, match="use_chat_template=true: a --prompt is taken as it is; pass --chat"):
    Generator(chat_folder, OPTIONS, ["Hi"], overrides=["use_chat_template=true"])
  with pytest.raises(SavedModelError, match="chat_template=x: not read here; pass --chat-template"):
    Generator(chat_folder, OPTIONS, [CHAT], overrides=["chat_template=x"], chat=True)


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


def end_tokens(eos, *folders):
  """With a tokenizer of this end token, and 10 tokens."""
  return saved_model.end_tokens(SimpleNamespace(eos_id=eos), 10, *folders)


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
  assert end_tokens(tokenizer, folder, None, tmp_path / "nowhere") == expected


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
    end_tokens(2, folder)
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
    end_tokens(2, folder)


def test_text_ends_at_each_end_token(tmp_path, engines, greedy):
  """Of the folder, and of a folder with a tokenizer."""
  tokens = Letters().encode(greedy)
  place = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
  folder = tmp_path / "hf"
  shutil.copytree(FOLDER, folder)
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [383, tokens[place]]}))
  ended = text_of(tokens[:place])
  assert answers(made([PROMPT], folder=folder))[0] == (ended, place, "stop")
  assert answers(made([PROMPT], tokenizer=folder))[0] == (ended, place, "stop")


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
  for options, message in [
    ({"top_p": 0.0}, "--top-p 0"),
    ({"top_k": -1}, "--top-k -1: not a number of tokens"),
    ({"top_k": 3}, "--temperature 0.0 --top-k 3 .* without a temperature the most likely token is taken"),
    ({"top_k": 385, "temperature": 1.0}, "--top-k 385: the model has 384 tokens"),
    ({"stop": ["a", ""]}, "--stop '': every text begins with it"),
    ({"batch_size": 0}, "--batch-size 0"),
  ]:
    with pytest.raises(SavedModelError, match=message):
      list(generate.generate(FOLDER, "a", 1, **options))
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
