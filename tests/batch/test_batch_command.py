"""`maxtext-ling2 batch`: what it prints of conversations and of Megatron files, and its errors."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from chat_data import CHATS, tokenizer, write
from maxtext_ling2.batch import read, show
from maxtext_ling2.cli import app
from maxtext_ling2.demo import data
from maxtext_ling2.maxtext_api import overrides

RUNNER = CliRunner()
COMMON = {"model_name": "ling2-tiny", "override_model_config": True, "hardware": "cpu", "per_device_batch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """The settings of a fine-tuning on two conversations."""
  folder = tmp_path_factory.mktemp("chats")
  tokenizer("ling").save_pretrained(folder / "tokenizer")
  settings = {
    **COMMON,
    "use_sft": True,
    "sft_train_on_completion_only": True,
    "dataset_type": "grain",
    "grain_file_type": "parquet",
    "grain_train_files": str(write(folder, [CHATS["two"], CHATS["one, system"]], "parquet")),
    "grain_worker_count": 0,
    "train_data_columns": ["messages"],
    "enable_data_shuffling": False,
    "tokenizer_type": "huggingface",
    "tokenizer_path": str(folder / "tokenizer"),
    "packing": False,
    "max_target_length": 100,
    "num_epoch": 1,
  }
  return overrides.words(settings)


@pytest.fixture(scope="module")
def batch(words):
  return read.read(words)


TEXTS = [
  "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>What is 1 and 1?<|role_end|>"
  "<role>ASSISTANT</role>{+It is 2.<|role_end|>+}<role>HUMAN</role>And one more?<|role_end|>"
  "<role>ASSISTANT</role>{+3.<|role_end|>+}",
  "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|><role>HUMAN</role>What is 1 and 1?<|role_end|>"
  "<role>ASSISTANT</role>{+It is 2.<|role_end|>+}",
]


def printed(batch, ids=False, **console):
  """Lines as the command prints them on a console."""
  file = io.StringIO()
  show.print_lines(Console(file=file, soft_wrap=True, highlight=False, width=100, **console), batch, 4, ids)
  return file.getvalue()


def test_text_with_marks(batch):
  first, second = ((batch.segments[row] != 0).sum() for row in range(2))
  counted = [batch.trained[row].sum() for row in range(2)]
  assert printed(batch).splitlines() == [
    f"step 0: 2 rows of 100 tokens; the loss is on {sum(counted)} of 200 targets ({sum(counted) / 200:.1%}); "
    f"{200 - first - second} tokens are padding ({1 - (first + second) / 200:.1%})",
    f"text by the tokenizer {batch.tokenizer_path}",
    f"row 0, segment 1: tokens 0-{first - 1}, positions 0-{first - 1}, loss on {counted[0]}",
    TEXTS[0],
    f"row 0, tokens {first}-99: padding",
    f"row 1, segment 1: tokens 0-{second - 1}, positions 0-{second - 1}, loss on {counted[1]}",
    *TEXTS[1].splitlines(),
    f"row 1, tokens {second}-99: padding",
  ]


def test_colour_on_a_terminal(batch):
  text = printed(batch, force_terminal=True, color_system="standard", no_color=False)
  assert "\x1b[1;32mIt is 2.<|role_end|>\x1b[0m<role>HUMAN</role>" in text and "{+" not in text
  plain = printed(batch, force_terminal=True, no_color=True)
  assert "{+It is 2.<|role_end|>+}" in plain


def test_a_line_per_token(batch):
  lines = [line for line in printed(batch, ids=True).splitlines() if " -> " in line]
  assert len(lines) == 200 and sum(line.endswith("  loss") for line in lines) == batch.trained.sum()
  built = tokenizer("ling")
  place = int(np.flatnonzero(batch.trained[0])[0])  # the last token of the prompt, which predicts the answer's first
  token, target = batch.inputs[0, place], batch.targets[0, place]
  texts = [repr(built.decode([int(one)])) for one in (token, target)]
  assert texts == ["'</role>'", "'It'"]
  expected = f"{place:6} segment 1 position {place}: {token} {texts[0]} -> {target} {texts[1]}  loss"
  assert lines[place] == expected


def test_json_of_the_command(words, batch):
  done = RUNNER.invoke(app, ["batch", *words, "--json", "--rows", "1"])
  assert done.exit_code == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["shape"] == [2, 100] and found["loss_tokens"] == batch.trained.sum() and len(found["rows"]) == 1
  row = found["rows"][0]
  assert row["texts"] == TEXTS[:1]
  for name, array in {
    "inputs": batch.inputs,
    "targets": batch.targets,
    "segments": batch.segments,
    "positions": batch.positions,
    "loss": batch.trained,
  }.items():
    assert row[name] == array[0].tolist(), name


def test_rows_left_out_are_counted(words):
  done = RUNNER.invoke(app, ["batch", *words, "--rows", "1"])
  assert done.exit_code == 0 and done.stdout.endswith("1 more rows; --rows 2 shows all\n")
  assert TEXTS[0] in done.stdout and "row 1" not in done.stdout


def test_the_trainers_warning_is_given(words, caplog):
  from maxtext_ling2.configs import validation

  validation._warn_once.cache_clear()
  read.read([*words, "sft_train_on_completion_only=false"])
  (line,) = (message for message in caplog.messages if "sft_train_on_completion_only" in message)
  assert "the loss is on all tokens" in line and "set sft_train_on_completion_only=true" in line and "\n" not in line


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
  """The settings of a pre-training on a Megatron file, from a base YAML file."""
  folder = tmp_path_factory.mktemp("documents")
  data.write([np.array([*range(10 * i, 10 * i + 9), 2], np.uint16) for i in range(1, 7)], folder / "documents")
  settings = {
    **COMMON,
    "dataset_type": "grain",
    "grain_file_type": "mmap_npy",
    "grain_train_files": f"{folder / 'index'}|{folder / 'documents'}",
    "grain_worker_count": 0,
    "mmap_eod_id": 2,
    "eod_mask_loss": True,
    "max_target_length": 12,
    "steps": 1,
    "tokenizer_path": "none",
  }
  lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())
  (folder / "run.yml").write_text(f"base_config: base.yml\n{lines}")
  return folder / "run.yml"


def test_pre_training_without_a_tokenizer(documents):
  """Rows of 12 tokens, in which documents end with 2: a row's last target is no input of it."""
  found = read.read([str(documents)])
  assert found.tokenizer is None and found.inputs.shape == (2, 12)
  text = printed(found)
  assert f"token ids, as the tokenizer {found.tokenizer_path} cannot be opened (" in text and "pass --tokenizer" in text
  row, counted = found.inputs[0].tolist(), [False, *found.trained[0].tolist()]
  (end,) = (place for place, token in enumerate(row) if token == 2) if row.count(2) == 1 else (row.index(2),)
  ids = "".join(f"{token} " for token in row[1 : end + 1])
  assert f"{row[0]} {{+{ids}+}}" in text  # the EOD is a target, the token after it is none
  assert not counted[end + 1]
  assert f"the last token's target: {{+{found.targets[0, -1]} +}}" in text


