"""MaxText's data sources of Megatron files for a LING2 run: the same rows, from documents whose ids are checked.

MaxText builds them where no config is at hand, so the settings come with the EOD, which it passes on.
"""

import dataclasses
import os
from typing import Any

import grain
import numpy as np
from maxtext.input_pipeline import _mmap_datasource, _mmap_index_utils

from maxtext_ling2.errors import DataError
from maxtext_ling2.host.patches import Call
from maxtext_ling2.training import megatron_checks
from maxtext_ling2.training.megatron_files import CheckedDocuments, DocumentsAfterBos, Files, listed


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a LING2 run's settings say of documents.

  Attributes:
    vocab_size: ids are from 0 to vocab_size - 1.
    bos_id: token put before each document; None: nothing is.
    ignored: token that has no loss as a target; None: each has.
    ignored_by: the setting that says so, as in "pad_id=0".
  """

  vocab_size: int
  bos_id: int | None
  ignored: int | None
  ignored_by: str


class Eod(int):
  """The EOD, and how documents are read: no other value of a config gets to what opens MaxText's files."""

  reading: Reading

  def __new__(cls, eod_id: int, reading: Reading) -> "Eod":
    token = super().__new__(cls, eod_id)
    token.reading = reading
    return token

  def __reduce__(self) -> tuple[Any, ...]:
    return Eod, (int(self), self.reading)


def stream_source(call: Call) -> Any:
  """As MaxText's `create_mmap_source` (`mmap`): rows of L tokens, cut from the stream of documents.

  Raises:
    DataError: the files cannot be read, a token id in a sample of them is not in the vocabulary, or there is no row.
  """
  eod, length, split = call["eod_id"], call["seq_length"], call["split_sentences"]
  given = call["path_prefix"].strip()
  if "|" in given:
    raise DataError(f"{given}: INDEX|PREFIX is for grain_file_type=mmap_npy; mmap has no index, name the prefix alone")
  prefixes, files = _open([given], split)
  megatron_checks.check_sequences(files, by_document=False)
  documents = _documents(prefixes, split, eod.reading.vocab_size)
  megatron_checks.check_sample(documents, eod.reading.ignored, eod.reading.ignored_by)
  inner = documents if eod.reading.bos_id is None else DocumentsAfterBos(documents, eod.reading.bos_id)
  rows = _mmap_datasource.MMapSampleIndexDataSource(inner, seq_length=length, eod_id=int(eod))
  if not len(rows):
    raise DataError(
      f"{listed(prefixes)}: {files.tokens():,} tokens make no row of max_target_length={length}; take a smaller "
      "one, or more documents"
    )
  return grain.MapDataset.source(rows)


def samples_source(call: Call) -> Any:
  """As MaxText's `create_mmap_npy_source` (`mmap_npy`): Megatron's samples of L + 1 tokens.

  Raises:
    DataError: as `stream_source`; or the index folder was made for other files, or cannot be written.
  """
  eod, length, split = call["eod_id"], call["seq_length"], call["split_sentences"]
  given = call["spec"]
  if given.count("|") != 1 or not all(part.strip() for part in given.split("|")):
    raise DataError(f"{given!r}: grain_file_type=mmap_npy takes INDEX_FOLDER|PREFIX, a folder that MaxText may write")
  folder, paths = _mmap_datasource._parse_mmap_npy_spec(given)
  prefixes, files = _open(paths, split)
  part, part_index = call.get("split", None), call.get("split_index", 0)
  megatron_checks.check_sequences(files, by_document=True)
  number, tokens = _part(prefixes, files, part, part_index)
  found, made = _indices(folder, paths, call, part, part_index)
  if made is None:
    order, starts, _ = _mmap_datasource._discover_npy_indices(folder, expected_hash=found)
    index = np.load(order, mmap_mode="r"), np.load(starts, mmap_mode="r")
    megatron_checks.check_index(folder, *index, files, number, tokens, length)
  megatron_checks.check_sample(_documents(prefixes, split, eod.reading.vocab_size), None, "")
  megatron_checks.warn_if_repeated(prefixes, tokens, length)
  return grain.MapDataset.source(
    CheckedSamples(folder, paths, int(eod), length, split, found, made, vocab_size=eod.reading.vocab_size)
  )


