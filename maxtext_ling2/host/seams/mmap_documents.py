"""Seam: a BOS before each document of MaxText's `mmap` data, which has none (its files end documents with an EOD).

MaxText joins all documents to one stream and cuts rows from it, which is concat_then_split without saying so. The token
is put before the documents that this stream is made of, so order, sharding, shuffling and resume stay MaxText's.
"""

import dataclasses
from typing import Any

from maxtext_ling2.configs import documents
from maxtext_ling2.host.contract import Expectation, expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Seam, Use

_GRAIN = "maxtext.input_pipeline.grain_data_processing"
_SOURCES = "maxtext.input_pipeline._mmap_datasource"


class MmapDocumentsSeam(Seam):
  """Puts `config.bos_id` before the documents of LING2 runs."""

  name = "mmap documents"
  module = _GRAIN
  use = Use(
    "add_bos=true, packing=true and grain_file_type=mmap", documents.inserts_bos, "set add_bos=false or take other data"
  )
  expectations = (
    *expect(_GRAIN, "_build_dataset_config(config)"),
    Expectation(
      f"{_SOURCES}:MMapDatasetConfig",
      holds=lambda kind: "eod_id" in {field.name for field in dataclasses.fields(kind)},
      meaning="a dataclass with the field eod_id",
    ),
    *expect(
      _SOURCES,
      "create_mmap_source(path_prefix, split_sentences, seq_length, eod_id)",
      "_resolve_bin_prefixes(bin_paths)",
      "MMapIndexedDataSource.doc_token_counts",
      "MMapIndexedDataSource.check_eod_presence(eod_id, mode_label)",
      "MultiShardMMapIndexedDataSource(path_prefixes, split_sentences)",
      "MMapSampleIndexDataSource(inner_source, seq_length, eod_id)",
    ),
  )

  def apply(self) -> None:
    from maxtext.input_pipeline import _mmap_datasource, grain_data_processing

    self.patches.wrap_for_ling2(grain_data_processing, "_build_dataset_config", _describe)
    self.patches.wrap(_mmap_datasource, "create_mmap_source", _source)


def _describe(call: Call) -> Any:
  """As MaxText's `_build_dataset_config`, with an EOD that brings the BOS."""
  description = call.original()
  if description is None or not documents.inserts_bos(call.config):
    return description
  return dataclasses.replace(description, eod_id=_EodThenBos(description.eod_id, call.config.bos_id))


class _EodThenBos(int):
  """The EOD, and the token that follows it: no other token of a config gets to what opens MaxText's files."""

  bos_id: int

  def __new__(cls, eod_id: int, bos_id: int) -> "_EodThenBos":
    token = super().__new__(cls, eod_id)
    token.bos_id = bos_id
    return token


def _source(original: Any, *args: Any, **kwargs: Any) -> Any:
  """As MaxText's `create_mmap_source`, with a BOS before each document if the EOD brings one."""
  call = Call(original, args, kwargs)
  if not isinstance(call["eod_id"], _EodThenBos):
    return original(*args, **kwargs)
  import grain
  from maxtext.input_pipeline import _mmap_datasource

  prefixes = _mmap_datasource._resolve_bin_prefixes(call["path_prefix"].strip())
  source = _mmap_datasource.MultiShardMMapIndexedDataSource(prefixes, split_sentences=call["split_sentences"])
  rows = _mmap_datasource.MMapSampleIndexDataSource(
    DocumentsAfterBos(source, call["eod_id"].bos_id), seq_length=call["seq_length"], eod_id=int(call["eod_id"])
  )
  return grain.MapDataset.source(rows)


@dataclasses.dataclass(frozen=True)
class DocumentsAfterBos:
  """What MaxText's `MMapSampleIndexDataSource` needs of a source of documents; an empty document stays empty.

  Attributes:
    documents: MaxText's source, {"text": tokens [length]} by index.
    bos_id: token put before each.
  """

  documents: Any
  bos_id: int

  def doc_token_counts(self) -> Any:
    """Tokens of each document, [N] int64."""
    counts = self.documents.doc_token_counts()
    return counts + (counts > 0)

  def __getitem__(self, index: int) -> dict[str, Any]:
    import numpy as np

    tokens = self.documents[index]["text"]
    return {"text": np.concatenate([np.array([self.bos_id], np.int32), tokens]) if len(tokens) else tokens}

  def check_eod_presence(self, eod_id: int, mode_label: str) -> None:
    """Warns, as MaxText, where no document ends with the EOD."""
    self.documents.check_eod_presence(eod_id, mode_label)
