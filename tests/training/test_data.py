"""Batches of MaxText's mmap pipelines on hand-made Megatron files, and what the model makes of them.

What Megatron does is written down here once more: documents in an order shuffled by the seed form one stream; a sample is
L + 1 tokens of it, the next one starts L further; samples are shuffled, too. Attention and positions start anew behind
each EOD (reset_attention_mask), and tokens that are an EOD predict nothing (eod_mask_loss). Source: Megatron-LM,
megatron/core/datasets/gpt_dataset.py.
"""

import pickle

import jax
import numpy as np
import pytest
from flax import nnx

import tiny
from maxtext_ling2.demo import data
from maxtext_ling2.maxtext_api import session

EOD, PAD, LENGTH, ROWS, SEED = data.EOD, 5, 24, 4, 7


@pytest.fixture(scope="module")
def documents():
  """Of 2 to 29 tokens with the EOD; some are longer than a row."""
  rng = np.random.default_rng(0)
  return [np.array([*rng.integers(3, 64, rng.integers(1, 29)), EOD], np.uint16) for _ in range(40)]


def read(folder, documents, kind, batches, make=tiny.config, **settings):
  """(config, the first batches as the trainer gets them)"""
  from maxtext.input_pipeline import input_pipeline_interface

  data.write([np.array(document, np.uint16) for document in documents], folder / "documents")
  files = folder / "documents" if kind == "mmap" else f"{folder / 'index'}|{folder / 'documents'}"
  cfg = make(
    max_target_length=LENGTH,
    dataset_type="grain",
    grain_file_type=kind,
    grain_train_files=str(files),
    grain_worker_count=0,
    mmap_eod_id=EOD,
    data_shuffle_seed=SEED,
    steps=1,  # MaxText makes as many epochs of samples as the steps need: one
    **{"per_device_batch_size": ROWS, "packing": True, "packing_max_segments_per_sample": 0, **settings},
  )
  with session.model_context(cfg, mesh := session.make_mesh(cfg)):
    iterator, _ = input_pipeline_interface.create_data_iterator(cfg, mesh)
    return cfg, [{name: np.asarray(value) for name, value in next(iterator).items()} for _ in range(batches)]


def megatron_samples(documents):
  """[N, L + 1] in the order of training, one epoch."""
  rng = np.random.RandomState(SEED)
  order = np.arange(len(documents))
  rng.shuffle(order)
  stream = np.concatenate([documents[index] for index in order])
  samples = np.stack([stream[start : start + LENGTH + 1] for start in range(0, len(stream) - LENGTH, LENGTH)])
  order = np.arange(len(samples))
  rng.shuffle(order)
  return samples[order].astype(np.int32)


def megatron_masks(inputs, reset, mask):
  """(attention segments, positions, loss mask) of input tokens [B, L]."""
  before = np.pad(inputs == EOD, [(0, 0), (1, 0)])[:, :-1]
  index = np.broadcast_to(np.arange(LENGTH), inputs.shape)
  if not reset:
    return np.ones_like(inputs), index, (inputs != EOD) | (not mask)
  start = np.maximum.accumulate(np.where(before, index, 0), axis=1)
  return 1 + np.cumsum(before, axis=1), index - start, (inputs != EOD) | (not mask)


def stock(**settings):
  """Of a model that is not LING2: MaxText's own pipeline, for which ours stands in."""
  return session.make_config(**{"model_name": "default", "vocab_size": 64, **settings})


