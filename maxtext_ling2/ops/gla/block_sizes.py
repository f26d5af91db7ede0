"""Chunk size, chunks and heads per grid step: a table per TPU generation, chosen by counting cycles.

Made by `python benchmarks/gla_block_sizes.py` (T = 4096, H = 16, D = 128, bfloat16): of the sizes it tries, those with
the shortest forward and backward pass. More heads per step hide the latency of the MXU, longer steps pay the start of
the pipeline less often, and a longer chunk reads and writes fewer states but multiplies more.
"""

from typing import Final, NamedTuple

from maxtext_ling2.ops.devices import device_kind
from maxtext_ling2.ops.pallas_utils import LANES


class Block(NamedTuple):
  """The work of one grid step of a kernel."""

  chunk_size: int  # tokens per chunk: its scores are one [chunk_size, chunk_size] matrix
  num_chunks: int  # chunks per step
  num_heads: int  # heads per step


class BlockSizes(NamedTuple):
  """Blocks of both kernels, which share one chunk size: the backward kernel reads the states of the forward kernel."""

  forward: Block
  backward: Block


_BLOCK_SIZES: Final = {
  "TPU v4": BlockSizes(Block(128, 4, 4), Block(128, 4, 2)),
  "TPU v5 lite": BlockSizes(Block(256, 4, 4), Block(256, 4, 4)),
  "TPU v5": BlockSizes(Block(128, 8, 8), Block(128, 8, 8)),
  "TPU v6 lite": BlockSizes(Block(256, 4, 4), Block(256, 4, 4)),
  "TPU7x": BlockSizes(Block(128, 8, 8), Block(128, 8, 8)),
}
"""By `device_kind`, the name JAX gives a generation."""

_DEFAULT: Final = BlockSizes(Block(128, 4, 4), Block(128, 4, 4))
"""For devices that are not listed, and for CPUs, which use only the chunk size."""

_GPU_CHUNK_SIZE: Final = 512
"""For NVIDIA GPUs, which have no kernels here: of 128, 256, 512 and 1024 the fastest on an H200 (docs/kernels.md)."""

_ROW_BYTES: Final = 256
"""Bytes per token and head in the shape that the table is made for."""


def chunk_size(length: int, kind: str | None = None) -> int:
  """Tokens per chunk for a sequence of `length` tokens on a kind of device (None: `device_kind()`)."""
  kind = kind or device_kind()
  size = _GPU_CHUNK_SIZE if kind.startswith("NVIDIA") else _BLOCK_SIZES.get(kind, _DEFAULT).forward.chunk_size
  return min(size, -(-length // LANES) * LANES)


def block_sizes_for(length: int, heads: int, width: int, itemsize: int, kind: str | None = None) -> BlockSizes:
  """Block sizes that fit a shape.

  Args:
    length: tokens of a sequence.
    heads: number of heads; the heads per step divide it.
    width: the larger head dimension, a multiple of 128.
    itemsize: bytes of an element.
    kind: the kind of device; None: `device_kind()`.
  """
  kind = kind or device_kind()
  size = chunk_size(length, kind)
  forward, backward = (_fit(block, size, length, heads, width * itemsize) for block in _BLOCK_SIZES.get(kind, _DEFAULT))
  return BlockSizes(forward, backward)


def _fit(block: Block, size: int, length: int, heads: int, row_bytes: int) -> Block:
  """The block with no more chunks than the sequence has, and with fewer heads, then chunks, if a token has more bytes."""
  room = max(1, block.num_heads * _ROW_BYTES // row_bytes)
  num_heads = max(divisor for divisor in range(1, min(room, heads) + 1) if heads % divisor == 0)
  room = max(1, block.num_chunks * block.num_heads * _ROW_BYTES // (num_heads * row_bytes))
  return Block(size, min(block.num_chunks, room, -(-length // size)), num_heads)
