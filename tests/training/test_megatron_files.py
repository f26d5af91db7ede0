"""Megatron files that are wrong, or do not belong to the settings or to their index folder: what a LING2 run says.

The pipeline's pieces are asked directly, as MaxText calls them; one run of the trainer shows exit code and text.
"""

import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

import tiny
from maxtext_ling2.demo import data
from maxtext_ling2.errors import DataError
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.training import megatron_checks
from training.stock_runs import SMALL

EOD, LENGTH, ROWS, VOCABULARY = data.EOD, 24, 4, 64
CODES = {np.dtype(kind): code for code, kind in ((1, "u1"), (4, "i4"), (5, "i8"), (7, "f4"), (8, "u2"))}


@pytest.fixture(autouse=True, scope="module")
def parsed_flags():
  """Grain reads them where it starts processes; MaxText's trainer has absl parse them."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["test"])


def write(prefix, documents, dtype="i4", sequences=1):
  """Files as Megatron's IndexedDatasetBuilder writes them, in any dtype, each document in so many sequences."""
  kind = np.dtype(dtype)
  parts = [part for document in documents for part in np.array_split(np.array(document, kind), sequences)]
  lengths = [len(part) for part in parts]
  prefix.with_suffix(".bin").write_bytes(b"".join(part.tobytes() for part in parts))
  starts = np.cumsum([0, *lengths[:-1]]) * kind.itemsize if lengths else []
  header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[kind], len(lengths), len(documents) + 1)
  arrays = (np.array(lengths, "<i4"), np.array(starts, "<i8"), np.arange(len(documents) + 1, dtype="<i8") * sequences)
  prefix.with_suffix(".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
  return prefix


def documents(seed=0, number=40):
  """Of 3 to 30 tokens with the EOD."""
  rng = np.random.default_rng(seed)
  return [[*map(int, rng.integers(3, VOCABULARY, rng.integers(2, 30))), EOD] for _ in range(number)]


def config(files, kind, make=tiny.config, **settings):
  given = {
    "max_target_length": LENGTH, "dataset_type": "grain", "grain_file_type": kind, "grain_train_files": str(files),
    "grain_worker_count": 0, "mmap_eod_id": EOD, "data_shuffle_seed": 7, "steps": 1, "per_device_batch_size": ROWS,
    "packing": True, "packing_max_segments_per_sample": 0, "enable_data_shuffling": False,
  }  # fmt: skip
  return make(**given | settings)


def stock(**settings):
  return session.make_config(**{"model_name": "default", "vocab_size": VOCABULARY, **settings})


def iterators(cfg):
  from maxtext.input_pipeline import input_pipeline_interface

  with session.model_context(cfg, mesh := session.make_mesh(cfg)):
    return input_pipeline_interface.create_data_iterator(cfg, mesh)


def refusal(cfg, batches=0):
  """The text that opening the files, or reading so many batches, ends with."""
  with pytest.raises(DataError) as error:
    iterator, _ = iterators(cfg)
    for _ in range(batches):
      next(iterator)
  return str(error.value)


def spec(kind, prefix):
  return str(prefix) if kind == "mmap" else f"{prefix.parent}/index|{prefix}"


KINDS = pytest.mark.parametrize("kind", ["mmap", "mmap_npy"])


# --- token ids


@KINDS
@pytest.mark.parametrize(("token", "dtype"), [(64, "u2"), (-1, "i4"), (2**32 + 5, "i8")])
def test_an_id_out_of_the_vocabulary_in_the_sample(tmp_path, kind, token, dtype):
  """The first document is in the sample, so that nothing is read as a row."""
  found = documents()
  found[0][1] = token
  text = refusal(config(spec(kind, write(tmp_path / "web", found, dtype)), kind))
  assert text == (
    f"document 0 (from 0) of {tmp_path}/web.bin: token id {token} at position 1 is not in the vocabulary, whose ids are "
    "0 to vocab_size - 1 = 63, and JAX would take another one in silence; take files made with the model's tokenizer, or "
    "set vocab_size"
  )


@KINDS
def test_an_id_out_of_the_vocabulary_as_its_row_is_read(tmp_path, kind):
  """Document 1 of 40 is not in the sample of 20."""
  found = documents()
  found[1][0] = 64
  cfg = config(spec(kind, write(tmp_path / "web", found)), kind)
  iterators(cfg)
  assert refusal(cfg, 8).startswith(f"document 1 (from 0) of {tmp_path}/web.bin: token id 64 at position 0 is not")


@KINDS
def test_the_largest_id_is_read(tmp_path, kind):
  found = [[63] * 30 + [EOD]] * 10
  iterator, _ = iterators(config(spec(kind, write(tmp_path / "web", found)), kind))
  assert np.asarray(next(iterator)["inputs"]).max() == 63


def test_the_file_among_several(tmp_path):
  """A folder of files: their documents are numbered through, the text has the number in the file."""
  found = documents(number=10)
  found[3][0] = 99
  write(tmp_path / "a", documents(1, 7))
  write(tmp_path / "b", found)
  assert refusal(config(tmp_path, "mmap"), 12).startswith(f"document 3 (from 0) of {tmp_path}/b.bin: token id 99 ")


def test_sentences_of_a_document(tmp_path):
  found = documents()
  found[0][-2] = 70
  settings = {"mmap_split_sentences": True}
  text = refusal(config(write(tmp_path / "web", found, sequences=2), "mmap", **settings))
  assert text.startswith(f"document 0 (from 0) of {tmp_path}/web.bin: token id 70 at position {len(found[0]) - 2} ")


@KINDS
def test_the_second_of_a_blend(tmp_path, kind):
  found = documents(1)
  found[5][0] = 64
  names = [write(tmp_path / "a", documents()), write(tmp_path / "b", found)]
  files = ";".join(f"{tmp_path}/{name.name}_index|{name},0.5" if kind == "mmap_npy" else f"{name},0.5" for name in names)
  assert refusal(config(files, kind, steps=20), 20).startswith(f"document 5 (from 0) of {tmp_path}/b.bin: token id 64 ")


@KINDS
def test_in_evaluation(tmp_path, kind):
  found = documents(1)
  found[1][0] = 64
  names = [write(tmp_path / "a", documents()), write(tmp_path / "b", found)]
  cfg = config(
    spec(kind, names[0]), kind, grain_eval_files=spec(kind, names[1]), eval_interval=1, eval_steps=9,
    grain_worker_count_eval=0,
  )  # fmt: skip
  _, iterator = iterators(cfg)
  with pytest.raises(DataError, match=re.escape(f"document 1 (from 0) of {tmp_path}/b.bin: token id 64 ")):
    list(iterator)


def test_a_worker_process_tells_the_trainer(tmp_path):
  """The error's class survives the way from grain's process; `mmap` is the trainer's, below."""
  found = documents()
  found[1][0] = 64
  cfg = config(spec("mmap_npy", write(tmp_path / "web", found)), "mmap_npy", grain_worker_count=1)
  assert refusal(cfg, 8).startswith(f"document 1 (from 0) of {tmp_path}/web.bin: token id 64 at position 0 is not")


@KINDS
def test_stock_models_read_what_they_read(tmp_path, kind):
  found = documents()
  found[0][1] = 99
  iterator, _ = iterators(config(spec(kind, write(tmp_path / "web", found)), kind, make=stock))
  assert any((np.asarray(next(iterator)["inputs"]) == 99).any() for _ in range(4))


# --- the index folder


def indexed(tmp_path, **settings):
  """A config whose index folder is made."""
  cfg = config(spec("mmap_npy", write(tmp_path / "web", documents())), "mmap_npy", **settings)
  iterators(cfg)
  return cfg


def other_contents(tmp_path, why):
  return (
    f"{tmp_path}/index: this index folder was made when {tmp_path}/web had other contents ({why}), so rows would be cut "
    "in wrong places and filled up with EODs; delete the folder, which MaxText then makes again, or name another one"
  )


def test_an_index_of_more_documents(tmp_path):
  cfg = indexed(tmp_path)
  tokens = sum(map(len, found := documents()[:30]))
  write(tmp_path / "web", found)
  why = f"it lists 40 documents, of 30 documents with {tokens} tokens per epoch"
  assert refusal(cfg) == other_contents(tmp_path, why)


def test_an_index_of_other_lengths(tmp_path):
  """As many documents and tokens as before, in another order."""
  cfg = indexed(tmp_path)
  write(tmp_path / "web", documents()[::-1])
  text = refusal(cfg)
  why = re.search(r"\((its row \d+ has \d+ tokens here, not 24)\)", text)
  assert why and text == other_contents(tmp_path, why[1])


def test_an_index_of_other_lengths_beyond_the_sample(tmp_path, monkeypatch):
  """No row is looked at when the run starts; one that does not fit is found as it is read."""
  monkeypatch.setattr(megatron_checks, "SAMPLED_ROWS", 0)
  cfg = indexed(tmp_path)
  write(tmp_path / "web", documents()[::-1])
  assert re.search(r"had other contents \(a row has \d+ tokens, not 25\)", refusal(cfg, 8))


def test_an_index_of_the_same_lengths_is_right(tmp_path):
  """It depends on nothing else; MaxText's rows are those of the new contents."""
  cfg = indexed(tmp_path)
  found = [[token if token == EOD else 66 - token for token in document] for document in documents()]
  write(tmp_path / "web", found)
  (batch, _), fresh = iterators(cfg), config(f"{tmp_path}/fresh|{tmp_path}/web", "mmap_npy")
  np.testing.assert_array_equal(next(batch)["inputs"], next(iterators(fresh)[0])["inputs"])


@pytest.mark.parametrize("settings", [{}, {"steps": 12}, {"mmap_npy_split": "70,30", "steps": 6}], ids=str)
def test_an_index_that_was_made_is_found_right(tmp_path, settings):
  """Of one epoch and of several, of all documents and of a part."""
  cfg = indexed(tmp_path, **settings)
  files = sorted(path.name for path in (tmp_path / "index").iterdir())
  assert len(files) == 4 and json.loads((tmp_path / "index" / files[1]).read_text())["num_epochs"] >= 1
  assert np.asarray(next(iterators(cfg)[0])["inputs"]).shape == (ROWS, LENGTH)
  assert sorted(path.name for path in (tmp_path / "index").iterdir()) == files


def test_an_index_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  text = refusal(config(f"{tmp_path}/file/index|{write(tmp_path / 'web', documents())}", "mmap_npy"))
  assert text == (
    f"{tmp_path}/file/index: MaxText cannot write its indices into this folder (Not a directory); name one that may be "
    "written, INDEX_FOLDER|PREFIX"
  )


def test_an_index_that_is_damaged(tmp_path):
  cfg = indexed(tmp_path)
  for damage in (b"", b"\x93NUMPY"):
    (file,) = (tmp_path / "index").glob("*-sample_index.npy")
    file.write_bytes(damage)
    text = refusal(cfg)
    assert text.startswith(
      f"grain_train_files='{tmp_path}/index|{tmp_path}/web': MaxText cannot read these Megatron files ("
    )


# --- files


@KINDS
@pytest.mark.parametrize("number", [0, 3])
def test_no_token(tmp_path, kind, number):
  text = refusal(config(spec(kind, write(tmp_path / "web", [[]] * number)), kind))
  assert text == f"{tmp_path}/web: {number} documents without a single token; name files that have some"


def test_many_files_are_listed_in_short(tmp_path):
  for number in range(7):
    write(tmp_path / f"part_{number}", [])
  names = ", ".join(f"{tmp_path}/part_{number}" for number in range(3))
  assert refusal(config(tmp_path, "mmap")) == (
    f"{names} and 4 more: 0 documents without a single token; name files that have some"
  )


def test_too_few_tokens_for_a_row(tmp_path, caplog):
  prefix = write(tmp_path / "web", [[5] * 9 + [EOD]] * 2)
  assert refusal(config(prefix, "mmap")) == (
    f"{tmp_path}/web: 20 tokens make no row of max_target_length=24; take a smaller one, or more documents"
  )
  with caplog.at_level(logging.WARNING, logger="maxtext_ling2"):
    iterators(config(spec("mmap_npy", prefix), "mmap_npy"))
  assert (
    f"max_target_length=24: {tmp_path}/web has 20 tokens, so that each row has the same documents several" in caplog.text
  )


@KINDS
def test_a_bin_file_of_another_size(tmp_path, kind):
  prefix = write(tmp_path / "web", [[5] * 24] * 10, "u2")
  prefix.with_suffix(".bin").write_bytes(np.full(240, 5, "<i4").tobytes())
  assert refusal(config(spec(kind, prefix), kind)) == (
    f"{tmp_path}/web.bin: has 960 bytes, but {tmp_path}/web.idx describes 480 bytes of uint16: one of them is from "
    "another data set, or was not written to the end; make or copy both again"
  )


@KINDS
def test_ids_that_are_no_integers(tmp_path, kind):
  prefix = write(tmp_path / "web", documents(), "f4")
  assert refusal(config(spec(kind, prefix), kind)) == (
    f"{tmp_path}/web.idx: says that token ids are float32, not integers; make the files again"
  )


@KINDS
def test_names_that_are_no_prefix(tmp_path, kind):
  prefix = write(tmp_path / "web", documents())
  shutil.copy(prefix.with_suffix(".bin"), tmp_path / "alone.bin")
  expected = {
    "web.bin": f"{tmp_path}/web.bin: a prefix is named without .bin and .idx; write {tmp_path}/web",
    "alone": f"{tmp_path}/alone.bin: there is no {tmp_path}/alone.idx beside it, and MaxText reads both; make or "
    "copy both",
    "wep": f"{tmp_path}/wep: there is no {tmp_path}/wep.idx, nor a folder of this name; name PREFIX of PREFIX.bin and "
    "PREFIX.idx",
  }
  assert {name: refusal(config(spec(kind, tmp_path / name), kind)) for name in expected} == expected


def test_an_index_where_there_is_none(tmp_path):
  prefix = write(tmp_path / "web", documents())
  assert refusal(config(f"{tmp_path}/index|{prefix}", "mmap")) == (
    f"{tmp_path}/index|{prefix}: INDEX|PREFIX is for grain_file_type=mmap_npy; mmap has no index, name the prefix alone"
  )
  assert refusal(config(prefix, "mmap_npy")) == (
    f"'{prefix}': grain_file_type=mmap_npy takes INDEX_FOLDER|PREFIX, a folder that MaxText may write"
  )


@pytest.mark.parametrize("weights", [(0.5, "x"), (0.5, ""), (-1, 2), (0, 0)], ids=str)
def test_weights_that_are_none(tmp_path, weights):
  """MaxText's own text, in a sentence that names the setting."""
  prefix = write(tmp_path / "web", documents())
  files = ";".join(f"{prefix},{weight}" for weight in weights)
  text = refusal(config(files, "mmap"))
  assert text.startswith(f"grain_train_files='{files}': MaxText cannot read these Megatron files (")
  assert re.search(r"[Ww]eight", text)


def test_sequences_that_are_no_documents(tmp_path):
  sentences = write(tmp_path / "web", documents(), sequences=2)
  assert refusal(config(spec("mmap_npy", sentences), "mmap_npy")) == (
    f"mmap_split_sentences=false: {tmp_path}/web.idx has 80 sequences in 40 documents, so it was made with "
    "--split-sentences; set mmap_split_sentences=true"
  )


def test_texts_without_a_sequence(tmp_path):
  """Megatron's preprocess_data.py writes a document of an empty text without a sequence."""
  prefix = write(tmp_path / "web", documents())
  index = prefix.with_suffix(".idx").read_bytes()
  entries = np.frombuffer(index[-41 * 8 :], "<i8").copy()
  entries = np.insert(entries, 7, 7)
  prefix.with_suffix(".idx").write_bytes(index[:26] + struct.pack("<Q", 42) + index[34 : -41 * 8] + entries.tobytes())
  expected = (
    f"{tmp_path}/web.idx: 1 of 41 documents are empty texts without a sequence, which MaxText would count with the "
    "length of the next; make the files again without them, or take grain_file_type=mmap with "
    "mmap_split_sentences=false, which reads sequences only"
  )
  for split in (False, True):
    assert refusal(config(spec("mmap_npy", prefix), "mmap_npy", mmap_split_sentences=split)) == expected
  assert refusal(config(prefix, "mmap", mmap_split_sentences=True)) == expected
  rows = np.asarray(next(iterators(config(prefix, "mmap"))[0])["inputs"]).ravel()
  np.testing.assert_array_equal(rows, np.concatenate(documents())[: len(rows)])


def test_a_part_without_documents(tmp_path):
  prefix = write(tmp_path / "web", documents())
  cfg = config(
    spec("mmap_npy", prefix), "mmap_npy", mmap_npy_split="999,1", grain_eval_files=spec("mmap_npy", prefix),
    eval_interval=1, eval_steps=1,
  )  # fmt: skip
  assert refusal(cfg) == (
    f"mmap_npy_split='999,1': leaves no token of the 40 documents of {tmp_path}/web for evaluation; choose larger "
    "shares, or name files of their own"
  )


# --- padding


@pytest.mark.parametrize(
  ("settings", "warned"),
  [
    ({}, "pad_id=0: this token is 3 of the 240 tokens in 10 of 10 documents"),
    ({"pad_id": 1}, ""),
    ({"pad_id": EOD}, f"pad_id={EOD}: this token is 10 of the 240 tokens in 10 of 10 documents"),
    ({"pad_id": EOD, "eod_mask_loss": True}, ""),
  ],
  ids=str,
)
def test_padding_that_is_in_the_data(tmp_path, caplog, settings, warned):
  found = [[5] * 23 + [EOD] for _ in range(10)]
  found[2][:2], found[4][7] = [0, 0], 0
  cfg = config(write(tmp_path / "web", found), "mmap", **settings)
  with caplog.at_level(logging.WARNING, logger="maxtext_ling2"):
    iterator, _ = iterators(cfg)
  assert [record.getMessage() for record in caplog.records if "this token is" in record.getMessage()] == (
    [
      f"{warned} of {tmp_path}/web, and with grain_file_type=mmap it has no loss as a target; set pad_id to a token that "
      "does not occur"
    ]
    if warned
    else []
  )


def test_padding_of_megatrons_samples_is_in_no_segment(tmp_path, caplog):
  """So that token 0 in the data has its loss, and nothing is to be said."""
  found = [[0] * 30 + [EOD]] * 10
  with caplog.at_level(logging.WARNING, logger="maxtext_ling2"):
    iterator, _ = iterators(config(spec("mmap_npy", write(tmp_path / "web", found)), "mmap_npy"))
  batch = next(iterator)
  assert (np.asarray(batch["targets"]) == 0).any() and (np.asarray(batch["targets_segmentation"]) != 0).all()
  assert "this token is" not in caplog.text


# --- the trainer


def test_the_trainer_ends_with_a_sentence(tmp_path):
  """MaxText would log it, and end with 0 as after the last step."""
  from maxtext_ling2.maxtext_api import overrides
  from maxtext_ling2.maxtext_api.start import maxtext_folder

  found = documents()
  found[1][0] = 64
  cfg = {
    "run_name": "run", "base_output_directory": tmp_path, "steps": 9, "dataset_type": "grain", "grain_file_type": "mmap",
    "grain_train_files": write(tmp_path / "web", found), "grain_worker_count": 1, "mmap_eod_id": EOD,
    "max_target_length": LENGTH, "per_device_batch_size": ROWS, "enable_checkpointing": False,
    "enable_data_shuffling": False,
  }  # fmt: skip
  words = overrides.words({**tiny.TINY, **SMALL, "base_num_decoder_layers": 3, **cfg})
  yml = maxtext_folder() / "configs" / "base.yml"
  command = [sys.executable, "-m", "maxtext.trainers.pre_train.train", str(yml), *words]
  done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
  assert done.returncode == 1, done.stderr[-3000:]
  said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
  assert len(said) == 1 and said[0].startswith(
    f"Error: document 1 (from 0) of {tmp_path}/web.bin: token id 64 at position 0"
  )
  assert "Traceback" not in done.stderr and "completed step" not in done.stdout + done.stderr
