"""The grouped products of the experts: what their tiles make them compute, read and write.

A kernel's tiles (rows, K, N) are in its custom call, as megablox, its second version (gmm_v2, tgmm_v2) and tokamax
write them. `gmm` is [rows, K] by [groups, K, N], `tgmm` the gradient of the weights, [K, rows] by [rows, N] for each
group. A grid step multiplies one tile of rows, which belongs to one group alone: a tile where a group ends is visited for
both groups. Loops of the grid, the outermost first: gmm over blocks of N, visits, blocks of K; tgmm over blocks of N,
blocks of K, visits. A block is fetched when its index differs from that of the step before.

Cycles of a grid step come from libtpu's schedules (grouped_cycles.json, made by benchmarks/experts_tiles.py). Sizes of
groups are those of random routing, as it is not known which tokens a step has.
"""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

from maxtext_ling2.plan.chips import Chip
from maxtext_ling2.plan.hlo import Instruction, arrays

CYCLES = Path(__file__).with_name("grouped_cycles.json")
_TILE = re.compile(r'tile_([mkn])\\*":\s*(\d+)')
_LAYOUTS = re.compile(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclasses.dataclass(frozen=True)
class GroupedProduct:
  """One grouped product.

  Attributes:
    kernel: gmm, gmm_transposed (the weights of a group are [N, K]) or tgmm, with _v2 behind it for the second version.
    groups: experts on the device.
    rows: of tokens, those of all groups together.
    k: as above.
    n: as above.
    dtype: of the first operand, as JAX names it.
    tiles: (rows, K, N) of a grid step.
    sublane: rows to which the second version aligns a tile.
    itemsize: bytes of an element of (first operand, second operand, result); 0: it does not lie in the HBM.
  """

  kernel: str
  groups: int
  rows: float
  k: int
  n: int
  dtype: str
  tiles: tuple[int, int, int]
  sublane: int = 8
  itemsize: tuple[float, float, float] = (2.0, 2.0, 2.0)

  @property
  def blocks(self) -> tuple[int, int]:
    """Blocks of K and of N."""
    return math.ceil(self.k / self.tiles[1]), math.ceil(self.n / self.tiles[2])

  @property
  def visits(self) -> float:
    """Tiles of rows in one pass over all groups.

    First version: tiles begin at multiples of their rows, and every boundary of two groups is assumed to be inside one.
    Second version: tiles begin with their group, and the mean is taken over binomial sizes of groups.
    """
    if not self.kernel.endswith("_v2"):
      return math.ceil(self.rows / self.tiles[0]) + self.groups - 1
    return self.groups * _mean_tiles(round(self.rows), self.groups, self.tiles[0], self.sublane)

  @property
  def steps(self) -> float:
    """Steps of the grid."""
    return self.visits * math.prod(self.blocks)

  @property
  def bytes_accessed(self) -> float:
    """From and to the HBM, rereads of operands included."""
    (over_k, over_n), (first, second, result) = self.blocks, self.itemsize
    weights = self.groups * self.k * self.n
    if self.kernel.startswith("tgmm"):
      return self.rows * self.k * over_n * first + self.rows * self.n * over_k * second + weights * result
    tile = self.rows if self.kernel.endswith("_v2") or over_k == 1 else self.visits * self.tiles[0]
    read_weights = weights if over_k == 1 else self.visits * self.k * self.n
    return tile * self.k * over_n * first + read_weights * second + self.rows * self.n * result

  @property
  def useful_flops(self) -> float:
    """Operations on the rows that are there."""
    return 2.0 * self.rows * self.k * self.n

  @property
  def visited_flops(self) -> float:
    """Operations on all tiles that are visited, with what is beyond their rows, K and N."""
    return 2.0 * self.steps * math.prod(self.tiles)

  def seconds(self, chip: Chip) -> tuple[float, bool]:
    """(time of the kernel's schedule, whether its cycles were counted).

    Not counted, it is that of the operations on the visited tiles at peak: of one of a chip's two cores where the kernel
    has no second one to give work to, because it is one block of N wide or of the second version.
    """
    over_n = self.blocks[1]
    cores = 1 if self.kernel.endswith("_v2") else chip.cores
    share = math.ceil(over_n / cores) / over_n if over_n else 1.0  # of the steps, what one core does
    record = _cycles().get((chip.name, self.kernel, self.k, self.n, self.dtype, self.tiles))
    if record is None:
      return self.visited_flops * share * chip.cores / chip.flops, False
    once = record.get("per_group", 0)  # of a tgmm's cycles: those of a group's first and last visit alone
    cycles = self.steps * (record["cycles"] - once) + self.groups * math.prod(self.blocks) * once
    return cycles * share / chip.clock, True


def grouped_product(one: Instruction, routed_rows: float | None) -> GroupedProduct | None:
  """The grouped product that an instruction is; None: another one.

  Args:
    one: an instruction of a compiled program.
    routed_rows: rows that a device's experts are given, where that is known; operands may be as large as the worst case.
  """
  if 'custom_call_target="tpu_custom_call"' not in one.rest:
    return None
  tiles = {axis: int(rows) for axis, rows in _TILE.findall(one.rest)}
  layouts = _LAYOUTS.search(one.rest)
  if len(tiles) < 3 or layouts is None:
    return None
  operands = [array for array in arrays(layouts[1]) if len(array[1]) > 1]
  (first, left, _), (_, right, _) = operands[:2]
  result = arrays(one.shape)[0][1]
  kernel = "tgmm" if len(result) == 3 else "gmm"
  second = '"tiles.tile_m"' in one.rest
  if kernel == "gmm" and re.search(r'transpose_rhs\\*": true', one.rest):
    kernel = "gmm_transposed"
  sublane = int(found[1]) if (found := re.search(r'"dims.size_lhs_sublane":(\d+)', one.rest)) else 8
  rows = float(left[0] if routed_rows is None else min(left[0], routed_rows))
  return GroupedProduct(
    kernel + "_v2" * second,
    result[0] if kernel == "tgmm" else right[0],
    rows,
    left[1],
    result[-1],
    {"bf16": "bfloat16", "f32": "float32"}.get(first, first),
    (tiles["m"], tiles["k"], tiles["n"]),
    sublane,
  )


@functools.lru_cache(1)
def _cycles() -> dict[tuple[Any, ...], dict[str, Any]]:
  """The counted kernels, by all that their schedule depends on."""
  records = json.loads(CYCLES.read_text(encoding="utf-8")) if CYCLES.is_file() else []
  return {(one["chip"], one["kernel"], one["k"], one["n"], one["dtype"], tuple(one["tiles"])): one for one in records}


@functools.lru_cache(2**10)
def _mean_tiles(rows: int, groups: int, tile: int, sublane: int) -> float:
  """Tiles of a group on average: its rows are binomial, its start is anywhere within a sublane; none if it is empty."""
  if groups == 1:
    return float(math.ceil(rows / tile))
  share = 1 / groups
  spread = 10 * math.sqrt(rows * share * (1 - share)) + 10
  least, most = max(1, math.floor(rows * share - spread)), min(rows, math.ceil(rows * share + spread))
  mean = 0.0
  for count in range(least, most + 1):
    ways = math.lgamma(rows + 1) - math.lgamma(count + 1) - math.lgamma(rows - count + 1)
    chance = math.exp(ways + count * math.log(share) + (rows - count) * math.log1p(-share))
    mean += chance * sum(math.ceil((count + start) / tile) for start in range(sublane)) / sublane
  return mean
