"""How many tokens and heads a chunk and a grid step hold: data, chosen for each TPU generation by counting cycles.

Made by `python benchmarks/gla_tiles.py` (T = 4096, H = 16, D = 128, bfloat16): of the tiles it tries, the one with the
shortest forward and backward pass. More heads a step hide the latency of the matrix units, longer steps pay the
pipeline's start less often, and a longer chunk reads and writes fewer states but multiplies more.
"""

from typing import Final, NamedTuple

from maxtext_ling2.ops.devices import device_kind
from maxtext_ling2.ops.pallas_utils import LANES


class Tile(NamedTuple):
  """What one grid step of a kernel works on."""

  chunk: int  # tokens of a chunk: its scores are one [chunk, chunk] block
  chunks: int  # chunks of a step
  heads: int  # heads of a step


class Tiles(NamedTuple):
  """Tiles of the forward and of the backward kernel, which have one chunk size, because one reads the other's states."""

  forward: Tile
  backward: Tile


_TILES: Final = {
  "TPU v4": Tiles(Tile(128, 4, 4), Tile(128, 4, 2)),
  "TPU v5 lite": Tiles(Tile(256, 4, 4), Tile(256, 4, 4)),
  "TPU v5": Tiles(Tile(128, 8, 8), Tile(128, 8, 8)),
  "TPU v6 lite": Tiles(Tile(256, 4, 4), Tile(256, 4, 4)),
  "TPU7x": Tiles(Tile(128, 8, 8), Tile(128, 8, 8)),
}
"""By `device_kind`, the name JAX gives a generation."""

_OTHER: Final = Tiles(Tile(128, 4, 4), Tile(128, 4, 4))
"""For devices that are not listed, and CPUs, for which only the chunk counts."""

_GPU_CHUNK: Final = 512
"""For NVIDIA's GPUs, which have no kernels here: of 128, 256, 512 and 1024 the fastest on an H200 (docs/kernels.md)."""

_ROW_BYTES: Final = 256
"""Bytes of a token and head in the shape the tiles were chosen for."""


def chunk_size(length: int, kind: str | None = None) -> int:
  """Tokens of a chunk for a sequence of `length` tokens on a kind of device (None: `device_kind()`)."""
  kind = kind or device_kind()
  chunk = _GPU_CHUNK if kind.startswith("NVIDIA") else _TILES.get(kind, _OTHER).forward.chunk
  return min(chunk, -(-length // LANES) * LANES)


def tiles_for(length: int, heads: int, width: int, itemsize: int, kind: str | None = None) -> Tiles:
  """Tiles that fit a shape.

  Args:
    length: tokens of a sequence.
    heads: number of heads; those of a step divide it.
    width: the larger head dimension, a multiple of 128.
    itemsize: bytes of an element.
    kind: the kind of device; None: `device_kind()`.
  """
  kind = kind or device_kind()
  chunk = chunk_size(length, kind)
  forward, backward = (_fit(tile, chunk, length, heads, width * itemsize) for tile in _TILES.get(kind, _OTHER))
  return Tiles(forward, backward)


def _fit(tile: Tile, chunk: int, length: int, heads: int, row_bytes: int) -> Tile:
  """The tile with no more chunks than the sequence has, and fewer heads, then chunks, if a token is wide."""
  room = max(1, tile.heads * _ROW_BYTES // row_bytes)
  used_heads = max(divisor for divisor in range(1, min(room, heads) + 1) if heads % divisor == 0)
  room = max(1, tile.chunks * tile.heads * _ROW_BYTES // (used_heads * row_bytes))
  return Tile(chunk, min(tile.chunks, room, -(-length // chunk)), used_heads)