@pytest.mark.parametrize("make", [tiny.config, stock], ids=["ling2", "stock"])
@pytest.mark.parametrize("mask", [False, True], ids=["eod_counts", "eod_masked"])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "across"])
def test_mmap_npy_is_megatrons(tmp_path, documents, reset, mask, make):
  samples = megatron_samples(documents)
  number = len(samples) // ROWS
  assert number >= 4
  masks = {"reset_attention_mask": reset, "eod_mask_loss": mask}
  _, batches = read(tmp_path, documents, "mmap_npy", number, make=make, **masks)
  for index, batch in enumerate(batches):
    rows = samples[index * ROWS : (index + 1) * ROWS]
    np.testing.assert_array_equal(batch["inputs"], rows[:, :-1])
    np.testing.assert_array_equal(batch["targets"], rows[:, 1:])
    segments, positions, counted = megatron_masks(rows[:, :-1], reset, mask)
    np.testing.assert_array_equal(batch["inputs_segmentation"], segments)
    np.testing.assert_array_equal(batch["inputs_position"], positions)
    np.testing.assert_array_equal(batch["targets_segmentation"] != 0, counted)


@pytest.mark.parametrize("mask", [False, True], ids=["eod_counts", "eod_masked"])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "across"])
def test_mmap_cuts_rows_from_the_stream(tmp_path, documents, reset, mask):
  """The older pipeline: the last token of a row predicts nothing, and a target that is padding counts for nothing."""
  stream = np.concatenate(documents)
  rows = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)
  settings = {"reset_attention_mask": reset, "eod_mask_loss": mask, "pad_id": PAD, "enable_data_shuffling": False}
  _, batches = read(tmp_path, documents, "mmap", 4, **settings)
  ignored = [PAD, EOD] if mask else [PAD]
  assert any((batch["inputs"] == PAD).any() for batch in batches)
  for index, batch in enumerate(batches):
    inputs = rows[index * ROWS : (index + 1) * ROWS].astype(np.int32)
    np.testing.assert_array_equal(batch["inputs"], inputs)
    segments, positions, _ = megatron_masks(inputs, reset, False)
    np.testing.assert_array_equal(batch["inputs_segmentation"], segments)  # an EOD is of its document, masked or not
    np.testing.assert_array_equal(batch["inputs_position"], positions)
    np.testing.assert_array_equal(batch["targets"][:, :-1], inputs[:, 1:])
    np.testing.assert_array_equal(batch["targets_segmentation"][:, :-1] != 0, ~np.isin(inputs[:, 1:], ignored))
    assert (batch["targets"][:, -1] == PAD).all()
    assert not batch["targets_segmentation"][:, -1].any()


BOS = {"grain_packing_type": "concat_then_split", "add_bos": True, "enable_data_shuffling": False}


def test_bos_between_documents_by_hand(tmp_path):
  """Two rows of 24, written down: 63 before each document, an empty document has none."""
  documents = [[7, 8, EOD], [], [9] * 20 + [EOD], list(range(10, 30)) + [EOD]]
  cfg, (batch,) = read(tmp_path, documents, "mmap", 1, bos_id=63, pad_id=PAD, per_device_batch_size=2, **BOS)
  rows = [
    [63, 7, 8, EOD, 63, *[9] * 19],
    [9, EOD, 63, *range(10, 30), EOD],
  ]
  np.testing.assert_array_equal(batch["inputs"], rows)
  np.testing.assert_array_equal(batch["inputs_segmentation"], [[1] * 4 + [2] * 20, [1] * 2 + [2] * 22])
  np.testing.assert_array_equal(batch["inputs_position"], [[*range(4), *range(20)], [*range(2), *range(22)]])
  np.testing.assert_array_equal(batch["targets"][:, :-1], [row[1:] for row in rows])
  np.testing.assert_array_equal(batch["targets_segmentation"] != 0, [[True] * 23 + [False]] * 2)
  assert cfg.bos_id == 63


def test_bos_between_documents_changes_nothing_else(tmp_path, documents):
  """The rows are those of files in which the token stands already, shuffled and in a process of grain's."""
  written = [np.array([63, *document]) for document in documents]
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  shuffled = {**BOS, "enable_data_shuffling": True, "bos_id": 63}
  _, found = read(tmp_path / "a", documents, "mmap", 4, **shuffled)
  _, expected = read(tmp_path / "b", written, "mmap", 4)
  for one, other in zip(found, expected, strict=True):
    assert set(one) == set(other)
    for name, value in other.items():
      np.testing.assert_array_equal(one[name], value, err_msg=name)


