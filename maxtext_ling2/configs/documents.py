"""Rules about documents: `pad_id`, `bos_id` and MaxText's settings of Megatron files, in the form of `validation`."""

from collections.abc import Iterator
from typing import Any

from maxtext_ling2.configs.fields import DEFAULTS


def problems(config: Any) -> Iterator[str]:
  """Broken rules about the documents of a LING2 config, one sentence each."""
  yield from _pad_id(config)
  yield from _bos_id(config)
  yield from _eod_id(config)
  yield from _split(config)


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


def _eod_id(c: Any) -> Iterator[str]:
  if reads_mmap(c) and not 0 <= c.mmap_eod_id < c.vocab_size:
    yield (
      f"mmap_eod_id={c.mmap_eod_id}: not a token of the vocabulary, vocab_size={c.vocab_size}, so no document would end; "
      "take the token that the files were made with"
    )


def _split(c: Any) -> Iterator[str]:
  split = getattr(c, "mmap_npy_split", "")
  if not split or not reads_mmap(c):
    return
  if c.grain_file_type != "mmap_npy":
    yield (
      f"mmap_npy_split={split!r}: only grain_file_type=mmap_npy reads it, mmap would train on all documents; leave it "
      "out, or take mmap_npy"
    )
  elif not _are_shares(split.split(",")):
    yield (
      f"mmap_npy_split={split!r}: not shares of training and evaluation, numbers with a comma between them; write 99,1, "
      "or leave it out"
    )


def _are_shares(words: list[str]) -> bool:
  """Whether words are two or more numbers, none negative, with a positive sum."""
  try:
    shares = [float(word) for word in words]
  except ValueError:
    return False
  return len(shares) > 1 and min(shares) >= 0 and 0 < sum(shares) < float("inf")
