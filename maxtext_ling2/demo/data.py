"""The demo's data: CPython's documentation as a Megatron data set, which MaxText's mmap reader takes.

A Megatron data set is two files. PREFIX.bin holds the token ids of all documents, one after the other. PREFIX.idx locates
the documents: a header, lengths, byte offsets, and the indices of the documents' first sequences. Each document ends with
an end-of-document token (EOD), by which alone MaxText recognises the end of a document.
"""

import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.demo.errors import DemoError
from maxtext_ling2.maxtext_api.start import maxtext_folder

Tokens = NDArray[np.uint16]

EOD = 2
"""End of document: the Llama 2 tokenizer's </s>, which encoding text never yields."""

NAME = "pydoc_topics"

_DTYPE_CODE = 8  # uint16, which Megatron takes for every vocabulary below 65,500
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, number of sequences, length of the document array


@dataclass(frozen=True)
class Dataset:
  """A data set on disk.

  Attributes:
    prefix: path without .bin and .idx, the value for MaxText's grain_train_files.
    documents: number of documents.
    tokens: number of tokens, including an EOD per document.
  """

  prefix: Path
  documents: int
  tokens: int


def prepare(folder: Path) -> Dataset:
  """Writes the documentation of this Python as a data set into a folder; files that are up to date stay untouched.

  Raises:
    DemoError: this Python came without its documentation, or MaxText without the tokenizer.
  """
  documents = encode(read_topics())
  folder.mkdir(parents=True, exist_ok=True)
  write(documents, folder / NAME)
  return Dataset(folder / NAME, len(documents), sum(map(len, documents)))


def read_topics() -> list[str]:
  """The help texts of `help("assert")` and the like, ordered by name."""
  try:
    from pydoc_data.topics import topics
  except ImportError as error:
    raise DemoError(
      "this Python has no module pydoc_data.topics, from which the demo takes its text: its packager left it out; "
      "install the full standard library or take another Python"
    ) from error
  return [topics[name] for name in sorted(topics)]


def encode(texts: Iterable[str]) -> list[Tokens]:
  """Token ids of each text by the Llama 2 tokenizer, each followed by `EOD`."""
  import sentencepiece

  tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file()))
  return [np.array([*tokenizer.encode(text), EOD], dtype=np.uint16) for text in texts]


def tokenizer_file() -> Path:
  """The Llama 2 sentencepiece model that comes with MaxText."""
  path = maxtext_folder() / "assets" / "tokenizers" / "tokenizer.llama2"
  if not path.is_file():
    raise DemoError(f"{path} does not exist, but MaxText 0.2.5 brings it: reinstall MaxText")
  return path


def write(documents: Sequence[Tokens], prefix: Path) -> None:
  """Writes PREFIX.bin and PREFIX.idx; a file with the same content is not touched."""
  lengths = [len(document) for document in documents]
  _replace(Path(f"{prefix}.bin"), b"".join(document.astype("<u2").tobytes() for document in documents))
  _replace(Path(f"{prefix}.idx"), _index(lengths))


def _index(lengths: Sequence[int]) -> bytes:
  """The .idx file of documents with these lengths in tokens, one sequence each."""
  count = len(lengths)
  offsets = np.cumsum([0, *lengths[:-1]], dtype="<i8") * np.dtype(np.uint16).itemsize
  # One more entry than documents: each one's first sequence, then the end of the last. Megatron writes its length into
  # the header's last field.
  first_sequences = np.arange(count + 1, dtype="<i8")
  header = _HEADER.pack(b"MMIDIDX\x00\x00", 1, _DTYPE_CODE, count, len(first_sequences))
  return header + np.array(lengths, "<i4").tobytes() + offsets[:count].tobytes() + first_sequences.tobytes()


def _replace(path: Path, content: bytes) -> None:
  """Replaces the content of a file atomically."""
  if path.is_file() and path.read_bytes() == content:
    return
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    temporary.write_bytes(content)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
