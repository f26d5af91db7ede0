"""Rules about `pad_id` and `bos_id`, in the form of `validation`."""

from collections.abc import Iterator
from typing import Any

from maxtext_ling2.configs.fields import DEFAULTS


def problems(config: Any) -> Iterator[str]:
  """Broken rules about `pad_id` and `bos_id` of a LING2 config, one sentence each."""
  yield from _pad_id(config)
  yield from _bos_id(config)


def inserts_bos(config: Any) -> bool:
  """True if a LING2 run puts `bos_id` before each document: by MaxText's BOS settings, which its own `mmap` ignores."""
  packs = config.packing and config.grain_packing_type == "concat_then_split"
  return bool(config.dataset_type == "grain" and config.grain_file_type == "mmap" and packs and config.add_bos)


def end_of_document(config: Any) -> int | None:
  """The last token of every document, if it is known and documents do not see each other; else None."""
  return int(config.mmap_eod_id) if reads_mmap(config) and config.reset_attention_mask else None


def reads_mmap(config: Any) -> bool:
  """Whether a run reads Megatron files."""
  return bool(config.dataset_type == "grain" and config.grain_file_type in ("mmap", "mmap_npy"))


def _pad_id(c: Any) -> Iterator[str]:
  pad, off = getattr(c, "pad_id", DEFAULTS["pad_id"]), DEFAULTS["pad_id"]
  if not 0 <= pad < c.vocab_size:
    yield f"pad_id={pad}: not a token of the vocabulary, vocab_size={c.vocab_size}; choose one from 0 to vocab_size - 1"
  elif pad != off and not reads_mmap(c):
    yield (
      f"pad_id={pad}: only dataset_type=grain with grain_file_type=mmap or mmap_npy reads it; other pipelines use "
      f"their tokenizer's; leave it at {off}"
    )


def _bos_id(c: Any) -> Iterator[str]:
  if not inserts_bos(c):
    if c.bos_id != (off := DEFAULTS["bos_id"]):
      yield (
        f"bos_id={c.bos_id}: only dataset_type=grain, grain_file_type=mmap, packing=true with "
        f"grain_packing_type=concat_then_split and add_bos=true reads it (samples of mmap_npy are Megatron's, without a "
        f"BOS; other pipelines use their tokenizer's); set these, or leave it at {off}"
      )
  elif not 0 <= c.bos_id < c.vocab_size:
    yield (
      f"bos_id={c.bos_id}: not a token of the vocabulary, vocab_size={c.vocab_size}; choose one from 0 to vocab_size - 1"
    )
  elif c.bos_id == getattr(c, "mmap_eod_id", None):
    yield (
      f"bos_id={c.bos_id}: equal to mmap_eod_id, so every document would end at its first token; choose another token, "
      "or add_bos=false"
    )
