"""Tiles of the experts' grouped products: which of MaxText's fields hold them, and what a user may set. As `validation`.

A tile that nobody sets is BY_CHIP in a LING2 run; the table of `ops/experts/tiles.py` answers for it once the chip is
known, when a program is traced.
"""

import math
from collections.abc import Iterator
from typing import Any, Final

BY_CHIP: Final = 0
"""The value of a field that the user has not set. No tile has this size."""

DIRECTIONS: Final = ("fwd", "dlhs", "drhs")
AXES: Final = ("batch_seq", "embed_dim", "mlp_dim")
PROJECTIONS: Final = ("wi", "wo")

TILES: Final = {
  f"{prefix}{projection}_tile_{direction}_{axis}": (f"{projection}_{direction}", axis)
  for prefix, directions in (("", DIRECTIONS), ("eval_", ("fwd",)))
  for projection in PROJECTIONS
  for direction in directions
  for axis in AXES
}
"""Field -> (product, axis). The eval_ ones are those of the forward pass in an evaluation."""

SMALLEST_ROWS: Final = 128
"""Every number of rows in the table is this times a power of two."""

_SUBLANES: Final = 8
"""Rows of a register; a tile holds a multiple of them."""


def padding(field: str) -> str:
  """The field to whose multiples MaxText pads the rows, for a product's `batch_seq` field."""
  return "eval_wi_tile_fwd_batch_seq" if field.startswith("eval_") else "wi_tile_fwd_batch_seq"


def problems(config: Any) -> Iterator[str]:
  """Sentences about the tiles of a LING2 config, where a kernel reads them.

  MaxText pads the rows to `wi_tile_fwd_batch_seq` alone, and megablox refuses rows that its tiles do not divide.
  """
  for field in TILES:
    if getattr(config, field, BY_CHIP) < 0:
      yield f"{field}={getattr(config, field)}: a tile cannot be negative; leave it out for the one that suits the chip"
  if not (config.sparse_matmul and config.megablox and not config.use_tokamax_gmm):  # others take any number of rows
    return
  for field, (_, axis) in TILES.items():
    if axis == "batch_seq" and (tile := getattr(config, field, BY_CHIP)) > 0:
      yield from _rows(config, field, tile)


def _rows(config: Any, field: str, tile: int) -> Iterator[str]:
  """A number of rows that the user has set."""
  whole = padding(field)
  if field == whole:
    if math.gcd(tile, SMALLEST_ROWS) < _SUBLANES:
      yield (
        f"{field}={tile}: the rows of the experts are padded to it and tiles hold {_SUBLANES} at a time; use a multiple"
      )
    return
  padded = getattr(config, whole, BY_CHIP)
  if (padded or SMALLEST_ROWS) % tile:
    found = f"{padded}" if padded else f"chosen by chip, at least {SMALLEST_ROWS}"
    yield (
      f"{field}={tile}: the rows of the experts are padded to multiples of {whole} ({found}), so this tile must divide "
      f"it; set {whole}={math.lcm(padded or SMALLEST_ROWS, tile)}, too, or leave {field} out"
    )
