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
  """The copy of a block's rows from the array of all rows to the block's buffer, or back; start it, then wait for it."""

  def __init__(self, rows: Ref, start: jax.Array, buffer: Ref, tiles: jax.Array, semaphore: Any, out: bool):
    """Copies `tiles` tiles, which in `rows` begin at `start`; `out`: from the buffer, whose tiles are a power of two."""
    self._rows, self._start, self._buffer, self._tiles = rows, start, buffer, tiles
    self._semaphore, self._out = semaphore, out
    most = buffer.shape[0]
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
        done = self._tiles & -2 * size
        # One slice each, since a block's last rows may be beyond the end of the array.
        ends = self._rows.at[pl.ds(self._start + done, size)], self._buffer.at[pl.ds(done, size)]
        act(pltpu.make_async_copy(*(ends[::-1] if self._out else ends), self._semaphore))
