"""Copies of a block's rows between HBM and VMEM. Rows are [tiles, 16, C], C whole: a tile of bfloat16 is 16 rows.

The number of tiles is known only when the kernel runs, and a copy has a fixed size; so a block is copied in pieces, whose
sizes are the powers of two that its number of tiles is the sum of.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxtext_ling2.ops.pallas_utils import Ref


class RowCopy:
  """The copy of `tiles` tiles of rows from source to target; start it, then wait for it."""

  def __init__(self, source: Ref, target: Ref, tiles: jax.Array, most: int, semaphore: Any):
    """Source and target begin with the first tile; `most` is a power of two."""
    self._source, self._target, self._tiles, self._semaphore = source, target, tiles, semaphore
    self._sizes = [1 << i for i in reversed(range(most.bit_length()))]

  def start(self) -> None:
    """Starts all pieces."""
    self._each(lambda copy: copy.start())

  def wait(self) -> None:
    """Waits for all pieces."""
    self._each(lambda copy: copy.wait())

  def _each(self, act: Callable[[Any], None]) -> None:
    for size in self._sizes:

      @pl.when(self._tiles & size != 0)
      def _(size: int = size) -> None:
        piece = pl.ds(self._tiles & -2 * size, size)
        act(pltpu.make_async_copy(self._source.at[piece], self._target.at[piece], self._semaphore))
