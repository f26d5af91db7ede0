"""Seam: the documents of Megatron files, checked as they are read, and a BOS before each of `mmap` if it is asked for.

MaxText joins all documents to one stream and cuts rows from it, which is concat_then_split without saying so. A BOS is
put before the documents that this stream is made of, so order, sharding, shuffling and resume stay MaxText's.
"""

import dataclasses
from typing import Any

from maxtext_ling2.configs import documents
from maxtext_ling2.host.contract import Expectation, expect
from maxtext_ling2.host.lazy import Lazy
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Seam, Use

_GRAIN = "maxtext.input_pipeline.grain_data_processing"
_SOURCES = "maxtext.input_pipeline._mmap_datasource"
_INDICES = "maxtext.input_pipeline._mmap_index_utils"
_OURS = "maxtext_ling2.host.megatron_sources"


class MmapDocumentsSeam(Seam):
  """Opens the files of LING2 runs with checks, and puts `config.bos_id` before documents."""

  name = "mmap documents"
  module = _GRAIN
  use = Use("grain_file_type=mmap or mmap_npy", documents.reads_mmap, "take other data")
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
      "create_mmap_npy_source(spec, eod_id, seq_length, split_sentences, num_samples, seed, split, split_index)",
      "_resolve_bin_prefixes(bin_paths)",
      "_parse_mmap_npy_spec(spec)",
      "_ensure_npy_indices(npy_dir, bin_paths, num_samples, seq_length, seed, split, split_index, num_epoch)",
      "_discover_npy_indices(npy_dir, expected_hash)",
      "MMapIndexedDataset(path_prefix)",
      "MMapIndexedDataset.sizes",
      "MMapIndexedDataset.pointers",
      "MMapIndexedDataset.doc_idx",
      "MMapIndexedDataset.dtype",
      "MMapIndexedDataSource.doc_token_counts",
      "MMapIndexedDataSource.check_eod_presence(eod_id, mode_label)",
      "MultiShardMMapIndexedDataSource(path_prefixes, split_sentences)",
      "MMapSampleIndexDataSource(inner_source, seq_length, eod_id)",
      "MegatronNpyDataSource.__init__(npy_dir, bin_paths, eod_id, seq_length, split_sentences, expected_hash, "
      "prebuilt_indices)",
      "MegatronNpyDataSource._build_sample(doc_idx_beg, doc_idx_end)",
    ),
    *expect(
      _INDICES,
      "parse_split_range(split_str, split_index, num_docs)",
      "get_split_tokens(path_prefixes, start_doc, end_doc)",
    ),
  )

  def apply(self) -> None:
    from maxtext.input_pipeline import _mmap_datasource, grain_data_processing

    self.patches.wrap_for_ling2(grain_data_processing, "_build_dataset_config", _describe)
    self.patches.wrap(_mmap_datasource, "create_mmap_source", _for_ling2(Lazy(f"{_OURS}:stream_source")))
    self.patches.wrap(_mmap_datasource, "create_mmap_npy_source", _for_ling2(Lazy(f"{_OURS}:samples_source")))


def _describe(call: Call) -> Any:
  """As MaxText's `_build_dataset_config`, with an EOD that brings what else LING2's settings say of documents."""
  description = call.original()
  if description is None:
    return description
  from maxtext_ling2.host.megatron_sources import Eod, Reading

  config = call.config
  bos_id = config.bos_id if documents.inserts_bos(config) else None
  masked = config.eod_mask_loss and config.pad_id == config.mmap_eod_id
  ignored = None if masked else config.pad_id
  reading = Reading(config.vocab_size, bos_id, ignored, f"pad_id={config.pad_id}")
  return dataclasses.replace(description, eod_id=Eod(description.eod_id, reading))


def _for_ling2(ours: Any) -> Any:
  """A wrapper that lets `ours` answer the calls in which the EOD brings LING2's settings."""

  def opened(original: Any, *args: Any, **kwargs: Any) -> Any:
    call = Call(original, args, kwargs)
    return ours(call) if hasattr(call["eod_id"], "reading") else original(*args, **kwargs)

  return opened
