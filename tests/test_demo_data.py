"""The demo's Megatron data set: what MaxText's own reader and pipeline see in it, and that it is written safely."""

from collections.abc import Callable
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

DOCUMENTS = [np.array(ids, np.uint16) for ids in ([5, 6, 7, 2], [2], [31999, 8, 2])]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
  return data.prepare(tmp_path_factory.mktemp("demo") / "data")


@pytest.fixture
def written(tmp_path: Path) -> Path:
  """Prefix of a small data set."""
  data.write(DOCUMENTS, tmp_path / "small.v1")  # the dot belongs to the name
  return tmp_path / "small.v1"


def contents(prefix: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(prefix.parent.iterdir())}


def test_format_is_megatrons(written: Path) -> None:
  assert Path(f"{written}.bin").read_bytes().hex() == "0500060007000200" + "0200" + "ff7c08000200"
  header = "4d4d49444944580000" + "0100000000000000" + "08" + "0300000000000000" + "0400000000000000"
  lengths = "040000000100000003000000"
  offsets = "000000000000000008000000000000000a00000000000000"
  first_sequences = "0000000000000000010000000000000002000000000000000300000000000000"
  assert Path(f"{written}.idx").read_bytes().hex() == header + lengths + offsets + first_sequences


def test_maxtext_reads_what_was_written(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("MMAP_IDX_FULL_VALIDATION", "1")
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


def test_second_run_touches_nothing(dataset: data.Dataset) -> None:
  files = sorted(dataset.prefix.parent.iterdir())
  assert [file.name for file in files] == ["pydoc_topics.bin", "pydoc_topics.idx"]  # and nothing temporary
  before = [(file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in files]
  assert data.prepare(dataset.prefix.parent) == dataset
  assert [(file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in files] == before


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize(
  "damage",
  [
    pytest.param(lambda path: path.unlink(), id="missing"),
    pytest.param(lambda path: path.write_bytes(b""), id="empty"),
    pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="cut off"),
    pytest.param(lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), id="altered"),
    pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"\0"), id="longer"),
  ],
)
def test_damaged_files_are_replaced(written: Path, suffix: str, damage: Callable[[Path], object]) -> None:
  whole = contents(written)
  damage(Path(f"{written}{suffix}"))
  assert contents(written) != whole
  data.write(DOCUMENTS, written)
  assert contents(written) == whole


def test_failed_write_leaves_the_old_file_and_no_other(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  whole = contents(written)

  def write_half(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
      file.write(content[: len(content) // 2])
    raise OSError("disk full")

  monkeypatch.setattr(Path, "write_bytes", write_half)
  with pytest.raises(OSError, match="disk full"):
    data.write(DOCUMENTS[:2], written)
  assert contents(written) == whole


def test_missing_tokenizer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  monkeypatch.setattr(data, "maxtext_folder", lambda: tmp_path)
  with pytest.raises(data.DemoError, match=r"tokenizer\.llama2 does not exist.*reinstall MaxText"):
    data.prepare(tmp_path / "data")
  assert list(tmp_path.iterdir()) == []


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
