"""The demo's Megatron data set: its bytes, and that it is written safely."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from maxtext_ling2.demo import data

pytestmark = pytest.mark.unit

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
