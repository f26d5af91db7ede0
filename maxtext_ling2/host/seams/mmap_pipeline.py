"""Seam: what pads the batches of MaxText's pipelines for Megatron files, `mmap` and `mmap_npy`.

MaxText 0.2.5 pads with the EOD. In `mmap` an EOD is then never a target, whatever eod_mask_loss says; and rows that fill
up a last batch get the EOD as segment, too, so that they count in the loss.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from maxtext_ling2.configs import documents
from maxtext_ling2.host.contract import Expectation, expect
from maxtext_ling2.host.seam import Handlers, Seam, Use

_GRAIN = "maxtext.input_pipeline.grain_data_processing"
_TRANSFORMS = "maxtext.input_pipeline.input_pipeline_utils"
_MASKS = ("eod_id", "reset_attention_mask", "eod_mask_loss", "min_segment_length")
_PARAMETERS = ("dataset", "config", "text_column", "grain_worker_count", "grain_per_worker_buffer_size")


class MmapPipelineSeam(Seam):
  """Builds LING2's pipeline of the same transforms with a token for padding, `pad_id`."""

  name = "mmap pipelines"
  module = _GRAIN
  use = Use("grain_file_type=mmap or mmap_npy", documents.reads_mmap, "take other data")
  expectations = (
    Expectation(f"{_GRAIN}:_mmap_pretrain_pipeline", parameters=_PARAMETERS),
    Expectation(f"{_TRANSFORMS}:MegatronSplitInputsTargets", parameters=_MASKS),
    Expectation(f"{_TRANSFORMS}:GenerateDocSegmentIds", parameters=_MASKS),
    *expect(
      _GRAIN,
      "_make_mmap_multiprocessing_options(dataset, config, grain_worker_count, grain_per_worker_buffer_size)",
    ),
    *expect(_TRANSFORMS, "ShiftData(ignored_ids, axis)", "Rekey", "megatron_min_segment_length(config)"),
    *expect("maxtext.input_pipeline.data_processing_utils", "get_local_batch_size(config)"),
  )

  def handlers(self) -> Handlers:
    return {"_mmap_pretrain_pipeline": lambda call: _pipeline(*(call[name] for name in _PARAMETERS))}


def _pipeline(
  dataset: Any, config: Any, text_column: str, grain_worker_count: int, grain_per_worker_buffer_size: int
) -> Any:
  """As MaxText's `_mmap_pretrain_pipeline`, in its order, padded with `pad_id`."""
  from maxtext.input_pipeline import data_processing_utils, grain_data_processing
  from maxtext.input_pipeline import input_pipeline_utils as transforms

  ready_made = config.grain_file_type == "mmap_npy"  # L + 1 tokens; `mmap`: L tokens, the last of which predicts nothing
  masks = {
    "eod_id": config.mmap_eod_id,
    "reset_attention_mask": config.reset_attention_mask,
    # In `mmap`, MaxText takes a masked EOD out of its segment, too, so that attention and states would miss it: the loss
    # is masked at the end instead.
    "eod_mask_loss": config.eod_mask_loss and ready_made,
    "min_segment_length": transforms.megatron_min_segment_length(config),
  }
  if ready_made:
    dataset = dataset.map(transforms.MegatronSplitInputsTargets(**masks))
  else:
    dataset = dataset.map(transforms.Rekey({"inputs": text_column, "targets": text_column}))
    dataset = dataset.map(transforms.GenerateDocSegmentIds(**masks))
  workers = grain_data_processing._make_mmap_multiprocessing_options(
    dataset, config, grain_worker_count, grain_per_worker_buffer_size
  )
  size = data_processing_utils.get_local_batch_size(config)
  fill = functools.partial(filled_batch, batch_size=size, pad_id=config.pad_id)
  if ready_made:  # each worker reads a part of the rows in order, so workers stand before the batch
    return dataset.mp_prefetch(workers).batch(size, batch_fn=fill)
  not_targets = [config.pad_id, *([config.mmap_eod_id] if config.eod_mask_loss else [])]
  return (
    dataset.batch(size, batch_fn=fill).map(transforms.ShiftData(ignored_ids=not_targets, axis=1)).mp_prefetch(workers)
  )


def filled_batch(rows: Sequence[Mapping[str, Any]], *, batch_size: int, pad_id: int) -> dict[str, Any]:
  """A batch of rows; where they are too few, rows of `pad_id` that belong to no segment and count for nothing.

  Args:
    rows: arrays [L] by name: inputs, targets, and their segments and positions.
    batch_size: rows of the batch, B.
    pad_id: the token.

  Returns:
    Arrays [B, L] by name.
  """
  import grain

  batch = dict(grain.experimental.batch_and_pad(rows, batch_size=batch_size, pad_value=0))
  for name in ("inputs", "targets"):
    batch[name][len(rows) :] = pad_id
  return batch
