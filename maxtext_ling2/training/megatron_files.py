"""Megatron files and their documents, of which none with an id that the model does not have is handed on.

Reading is MaxText's (`input_pipeline/_mmap_datasource.py` of 0.2.5), which does not look at ids; JAX clamps them to the
vocabulary in silence.
"""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxtext_ling2.errors import DataError


@dataclasses.dataclass(frozen=True)
class Files:
  """A data set in one or several pairs of files, whose documents are numbered through.

  Attributes:
    prefixes: paths without .bin and .idx, in MaxText's order.
    shards: MaxText's `MMapIndexedDataset` of each.
    split_sentences: whether a document has several sequences (mmap_split_sentences). If not, a sequence is a document.
    ends: number of documents in the shards up to each.
  """

  prefixes: tuple[str, ...]
  shards: tuple[Any, ...]
  split_sentences: bool
  ends: tuple[int, ...]

  @classmethod
  def open(cls, prefixes: Sequence[str], split_sentences: bool) -> "Files":
    """Opens files; their headers are checked by MaxText.

    Raises:
      OSError: a file does not exist or cannot be read.
      ValueError: an .idx file is damaged.
    """
    from maxtext.input_pipeline import _mmap_datasource

    shards = tuple(map(_mmap_datasource.MMapIndexedDataset, prefixes))
    documents = (len(shard.doc_idx) - 1 if split_sentences else len(shard) for shard in shards)
    return cls(tuple(prefixes), shards, split_sentences, tuple(itertools.accumulate(documents)))

  def __len__(self) -> int:
    return self.ends[-1]

  def tokens(self) -> int:
    """Number of tokens, by the size of the .bin files as MaxText counts them."""
    return sum(
      os.path.getsize(f"{prefix}.bin") // np.dtype(shard.dtype).itemsize
      for prefix, shard in zip(self.prefixes, self.shards, strict=True)
    )

  def place(self, document: int) -> str:
    """A document, counted from 0 through all files, in words: its number in its file, and the file."""
    shard, number = self._find(document)
    if not self.split_sentences:  # a sequence; only a document of an empty text has none
      number = int(np.searchsorted(self.shards[shard].doc_idx, number, side="right")) - 1
    return f"document {number} (from 0) of {self.prefixes[shard]}.bin"

  def length(self, document: int) -> int:
    """Number of tokens of a document.

    Raises:
      IndexError: there is no such document.
    """
    index, number = self._find(document)
    shard = self.shards[index]
    if not self.split_sentences:
      return int(shard.sizes[number])
    return int(shard.sizes[shard.doc_idx[number] : shard.doc_idx[number + 1]].sum())

  def _find(self, document: int) -> tuple[int, int]:
    """(shard, number in it) of a document."""
    if not 0 <= document < len(self):
      raise IndexError(document)
    shard = bisect.bisect_right(self.ends, document)
    return shard, document - (self.ends[shard - 1] if shard else 0)


@dataclasses.dataclass(frozen=True)
class CheckedDocuments:
  """MaxText's source of documents, {"text": tokens [length]} by index, without ids that the model does not have.

  Attributes:
    documents: `MMapIndexedDataSource`, or `MultiShardMMapIndexedDataSource` of several files.
    prefixes: of the files.
    split_sentences: see `Files`.
    vocab_size: the ids are those from 0 to vocab_size - 1.
  """

  documents: Any
  prefixes: tuple[str, ...]
  split_sentences: bool
  vocab_size: int

  def __len__(self) -> int:
    return len(self.documents)

  def __getitem__(self, index: int) -> dict[str, Any]:
    found: dict[str, Any] = self.documents[index]
    tokens = found["text"]
    if len(tokens) and (tokens.max() >= self.vocab_size or tokens.min() < 0):
      position = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
      place = Files.open(self.prefixes, self.split_sentences).place(int(index))
      raise DataError(
        f"{place}: token id {tokens[position]} at position {position} is not in the vocabulary, whose ids are 0 to "
        f"vocab_size - 1 = {self.vocab_size - 1}, and JAX would take another one in silence; take files made with the "
        "model's tokenizer, or set vocab_size"
      )
    return found

  def doc_token_counts(self) -> Any:
    """Tokens of each document, [N] int64."""
    return self.documents.doc_token_counts()

  def check_eod_presence(self, eod_id: int, mode_label: str) -> None:
    """Warns, as MaxText, where no document ends with the EOD."""
    self.documents.check_eod_presence(eod_id, mode_label)


@dataclasses.dataclass(frozen=True)
class DocumentsAfterBos:
  """What MaxText's `MMapSampleIndexDataSource` needs of a source of documents; an empty document stays empty.

  Attributes:
    documents: {"text": tokens [length]} by index.
    bos_id: token put before each.
  """

  documents: Any
  bos_id: int

  def doc_token_counts(self) -> Any:
    """Tokens of each document, [N] int64."""
    counts = self.documents.doc_token_counts()
    return counts + (counts > 0)

  def __getitem__(self, index: int) -> dict[str, Any]:
    tokens = self.documents[index]["text"]
    return {"text": np.concatenate([np.array([self.bos_id], np.int32), tokens]) if len(tokens) else tokens}

  def check_eod_presence(self, eod_id: int, mode_label: str) -> None:
    """Warns, as MaxText, where no document ends with the EOD."""
    self.documents.check_eod_presence(eod_id, mode_label)


def listed(prefixes: Sequence[str]) -> str:
  """Names of files for a message, which may be of thousands."""
  more = f" and {len(prefixes) - 3} more" if len(prefixes) > 4 else ""
  return ", ".join(prefixes[:3] if more else prefixes) + more
