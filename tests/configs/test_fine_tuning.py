"""A LING2 run on conversations is told, once, when the loss is on more than the assistant's tokens."""

import logging
import types

import pytest

from maxtext_ling2.configs import fine_tuning, validation
from maxtext_ling2.maxtext_api import session

FIELD = "sft_train_on_completion_only"


@pytest.fixture(autouse=True)
def not_yet_said():
  validation._warn_once.cache_clear()


def said(caplog, *runs):
  """The warnings about the field in configs made one after the other."""
  with caplog.at_level(logging.WARNING, "maxtext_ling2"):
    for run in runs:
      session.make_config(**{"model_name": "ling2-tiny", **run})
  return [message for message in caplog.messages if FIELD in message]


def test_said_once_in_one_line(caplog):
  """False is the default of MaxText's base.yml."""
  (line,) = said(caplog, {"use_sft": True}, {"use_sft": True, FIELD: False})
  assert line.startswith(f"{FIELD}=False") and "\n" not in line
  assert "all tokens of a conversation" in line and f"set {FIELD}=true" in line


@pytest.mark.parametrize(
  "run",
  [{"use_sft": True, FIELD: True}, {"use_sft": False}, {"use_sft": True, "model_name": "default"}],
  ids=["on the assistant's", "pre-training", "another model"],
)
def test_nothing_is_said(caplog, run):
  assert said(caplog, run) == []


def problems(**settings):
  given = {"use_sft": True, "dataset_type": "hf", "chat_template_path": "", "chat_template": "", **settings}
  return list(fine_tuning.problems(types.SimpleNamespace(**given)))


def test_a_template_file_must_be_one_that_maxtext_reads(tmp_path):
  from maxtext.input_pipeline import instruction_data_processing

  for name, read in {"a.jinja": True, "a.json": True, "a.html": False}.items():
    file = tmp_path / name
    file.write_text('{"chat_template": "ours"}')
    found = instruction_data_processing.load_chat_template_from_file(str(file))
    assert (found is not None) == read == (problems(chat_template_path=str(file)) == [])
  (line,) = problems(chat_template_path="a.jinja")
  assert line.startswith("chat_template_path='a.jinja'") and "pass the absolute path" in line
  assert instruction_data_processing.load_chat_template_from_file("a.jinja") is None
  assert problems(chat_template_path="a.jinja", chat_template="ours") == []  # which wins in MaxText
  assert problems(chat_template_path="a.jinja", use_sft=False) == []
  (line,) = problems(chat_template_path=str(tmp_path / "a.jinja"), dataset_type="grain")
  assert "grain does not read it" in line


@pytest.mark.parametrize("kind", ["tfds", "c4_mlperf", "olmo_grain"])
def test_other_data_has_no_conversations(kind):
  (line,) = problems(dataset_type=kind)
  assert line.startswith(f"dataset_type='{kind}'") and "hf or grain" in line
  assert problems(dataset_type=kind, use_sft=False) == []
