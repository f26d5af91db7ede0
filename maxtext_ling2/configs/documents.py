"""Rules about tokens that are put beside documents: padding, and what begins a document. In the form of `validation`."""

from collections.abc import Iterator
from typing import Any

from maxtext_ling2.configs.fields import DEFAULTS


def problems(config: Any) -> Iterator[str]:
  """Sentences about `pad_id` and `bos_id` of a LING2 config."""
  yield from _padding(config)
  yield from _beginning(config)


def inserts_bos(config: Any) -> bool:
  """Whether documents of a LING2 run get `bos_id` before them: MaxText's words for it, which its `mmap` does not read."""
  packs = config.packing and config.grain_packing_type == "concat_then_split"
  return bool(config.dataset_type == "grain" and config.grain_file_type == "mmap" and packs and config.add_bos)


def end_of_document(config: Any) -> int | None:
  """The token behind which another document begins, where it is known and documents do not see each other; else None."""
  return int(config.mmap_eod_id) if reads_mmap(config) and config.reset_attention_mask else None


def reads_mmap(config: Any) -> bool:
  """Whether a run reads Megatron files."""
  return bool(config.dataset_type == "grain" and config.grain_file_type in ("mmap", "mmap_npy"))


def _padding(c: Any) -> Iterator[str]:
  """pad_id, which the mmap pipelines read."""
  pad, off = getattr(c, "pad_id", DEFAULTS["pad_id"]), DEFAULTS["pad_id"]
  if not 0 <= pad < c.vocab_size:
    yield f"pad_id={pad}: no token of a vocabulary of vocab_size={c.vocab_size}; choose one from 0 on below it"
  elif pad != off and not reads_mmap(c):
    yield (
      f"pad_id={pad}: only dataset_type=grain with grain_file_type=mmap or mmap_npy reads it; other pipelines ask "
      f"their tokenizer; leave it at {off}"
    )


def _beginning(c: Any) -> Iterator[str]:
  """bos_id, which one of the mmap pipelines reads."""
  if not inserts_bos(c):
    if c.bos_id != (off := DEFAULTS["bos_id"]):
      yield (
        f"bos_id={c.bos_id}: only dataset_type=grain, grain_file_type=mmap, packing=true with "
        f"grain_packing_type=concat_then_split and add_bos=true reads it (samples of mmap_npy are Megatron's, without a "
        f"BOS; other pipelines ask their tokenizer); set these, or leave it at {off}"
      )
  elif not 0 <= c.bos_id < c.vocab_size:
    yield f"bos_id={c.bos_id}: no token of a vocabulary of vocab_size={c.vocab_size}; choose one from 0 on below it"
  elif c.bos_id == getattr(c, "mmap_eod_id", None):
    yield (
      f"bos_id={c.bos_id}: that is mmap_eod_id, behind which a document ends, so that each would end at its first token; "
      f"choose another token, or add_bos=false"
    )
