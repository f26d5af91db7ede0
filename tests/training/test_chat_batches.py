"""Batches of conversations from MaxText's two pipelines: packed, unpacked, truncated, and stock models' untouched."""

import numpy as np
import pytest

import tiny
from chat_data import CHATS, MARKED, SYSTEM, marked, says, tokenizer, write
from maxtext_ling2 import plugin
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.training.chats import ChatError

LENGTH = 160
ORDER = ("two", "one, system", "three", "three, system", "one", "two, system")
"""The conversations of a file."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
  """A function: name -> folder of the tokenizer."""
  folder = tmp_path_factory.mktemp("tokenizers")
  for name in MARKED:
    tokenizer(name).save_pretrained(folder / name)
  return folder


@pytest.fixture(scope="module", autouse=True)
def no_cache_elsewhere(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield


def stock(**settings):
  return session.make_config(**{"model_name": "default", **settings})


def config(folder, conversations, kind, tokenizer_path, make=tiny.config, **settings):
  """The config of a run on a file of conversations, which is written."""
  file = write(folder, conversations, "json" if kind == "hf" else "parquet")
  source = {"hf_path": "json", "hf_train_files": str(file)} if kind == "hf" else {"grain_train_files": str(file)}
  return make(
    **{
      "dataset_type": kind,
      "grain_file_type": "parquet",
      "grain_worker_count": 0,
      "train_split": "train",
      "train_data_columns": ["messages"],
      "tokenizer_type": "huggingface",
      "tokenizer_path": str(tokenizer_path),
      "enable_data_shuffling": False,
      "use_sft": True,
      "sft_train_on_completion_only": True,
      "max_target_length": LENGTH,
      "per_device_batch_size": 2,
      "vocab_size": 512,
      "num_epoch": 1,
      **source,
      **settings,
    }
  )


def batches(cfg, number):
  """The first batches as the trainer gets them."""
  from maxtext.input_pipeline import input_pipeline_interface

  with session.model_context(cfg, mesh := session.make_mesh(cfg)):
    iterator, _ = input_pipeline_interface.create_data_iterator(cfg, mesh)
    return [{name: np.asarray(value) for name, value in next(iterator).items()} for _ in range(number)]


def expected(chats, length, pad):
  """A row by hand: of (ids, loss mask) of each conversation. A target that is not trained is of segment 0."""
  row = {name: [] for name in ("inputs", "trained", "inputs_segmentation", "inputs_position")}
  for number, (ids, mask) in enumerate(chats, 1):
    row["inputs"] += ids
    row["trained"] += mask
    row["inputs_segmentation"] += [number] * len(ids)
    row["inputs_position"] += range(len(ids))
  for name, filling in {"inputs": pad, "trained": False, "inputs_segmentation": 0, "inputs_position": None}.items():
    missing = length - len(row[name])
    row[name] += [filling] * missing if filling is not None else list(range(len(row[name]), length))
    row[name] = np.array(row[name][:length])
  return row


def check(batch, index, row, packed):
  """Compares row `index` of a batch with one by hand."""
  np.testing.assert_array_equal(batch["inputs"][index], row["inputs"])
  np.testing.assert_array_equal(batch["inputs_segmentation"][index], row["inputs_segmentation"])
  real = row["inputs_segmentation"] > 0
  np.testing.assert_array_equal(batch["inputs_position"][index][real], row["inputs_position"][real])
  trained = np.append(row["trained"][1:], False)
  np.testing.assert_array_equal(batch["targets_segmentation"][index] != 0, trained)
  np.testing.assert_array_equal(batch["targets"][index][trained], np.append(row["inputs"][1:], 0)[trained])


@pytest.mark.parametrize("kind", ["hf", "grain"])
@pytest.mark.parametrize("name", ["ling", "chatml"])
def test_unpacked_rows(tmp_path, tokenizers, name, kind):
  """One conversation per row; the last batch has the longest, truncated within its second answer."""
  built, pad = tokenizer(name), tokenizer(name).pad_token_id
  cfg = config(tmp_path, [CHATS[chat] for chat in ORDER], kind, tokenizers / name, packing=False)
  found = batches(cfg, len(ORDER) // 2)
  for place, chat in enumerate(ORDER):
    ids, mask = marked(built, MARKED[name][chat])
    assert len(ids) < LENGTH and any(mask)
    check(found[place // 2], place % 2, expected([(ids, mask)], LENGTH, pad), packed=False)


@pytest.mark.parametrize("kind", ["hf", "grain"])
def test_truncated_rows(tmp_path, tokenizers, kind):
  built = tokenizer("ling")
  ids, mask = marked(built, MARKED["ling"]["three, system"])
  (end,) = [place for place in range(1, len(ids)) if mask[place] and not mask[place - 1]][1:2]
  cut = end + 3  # within the second answer
  cfg = config(tmp_path, [CHATS["three, system"]] * 2, kind, tokenizers / "ling", packing=False, max_target_length=cut)
  (batch,) = batches(cfg, 1)
  for index in range(2):
    check(batch, index, expected([(ids, mask)], cut, built.pad_token_id), packed=False)
  assert (batch["targets_segmentation"][0] != 0).sum() == sum(mask[:cut])


@pytest.mark.parametrize("kind", ["hf", "grain"])
@pytest.mark.parametrize("name", ["ling", "chatml", "llama"])
def test_packed_rows(tmp_path, tokenizers, name, kind):
  """Whole conversations in a row: here two rows of three."""
  built = tokenizer(name)
  pieces = [marked(built, MARKED[name][chat]) for chat in ORDER]
  length = max(sum(len(ids) for ids, _ in pieces[:3]), sum(len(ids) for ids, _ in pieces[3:]))
  assert length < sum(len(ids) for ids, _ in pieces[:3]) + min(len(ids) for ids, _ in pieces)
  chats = [CHATS[chat] for chat in ORDER]
  cfg = config(tmp_path, chats, kind, tokenizers / name, packing=True, max_target_length=length)
  (batch,) = batches(cfg, 1)
  for index in range(2):
    check(batch, index, expected(pieces[3 * index : 3 * index + 3], length, 0), packed=True)


@pytest.mark.parametrize("kind", ["hf", "grain"])
def test_all_tokens_are_trained_if_asked(tmp_path, tokenizers, kind):
  built = tokenizer("ling")
  settings = {"sft_train_on_completion_only": False, "packing": False}
  (batch,) = batches(config(tmp_path, [CHATS["two, system"]] * 2, kind, tokenizers / "ling", **settings), 1)
  ids, _ = marked(built, MARKED["ling"]["two, system"])
  check(batch, 0, expected([(ids, [True] * len(ids))], LENGTH, built.pad_token_id), packed=False)


SINGLE = [CHATS["one"], CHATS["one, system"], says("Red?", "No, not green.\n\nYes."), says("Blue", "", system=SYSTEM)]


def equal(found, others):
  for one, other in zip(found, others, strict=True):
    assert set(one) == set(other)
    for name, value in other.items():
      np.testing.assert_array_equal(one[name], value, err_msg=name)


@pytest.mark.parametrize("kind", ["hf", "grain"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("name", ["ling", "chatml", "thinking"])
def test_chats_of_one_round_are_as_maxtexts(tmp_path, tokenizers, name, packing, kind):
  """Except that its pipeline of grain puts BOS and EOS around each piece, unless it is told not to."""
  plain = {"packing": packing, "add_bos": False, "add_eos": False}
  ling2, other = (
    batches(config(tmp_path, SINGLE, kind, tokenizers / name, make=make, **plain), 1) for make in (tiny.config, stock)
  )
  equal(ling2, other)
  assert (ling2[0]["targets_segmentation"] != 0).any()


@pytest.mark.parametrize("kind", ["hf", "grain"])
def test_bos_and_eos_are_the_templates(tmp_path, tokenizers, kind):
  with_both, without = (
    config(tmp_path, SINGLE, kind, tokenizers / "llama", packing=False, add_bos=value, add_eos=value)
    for value in (True, False)
  )
  equal(batches(with_both, 1), batches(without, 1))


@pytest.mark.parametrize("kind", ["hf", "grain"])
def test_stock_models_read_what_they_read_without_the_plugin(tmp_path, tokenizers, kind):
  """Also that it is not what LING2 reads."""
  chats = [CHATS[chat] for chat in ORDER]
  cfg = config(tmp_path, chats, kind, tokenizers / "ling", make=stock, packing=True, max_target_length=400)
  found = batches(cfg, 1)
  registry = plugin.REGISTRY
  assert registry.undo() == []
  try:
    others = batches(cfg, 1)
  finally:
    registry.install()
    registry.complete()
  equal(found, others)
  ours = batches(config(tmp_path, chats, kind, tokenizers / "ling", packing=True, max_target_length=400), 1)
  assert (ours[0]["inputs"] != found[0]["inputs"]).any()


PAIRS = {"prompt": says("Red?", system=SYSTEM), "completion": says("", "No.")[1:]}
TEXTS = {"prompt": "Red?", "completion": "No."}


@pytest.mark.parametrize(
  ("kind", "row"),
  [("hf", PAIRS), ("grain", PAIRS), ("grain", TEXTS), ("hf", {"question": "Red?", "answer": "No."})],
  ids=["hf", "grain", "texts", "questions"],
)
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
def test_two_columns(tmp_path, tokenizers, kind, row, turned):
  columns = list(row)[:: -1 if turned else 1]
  cfg = config(tmp_path, [row] * 2, kind, tokenizers / "ling", packing=False, train_data_columns=columns)
  (batch,) = batches(cfg, 1)
  system = f"{SYSTEM}\n" if row is PAIRS else ""
  text = f"<role>SYSTEM</role>{system}detailed thinking off<|role_end|><role>HUMAN</role>Red?<|role_end|>"
  chat = marked(tokenizer("ling"), f"{text}<role>ASSISTANT</role>⟦No.<|role_end|>⟧")
  check(batch, 0, expected([chat], LENGTH, 0), packed=False)


def test_calls_of_tools_are_read_from_a_file(tmp_path, tokenizers):
  """Arrow gives every message the keys of all."""
  call = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
  said = [says("A")[0], {"role": "assistant", "content": None, "tool_calls": call}, {"role": "tool", "content": "3"}]
  text = (
    "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>A<|role_end|><role>ASSISTANT</role>"
    "⟦<tool_call>add</tool_call><|role_end|>⟧<role>OBSERVATION</role><tool_response>3</tool_response><|role_end|>"
    "<role>ASSISTANT</role>⟦B<|role_end|>⟧"
  )
  for kind in ("hf", "grain"):
    cfg = config(tmp_path / kind, [[*said, says("", "B")[1]]] * 2, kind, tokenizers / "ling", packing=False)
    (batch,) = batches(cfg, 1)
    check(batch, 0, expected([marked(tokenizer("ling"), text)], LENGTH, 0), packed=False)


def test_keys_that_maxtext_would_drop_are_refused(tmp_path, tokenizers):
  call = {"role": "assistant", "content": "A", "tool_calls": [{"function": {"name": "add"}}]}
  row = {"prompt": says("Red?"), "completion": [call]}
  cfg = config(tmp_path, [row] * 2, "hf", tokenizers / "ling", packing=False, train_data_columns=["prompt", "completion"])
  with pytest.raises(ChatError, match="columns prompt and completion: messages have tool_calls"):
    batches(cfg, 1)


def test_a_template_of_the_settings_wins(tmp_path, tokenizers):
  from chat_data import TEMPLATES

  cfg = {"chat_template": TEMPLATES["chatml"], "packing": False}
  for kind in ("hf", "grain"):
    (batch,) = batches(config(tmp_path / kind, [CHATS["two"]] * 2, kind, tokenizers / "ling", **cfg), 1)
    check(batch, 0, expected([marked(tokenizer("chatml"), MARKED["chatml"]["two"])], LENGTH, 0), packed=False)


@pytest.mark.parametrize("kind", ["hf", "grain"])
def test_a_run_ends_at_a_conversation_that_cannot_be_read(tmp_path, tokenizers, kind):
  """MaxText's trainers would log the error, and end as if the data had ended."""
  from maxtext.common.data_loader import DataLoader
  from maxtext.input_pipeline import input_pipeline_interface

  bad = [CHATS["one"], [*CHATS["one"], {"role": "function", "content": "3"}]]
  cfg = config(tmp_path, bad, kind, tokenizers / "ling", packing=False)
  with session.model_context(cfg, mesh := session.make_mesh(cfg)):
    iterator, _ = input_pipeline_interface.create_data_iterator(cfg, mesh)
    loader = DataLoader(cfg, mesh, iterator, None)
    with pytest.raises(SystemExit) as ended:
      loader.load_next_batch()
  assert "'What is 1 and 1?' (3 messages: user, assistant, function)" in str(ended.value)
  assert str(tokenizers / "ling") in str(ended.value) and "loses content of message 2" in str(ended.value)


def test_the_end_of_the_data_is_maxtexts(tmp_path, tokenizers):
  from maxtext.common.data_loader import DataLoader
  from maxtext.input_pipeline import input_pipeline_interface
  from maxtext.utils.exceptions import StopTraining

  cfg = config(tmp_path, [CHATS["one"]] * 2, "grain", tokenizers / "ling", packing=False)
  with session.model_context(cfg, mesh := session.make_mesh(cfg)):
    iterator, _ = input_pipeline_interface.create_data_iterator(cfg, mesh)
    loader = DataLoader(cfg, mesh, iterator, None)
    loader.load_next_batch()
    with pytest.raises(StopTraining, match="run out of training data"):
      loader.load_next_batch()