def test_another_tokenizer_can_be_named(documents):
  found = read.read([str(documents)], tokenizer=data.tokenizer_file())
  assert found.tokenizer is not None and "cannot be opened" not in printed(found)
  with pytest.raises(read.BatchError, match="--tokenizer .*not a tokenizer that sentencepiece can read"):
    read.read([str(documents)], tokenizer=documents)


def test_the_batch_of_a_step(documents):
  """Each step has its own, in the trainer's order."""
  first, second = (read.read([str(documents), "steps=2"], step) for step in range(2))
  assert (first.inputs != second.inputs).any() and second.step == 1


REFUSED = {
  "past the end": (["--step", "7"], ["--step 7", "the data ends after 1 batches of 2 rows"]),
  "no evaluation": (["--eval"], ["--eval: eval_interval=-1", "set eval_interval"]),
  "no file": (["grain_train_files=/nowhere.parquet"], ["data pipeline fails with dataset_type=grain", "correct"]),
  "a column": (["train_data_columns=['text']"], ["data pipeline fails", "text"]),
  "a word": (["nonsense"], ["'nonsense': not a setting of MaxText; write KEY=VALUE"]),
  "refused": (["group_norm_size=3"], ["MaxText refuses this configuration"]),
  "no tokenizer": (["tokenizer_path=/nowhere"], ["data pipeline fails", "/nowhere"]),
}


@pytest.mark.parametrize(("more", "expected"), REFUSED.values(), ids=REFUSED)
def test_refused(words, more, expected, monkeypatch):
  if more[0].startswith("group_norm"):
    from maxtext.configs import pyconfig

    monkeypatch.setattr(pyconfig, "initialize", lambda *_, **__: (_ for _ in ()).throw(SystemExit(2)))
  done = RUNNER.invoke(app, ["batch", *words, *more])
  text = " ".join(done.stderr.split())
  assert done.exit_code == 1 and done.stdout == "" and "error: " in text
  for word in expected:
    assert word in text


def test_a_missing_yaml_file_is_named():
  with pytest.raises(read.BatchError, match="nowhere.yml: there is no such file; pass a base YAML file"):
    read.read(["nowhere.yml", "steps=1"])


def test_pairs_of_dpo_are_refused(words):
  with pytest.raises(read.BatchError, match="use_dpo=true: .* pairs of answers; .* leave it out"):
    read.read([*words, "use_sft=false", "use_dpo=true"])


def test_stretches():
  assert show.stretches(np.array([1, 1, 2, 0, 0])) == [(0, 2), (2, 3), (3, 5)]
  assert show.stretches(np.array([1])) == [(0, 1)]
