"""The demo's data set as MaxText's own reader and pipeline see it."""

from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest
from maxtext.configs import pyconfig
from maxtext.input_pipeline._mmap_datasource import MMapIndexedDataset, MMapIndexedDataSource
from maxtext.input_pipeline.grain_data_processing import make_grain_train_iterator
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

from maxtext_ling2.demo import data, train
from maxtext_ling2.maxtext_api import overrides
from maxtext_ling2.maxtext_api.start import maxtext_folder
from test_demo_data import DOCUMENTS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
  return data.prepare(tmp_path_factory.mktemp("demo") / "data")


def test_maxtext_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("MMAP_IDX_FULL_VALIDATION", "1")
  written = tmp_path / "small"
  data.write(DOCUMENTS, written)
  reader = MMapIndexedDataset(str(written))
  assert len(reader) == 3
  assert reader.dtype is np.uint16
  assert reader.sizes.tolist() == [4, 1, 3]
  assert reader.pointers.tolist() == [0, 8, 10]
  assert reader.doc_idx.tolist() == [0, 1, 2, 3]
  assert [reader[i].tolist() for i in range(3)] == [document.tolist() for document in DOCUMENTS]
  # One document for each sequence: otherwise mmap_npy refuses it without mmap_split_sentences.
  assert len(MMapIndexedDataSource(str(written), split_sentences=True)) == 3


def test_no_documents_are_a_data_set_too(tmp_path: Path) -> None:
  data.write([], tmp_path / "none")
  assert len(MMapIndexedDataset(str(tmp_path / "none"))) == 0


def test_documents_are_the_help_texts_and_eod(dataset: data.Dataset) -> None:
  tokenizer = SentencePieceProcessor(model_file=str(data.tokenizer_file()))
  assert (tokenizer.vocab_size(), tokenizer.eos_id()) == (32000, data.EOD)
  reader = MMapIndexedDataset(str(dataset.prefix))
  assert len(reader) == dataset.documents == len(topics) > 70
  assert int(reader.sizes.sum()) == dataset.tokens > 120_000
  for i, name in enumerate(sorted(topics)):
    ids = reader[i].tolist()
    assert ids == [*tokenizer.encode(topics[name]), data.EOD], name
    assert ids.count(data.EOD) == 1, name


@pytest.fixture(scope="module")
def rows(dataset: data.Dataset) -> dict[str, NDArray[np.int32]]:
  """One epoch (but for a last odd row) of what MaxText's pipeline hands to the model, by field; each [rows, T]."""
  base = maxtext_folder() / "configs" / "base.yml"
  settings = train.data_settings(dataset) | {
    "run_name": "test", "hardware": "cpu", "skip_jax_distributed_system": True, "log_config": False,
  }  # fmt: skip
  config = pyconfig.initialize(["", str(base), *overrides.words(settings)])
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  iterator = make_grain_train_iterator(config, mesh, [0])
  count = dataset.tokens // train.SEQUENCE_LENGTH // train.ROWS_PER_DEVICE
  batches = [next(iterator) for _ in range(count)]
  assert batches[0]["inputs"].shape == (train.ROWS_PER_DEVICE, train.SEQUENCE_LENGTH)
  return {key: np.concatenate([np.asarray(batch[key]) for batch in batches]) for key in batches[0]}


def test_rows_are_the_text_without_padding(dataset: data.Dataset, rows: dict[str, NDArray[np.int32]]) -> None:
  stream = np.fromfile(f"{dataset.prefix}.bin", np.uint16).astype(np.int32)
  windows = {window.tobytes() for window in np.split(stream, range(0, len(stream), train.SEQUENCE_LENGTH))[1:-1]}
  read = {row.tobytes() for row in rows["inputs"]}
  assert read <= windows
  assert len(read) == len(rows["inputs"]) >= len(windows) - 1
  assert rows["inputs_segmentation"].min() == 1  # 0 would be padding


def test_segments_change_exactly_after_each_eod(rows: dict[str, NDArray[np.int32]]) -> None:
  after_eod = rows["inputs"][:, :-1] == data.EOD
  assert after_eod.sum() > 70
  assert (rows["inputs_segmentation"][:, 0] == 1).all()
  np.testing.assert_array_equal(np.diff(rows["inputs_segmentation"], axis=1), after_eod)
  position = rows["inputs_position"]
  assert (position[:, 0] == 0).all()
  np.testing.assert_array_equal(position[:, 1:], np.where(after_eod, 0, position[:, :-1] + 1))


def test_targets_and_what_counts_in_the_loss(rows: dict[str, NDArray[np.int32]]) -> None:
  """What MaxText's mmap pipeline does, whatever eod_mask_loss says; mmap_npy masks less."""
  np.testing.assert_array_equal(rows["targets"][:, :-1], rows["inputs"][:, 1:])
  assert (rows["targets"][:, -1] == data.EOD).all()
  counts = rows["targets_segmentation"] != 0
  np.testing.assert_array_equal(counts, rows["targets"] != data.EOD)  # neither a real EOD nor the row's last target
  assert counts[:, :-1][rows["inputs"][:, :-1] == data.EOD].all()  # but the next document's first token, after EOD
