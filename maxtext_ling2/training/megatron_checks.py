"""What can be wrong with Megatron files and their indices, found when a run starts, before it computes anything.

All checks are cheap for files of any size: headers, sizes of files, and evenly spread documents and rows.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.errors import DataError
from maxtext_ling2.training.megatron_files import CheckedDocuments, Files, listed

logger = logging.getLogger("maxtext_ling2")

SAMPLED_DOCUMENTS = 20
"""Documents of a data set that are read when a run starts; as many as MaxText reads in search of an EOD."""
SAMPLED_ROWS = 200
"""Rows of an index folder that are compared with the files. Up to as many rows the comparison is exact."""


def check_files(files: Files) -> None:
  """Compares each .bin file with its .idx.

  Raises:
    DataError: the ids are no integers, the two do not belong together, or there is no token in any.
  """
  for prefix, shard in zip(files.prefixes, files.shards, strict=True):
    dtype = np.dtype(shard.dtype)
    if dtype.kind not in "iu":
      raise DataError(f"{prefix}.idx: says that token ids are {dtype}, not integers; make the files again")
    found = os.path.getsize(f"{prefix}.bin")
    expected = _bytes(shard, dtype.itemsize, found)
    if found != expected:
      raise DataError(
        f"{prefix}.bin: has {found:,} bytes, but {prefix}.idx describes {expected:,} bytes of {dtype}: one of them is "
        "from another data set, or was not written to the end; make or copy both again"
      )
  if not files.tokens():
    raise DataError(f"{listed(files.prefixes)}: {len(files)} documents without a single token; name files that have some")


def _bytes(shard: Any, itemsize: int, found: int) -> int:
  """Size of the .bin file that an index describes; all of the index is read only if the last sequence ends elsewhere."""
  if not len(shard):
    return 0
  if int(shard.pointers[-1]) + int(shard.sizes[-1]) * itemsize == found:
    return found
  return int((shard.pointers + shard.sizes.astype(np.int64) * itemsize).max())


def check_sequences(files: Files, by_document: bool) -> None:
  """Compares sequences with documents, which MaxText takes for one where it is not told mmap_split_sentences.

  Args:
    files: all files.
    by_document: whether MaxText reads documents by number, as for `mmap_npy`; else it reads one sequence after the other.

  Raises:
    DataError: there are documents of several sequences, or, where documents have numbers, of none.
  """
  for prefix, shard in zip(files.prefixes, files.shards, strict=True):
    documents, sequences = len(shard.doc_idx) - 1, len(shard)
    if files.split_sentences:
      empty = int((np.diff(shard.doc_idx) == 0).sum())
    elif by_document and documents < sequences:
      raise DataError(
        f"mmap_split_sentences=false: {prefix}.idx has {sequences:,} sequences in {documents:,} documents, so it was "
        "made with --split-sentences; set mmap_split_sentences=true"
      )
    else:
      empty = documents - sequences if by_document else 0
    if empty:
      raise DataError(
        f"{prefix}.idx: {empty:,} of {documents:,} documents are empty texts without a sequence, which MaxText would "
        "count with the length of the next; make the files again without them, or take grain_file_type=mmap with "
        "mmap_split_sentences=false, which reads sequences only"
      )


def check_sample(documents: CheckedDocuments, ignored: int | None, fields: str) -> None:
  """Reads documents from all over a data set: their ids, and how often a token is in them that has no loss.

  Args:
    documents: of the data set.
    ignored: the token; None: each has.
    fields: the setting that says so, as in "pad_id=0".

  Raises:
    DataError: a token id is not in the vocabulary.
  """
  numbers = _spread(len(documents), SAMPLED_DOCUMENTS)
  texts = [documents[number]["text"] for number in numbers]
  if ignored is None:
    return
  found, tokens = sum(int((text == ignored).sum()) for text in texts), sum(map(len, texts))
  if found:
    logger.warning(
      f"{fields}: this token is {found:,} of the {tokens:,} tokens in {len(texts)} of {len(documents):,} documents of "
      f"{listed(documents.prefixes)}, and with grain_file_type=mmap it has no loss as a target; set pad_id to a token "
      "that does not occur"
    )


def warn_if_repeated(prefixes: Sequence[str], tokens: int, length: int) -> None:
  """Says that a row of L + 1 tokens is longer than the data: Megatron then fills it with further epochs."""
  if tokens <= length:
    logger.warning(
      f"max_target_length={length}: {listed(prefixes)} has {tokens:,} tokens, so that each row has the same documents "
      "several times; take a smaller one, or more documents"
    )


def check_index(folder: str, order: Any, starts: Any, files: Files, documents: int, tokens: int, length: int) -> None:
  """Compares Megatron's indices, as they were found in a folder, with the files that they are used for.

  An index depends on nothing but the number and the lengths of documents. So a sample must begin where the one before
  ends: `length` tokens later in the stream of documents.

  Args:
    folder: where they are.
    order: numbers of documents, E epochs, [E * N].
    starts: of samples, [S + 1, 2]: place in `order`, tokens into the document.
    files: all files.
    documents: N, documents of an epoch: all, or those of the part that mmap_npy_split takes.
    tokens: of an epoch.
    length: L, tokens of a sample.

  Raises:
    DataError: they were made for other files.
  """
  epochs, rest = divmod(len(order), documents)
  samples = len(starts) - 1
  if rest or samples != (expected := (epochs * tokens - 1) // length):
    of = f"{len(order):,} documents" if rest else f"{samples:,} rows, not {expected:,}"
    raise other_files(
      folder, files.prefixes, f"it lists {of}, of {documents:,} documents with {tokens:,} tokens per epoch"
    )
  for sample in _spread(samples, SAMPLED_ROWS):
    try:
      found = _tokens_between(order, starts[sample], starts[sample + 1], files)
    except IndexError as error:
      why = f"it lists document {error}, of {len(files):,} documents"
      raise other_files(folder, files.prefixes, why) from error
    if found != length:
      raise other_files(folder, files.prefixes, f"its row {sample} has {found} tokens here, not {length}")


def other_files(folder: str, prefixes: Sequence[str], why: str) -> DataError:
  """The error that an index folder does not belong to files."""
  return DataError(
    f"{folder}: this index folder was made when {listed(prefixes)} had other contents ({why}), so rows would be cut "
    "in wrong places and filled up with EODs; delete the folder, which MaxText then makes again, or name another one"
  )


def _tokens_between(order: Any, start: NDArray[Any], end: NDArray[Any], files: Files) -> int:
  """Tokens of the stream of documents from one start of a sample to the next."""
  (first, offset), (last, rest) = map(int, start), map(int, end)
  between = sum(files.length(int(order[position])) for position in range(first, last))
  return between - offset + rest


def _spread(count: int, wanted: int) -> list[int]:
  """At most so many numbers below `count`, evenly from the first to the last."""
  return sorted(set(np.linspace(0, count - 1, min(count, wanted)).astype(int).tolist()))