def test_documents_after_bos_travel_to_other_processes(tmp_path, documents):
  from maxtext.input_pipeline import _mmap_datasource

  from maxtext_ling2.training.megatron_files import DocumentsAfterBos

  data.write(documents, tmp_path / "documents")
  source = _mmap_datasource.MMapIndexedDataSource(str(tmp_path / "documents"))
  rows = _mmap_datasource.MMapSampleIndexDataSource(DocumentsAfterBos(source, 63), LENGTH, EOD)
  again = pickle.loads(pickle.dumps(rows))
  assert len(again) == len(rows) == sum(len(document) + 1 for document in documents) // LENGTH
  for index in (0, len(rows) - 1):
    np.testing.assert_array_equal(again[index]["text"], rows[index]["text"])


@pytest.mark.parametrize("settings", [{}, {"add_bos": False}, {"grain_packing_type": "first_fit"}, {"packing": False}])
def test_bos_only_where_it_is_asked_for(tmp_path, documents, settings):
  given = {**BOS, "bos_id": 1, **settings}
  _, (batch,) = read(tmp_path, documents, "mmap", 1, **given)
  assert (batch["inputs"] == 1).any() == (not settings)


def test_no_bos_in_the_documents_of_another_model(tmp_path, documents):
  _, (batch,) = read(tmp_path, documents, "mmap", 1, make=stock, **BOS)
  stream = np.concatenate(documents)[: ROWS * LENGTH]
  np.testing.assert_array_equal(batch["inputs"], stream.reshape(ROWS, LENGTH))


def test_rows_that_fill_up_the_last_batch_are_padding(tmp_path, documents):
  """Stock fills them with the EOD, in the segments too, and so trains on them."""
  few = documents[:8]
  assert 0 < (number := len(megatron_samples(few)) % ROWS) < ROWS
  batches = len(megatron_samples(few)) // ROWS + 1
  _, found = read(tmp_path, few, "mmap_npy", batches, pad_id=PAD)
  last = found[-1]
  real = (last["inputs_segmentation"] != 0).any(axis=1)
  assert real.sum() == number
  for name in ("inputs", "targets"):
    assert (last[name][~real] == PAD).all()
  for name in ("inputs_position", "targets_segmentation"):
    assert (last[name][~real] == 0).all()


@pytest.mark.parametrize("kind", [pytest.param("mmap", marks=pytest.mark.slow), "mmap_npy"])
def test_the_model_starts_anew_at_each_document(tmp_path, documents, kind):
  """Logits of each row of a training batch equal those of its documents, each alone at the start of a row."""
  cfg, (batch,) = read(tmp_path, documents, kind, 1, reset_attention_mask=True)
  network, mesh = tiny.model(cfg)
  graph, state = nnx.split(network)
  call = jax.jit(lambda state, *arrays: nnx.merge(graph, state)(*arrays, enable_dropout=False, model_mode="train"))

  def logits(tokens, positions, segments):
    with session.model_context(cfg, mesh):
      return np.asarray(call(state, tokens, positions, segments))

  inputs, segments = batch["inputs"], batch["inputs_segmentation"]
  together = logits(inputs, batch["inputs_position"], segments)
  number = int(segments.max())
  assert number >= 3
  index = np.broadcast_to(np.arange(LENGTH), inputs.shape)
  for segment in range(1, number + 1):
    inside = segments == segment
    alone, length = np.zeros_like(inputs), inside.sum(axis=1)
    filled = index < length[:, None]
    alone[filled] = inputs[inside]
    found = logits(alone, np.where(filled, index, 0), filled.astype(np.int32))
    np.testing.assert_allclose(found[filled], together[inside], rtol=0, atol=2e-5)
  across = logits(inputs, index, np.ones_like(segments))
  assert np.abs(across - together)[segments > 1].max() > 0.1  # without the resets it is another model