def _indices(folder: str, paths: list[str], call: Call, part: str | None, part_index: int) -> tuple[str, Any]:
  """MaxText's (hash of the index files, the index if they had to be made)."""
  try:
    return _mmap_datasource._ensure_npy_indices(
      folder, paths, call.get("num_samples", None), call["seq_length"], seed=call.get("seed", 1234), split=part,
      split_index=part_index, num_epoch=call.get("num_epoch", 1),
    )  # fmt: skip
  except OSError as error:
    raise DataError(
      f"{folder}: MaxText cannot write its indices into this folder ({error.strerror or error}); name one that may be "
      "written, INDEX_FOLDER|PREFIX"
    ) from error


def _part(prefixes: tuple[str, ...], files: Files, part: str | None, index: int) -> tuple[int, int]:
  """(documents, tokens) of the part of the files that mmap_npy_split takes."""
  if part is None:
    return len(files), files.tokens()
  begin, end = _mmap_index_utils.parse_split_range(part, index, len(files))
  tokens = _mmap_index_utils.get_split_tokens(list(prefixes), begin, end) if end > begin else 0
  if not tokens:
    use = ("training", "evaluation")[index] if index < 2 else f"part {index}"
    raise DataError(
      f"mmap_npy_split={part!r}: leaves no token of the {len(files):,} documents of {listed(prefixes)} for {use}; "
      "choose larger shares, or name files of their own"
    )
  return end - begin, tokens


def _documents(prefixes: tuple[str, ...], split: bool, vocab_size: int) -> CheckedDocuments:
  """MaxText's source of documents, checked."""
  source = _mmap_datasource.MultiShardMMapIndexedDataSource(list(prefixes), split_sentences=split)
  return CheckedDocuments(source, prefixes, split, vocab_size)


def _open(paths: list[str], split: bool) -> tuple[tuple[str, ...], Files]:
  """(prefixes, files) of what the settings name: prefixes, or folders with files."""
  for path in paths:
    _check_path(path)
  prefixes = tuple(_mmap_datasource._resolve_bin_prefixes(paths))
  files = Files.open(prefixes, split)
  megatron_checks.check_files(files)
  return prefixes, files


def _check_path(path: str) -> None:
  """Refuses a path that names no files, with what is there instead."""
  if os.path.isfile(f"{path}.idx") or os.path.isdir(path):
    return
  stem, suffix = os.path.splitext(path)
  if suffix in (".bin", ".idx"):
    raise DataError(f"{path}: a prefix is named without .bin and .idx; write {stem}")
  if os.path.isfile(f"{path}.bin"):
    raise DataError(f"{path}.bin: there is no {path}.idx beside it, and MaxText reads both; make or copy both")
  raise DataError(f"{path}: there is no {path}.idx, nor a folder of this name; name PREFIX of PREFIX.bin and PREFIX.idx")


class CheckedSamples(_mmap_datasource.MegatronNpyDataSource):
  """Megatron's samples of L + 1 tokens, from checked documents, each of its full length.

  Args:
    args: of MaxText's class, by its names.
    vocab_size: the documents' ids are from 0 to vocab_size - 1.
  """

  def __init__(self, *args: Any, vocab_size: int, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._arguments = (args, kwargs, vocab_size)
    prefixes = tuple(_mmap_datasource._resolve_bin_prefixes(self._bin_paths))
    found: Any = vars(self)["_token_source"]
    self._token_source: Any = CheckedDocuments(found, prefixes, self._split_sentences, vocab_size)

  def _build_sample(self, doc_idx_beg: Any, doc_idx_end: Any) -> Any:
    """The tokens of a sample; MaxText would fill a short one up with EODs."""
    tokens = super()._build_sample(doc_idx_beg, doc_idx_end)
    if len(tokens) != self._seq_length + 1:
      why = f"a row has {len(tokens)} tokens, not {self._seq_length + 1}"
      raise megatron_checks.other_files(self._npy_dir, self._token_source.prefixes, why)
    return tokens

  def __reduce__(self) -> tuple[Any, ...]:
    return _samples_again, self._arguments


def _samples_again(args: tuple[Any, ...], kwargs: dict[str, Any], vocab_size: int) -> CheckedSamples:
  """The source in one of grain's processes, which opens the files again."""
  return CheckedSamples(*args, vocab_size=vocab_size, **kwargs)
