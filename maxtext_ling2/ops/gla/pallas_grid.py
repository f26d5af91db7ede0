"""The grid both TPU kernels run on: (batch, groups of heads, steps along the sequence), blocks, and what a step does.

Batch and heads are "parallel", so that the two cores of a v4 or v5p share them; steps are in order, and the state stays
in the chip's memory between them. Tokens are [B, T, H * D], the layout of a projection's output: a [B, T, H, D] array
is tiled in another way on TPU, and a reshape between them is a copy.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxtext_ling2.ops.gla import pallas_chunk as chunks
from maxtext_ling2.ops.gla.block_sizes import Tile
from maxtext_ling2.ops.gla.pallas_chunk import INFO_ROWS, Decays, Tables
from maxtext_ling2.ops.pallas_utils import VMEM_LIMIT, Ref, like_input, vary_alike


@dataclasses.dataclass(frozen=True)
class Grid:
  """Shapes of one call: heads H, dimensions D of keys and Dv of values, T tokens, and the tile."""

  batch: int
  length: int
  heads: int
  key_dim: int
  value_dim: int
  tile: Tile
  reverse: bool  # whether the steps go from the end of the sequence to its start
  padding: bool = True  # with segments: whether there may be padding; False only to count the cycles of steps without

  @property
  def tokens(self) -> int:
    """Tokens of a step."""
    return self.tile.chunk * self.tile.chunks

  @property
  def steps(self) -> int:
    """Steps along the sequence; the last one may reach beyond its end."""
    return -(-self.length // self.tokens)

  @property
  def chunks(self) -> int:
    """Chunks that hold tokens."""
    return -(-self.length // self.tile.chunk)

  @property
  def width(self) -> int:
    """Columns over which vectors are repeated, as many as the wider of keys and values has."""
    return max(self.key_dim, self.value_dim)

  def keys(self) -> pl.BlockSpec:
    """Block of [B, T, H * D]."""
    return self._block((1, self.tokens, self.tile.heads * self.key_dim), lambda b, h, t: (b, t, h))

  def values(self) -> pl.BlockSpec:
    """Block of [B, T, H * Dv]."""
    return self._block((1, self.tokens, self.tile.heads * self.value_dim), lambda b, h, t: (b, t, h))

  def info(self) -> pl.BlockSpec:
    """Block of [B, INFO_ROWS, T]."""
    return self._block((1, INFO_ROWS, self.tokens), lambda b, h, t: (b, 0, t))

  def states(self) -> pl.BlockSpec:
    """Block of [B, H, N, D, Dv], a state for each chunk."""
    return self._block((1, self.tile.heads, self.tile.chunks, *self._state), lambda b, h, t: (b, h, t, 0, 0))

  def state(self) -> pl.BlockSpec:
    """Block of [B, H, D, Dv], the same for all steps."""
    return self._block((1, self.tile.heads, *self._state), lambda b, h, t: (b, h, 0, 0))

  def scratch(self) -> list[Any]:
    """Memory that lasts from step to step: a state for each head, and the tables."""
    heads, chunk = self.tile.heads, self.tile.chunk
    shapes = [self._state, (chunk, chunk), (chunk, self.width), (chunk, self.width)]
    return [pltpu.VMEM((heads, *shape), jnp.float32) for shape in shapes]

  def rows(self, index: int) -> Any:
    """The tokens of a chunk in a block."""
    return pl.ds(index * self.tile.chunk, self.tile.chunk)

  def per_head(self, block: Ref, index: int) -> list[jax.Array]:
    """The tokens of a chunk in a block [1, tokens, heads * D]: [C, D] for each head."""
    dim = block.shape[2] // self.tile.heads
    return [block[0, self.rows(index), pl.ds(head * dim, dim)] for head in range(self.tile.heads)]

  def write(self, block: Ref, index: int, head: int, x: jax.Array) -> None:
    """Writes the tokens [C, D] of a chunk and head to a block, in its dtype."""
    dim = x.shape[1]
    block[0, self.rows(index), pl.ds(head * dim, dim)] = x.astype(block.dtype)

  @property
  def _state(self) -> tuple[int, int]:
    return self.key_dim, self.value_dim

  def _block(self, shape: tuple[int, ...], place: Callable[[Any, Any, Any], tuple[Any, ...]]) -> pl.BlockSpec:
    last = self.steps - 1
    # An index map also gets the scalars.
    if self.reverse:
      return pl.BlockSpec(shape, lambda b, h, t, *_: place(b, h, last - t))
    return pl.BlockSpec(shape, lambda b, h, t, *_: place(b, h, t))


def call(
  kernel: Callable[..., None],
  name: str,
  grid: Grid,
  g_gamma: jax.Array,
  padded: jax.Array | None,
  inputs: Any,
  in_specs: Any,
  out_shapes: Any,
  out_specs: Any,
) -> Any:
  """Runs a kernel on the grid; it gets g_gamma, padded, the inputs, the outputs and the scratch memory.

  Inputs and outputs are NamedTuples; specs are given for all of their fields, used for those that are not None.
  """
  padded = jnp.zeros((1, 1), jnp.int32) if padded is None else padded  # the kernel does not look at it then
  g_gamma, padded, inputs = vary_alike((g_gamma, padded, inputs))
  out_shapes = jax.tree.map(functools.partial(like_input, inputs[0]), out_shapes)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(grid.batch, grid.heads // grid.tile.heads, grid.steps),
      in_specs=[_used(in_specs, inputs)],
      out_specs=[_used(out_specs, out_shapes)],
      scratch_shapes=grid.scratch(),
    ),
    out_shape=[out_shapes],
    name=name,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True
    ),
  )(g_gamma, padded, inputs)[0]


def _used(specs: Any, arrays: Any) -> Any:
  """The specs of what is there."""
  return type(specs)(*(None if array is None else spec for spec, array in zip(specs, arrays, strict=True)))


def run_step(
  one: Callable[[int, list[Decays]], None],
  grid: Grid,
  g_gamma: Ref,
  padded: Ref,
  info: Ref | None,
  tokens: Sequence[Ref],
  tables: Tables,
  scale: float,
  state: Ref,
  first: Ref | None,
  last: Ref | None,
) -> None:
  """What both kernels do in a grid step: the state is set in the first one, carried over the chunks, handed out at last.

  Args:
    one: computes the chunk of an index, given the decays of each head; it reads and writes `state`.
    grid: the shapes.
    g_gamma: [H] log decays.
    padded: [B, steps], whether a step holds padding.
    info: block of segment information, or None if all chunks are plain.
    tokens: blocks of tokens, cleared where they are padding.
    tables: scratch for the factors of plain chunks.
    scale: factor of the outputs.
    state: scratch [heads of a step, D, Dv] that lasts from step to step.
    first: block of the state before the first step; None: zeros.
    last: block that gets the state after the last step, or None.
  """
  log2_g = chunks.log2_decays(g_gamma, pl.program_id(1) * grid.tile.heads, grid.tile.heads)
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _() -> None:
    chunks.fill_tables(tables, log2_g, scale)
    state[...] = jnp.zeros_like(state) if first is None else first[0]

  _run_chunks(one, grid, padded, info, tokens, tables, log2_g, scale)

  if last is not None:

    @pl.when(step == grid.steps - 1)
    def _() -> None:
      last[0] = state[...]


def _run_chunks(
  one: Callable[[int, list[Decays]], None],
  grid: Grid,
  padded: Ref,
  info: Ref | None,
  tokens: Sequence[Ref],
  tables: Tables,
  log2_g: list[jax.Array],
  scale: float,
) -> None:
  """Runs the chunks of a grid step, in order or from the last to the first; arguments as in `run_step`.

  With segments every chunk is masked, also one without a border. A branch around each chunk would cost more: it keeps
  the compiler from filling the waiting time of one chunk with work of the next (1.2 to 1.3 times the plain schedule; a
  mask costs 1.00 to 1.12 times, because it works the vector units, which wait for the matrix units otherwise).
  """
  order = range(grid.tile.chunks)[:: -1 if grid.reverse else 1]
  if info is None:
    for index in order:
      one(index, [chunks.plain_decays(tables, head, g) for head, g in enumerate(log2_g)])
    return

  def clear() -> None:
    for index in order:
      for block in tokens:
        rows = grid.rows(index)
        block[0, rows] = chunks.clear_padding(info[0, :, rows], block[0, rows])

  if grid.padding:
    step = pl.program_id(2)
    pl.when(padded[pl.program_id(0), grid.steps - 1 - step if grid.reverse else step] != 0)(clear)
  for index in order:
    distances = chunks.distances(info[0, :, grid.rows(index)], grid.width)
    one(index, [chunks.masked_decays(distances, g, scale) for g in log2_g])
