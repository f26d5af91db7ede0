"""Tiles of the experts' grouped matmuls: MaxText's fields for them, and rules about them in the form of `validation`.

A tile that the user does not set is BY_CHIP in a LING2 run: the table in `ops/experts/tiles.py` decides when a program is
traced and the chip is known.
"""

import math
from collections.abc import Iterator
from typing import Any, Final

BY_CHIP: Final = 0
"""The value of a field that the user has not set; not the size of any tile."""

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
"""Field -> (matmul, axis). Those with eval_ are for the forward pass of an evaluation."""

SMALLEST_ROWS: Final = 128
"""Every batch_seq tile in the table is this times a power of two."""

_SUBLANES: Final = 8
"""Rows of a vector register; a tile has a multiple of them."""


def padding(field: str) -> str:
  """The field to whose multiples MaxText pads the rows of the matmul with this `batch_seq` field."""
  return "eval_wi_tile_fwd_batch_seq" if field.startswith("eval_") else "wi_tile_fwd_batch_seq"


def problems(config: Any) -> Iterator[str]:
  """Broken rules about the tiles of a LING2 config, one sentence each.

  MaxText pads the rows to multiples of `wi_tile_fwd_batch_seq` alone, and megablox needs tiles that divide the rows.
  """
  for field in TILES:
    if getattr(config, field, BY_CHIP) < 0:
      yield f"{field}={getattr(config, field)}: a tile cannot be negative; leave it out for the one that suits the chip"
  if not (
    config.sparse_matmul and config.megablox and not config.use_tokamax_gmm
  ):  # other kernels take any number of rows
    return
  for field, (_, axis) in TILES.items():
    if axis == "batch_seq" and (tile := getattr(config, field, BY_CHIP)) > 0:
      yield from _rows(config, field, tile)


def _rows(config: Any, field: str, tile: int) -> Iterator[str]:
  """A batch_seq tile that the user has set."""
  padded_to = padding(field)
  if field == padded_to:
    if math.gcd(tile, SMALLEST_ROWS) < _SUBLANES:
      yield f"{field}={tile}: the rows of the experts are padded to it, so it must be a multiple of {_SUBLANES}"
    return
  padded = getattr(config, padded_to, BY_CHIP)
  if (padded or SMALLEST_ROWS) % tile:
    multiple = f"{padded}" if padded else f"chosen by chip, at least {SMALLEST_ROWS}"
    yield (
      f"{field}={tile}: the rows of the experts are padded to multiples of {padded_to} ({multiple}), so this tile must "
      f"divide it; set {padded_to}={math.lcm(padded or SMALLEST_ROWS, tile)}, too, or leave {field} out"
    )
