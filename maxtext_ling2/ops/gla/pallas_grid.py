"""The grid of both TPU kernels, (batch, groups of heads, steps along the sequence), their blocks, and a grid step.

Batch and heads are "parallel", so that the two cores of a v4 or v5p share them; the steps are sequential, and the state
stays in VMEM between them. Tokens are [B, T, H * D], the layout of a projection's output: a [B, T, H, D] array has
another tiling on TPU, and a reshape between the two is a copy.
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
from maxtext_ling2.ops.gla.block_sizes import Block
from maxtext_ling2.ops.gla.pallas_chunk import META_ROWS, Decays, Tables
from maxtext_ling2.ops.pallas_utils import VMEM_LIMIT, Ref, like_input, vary_alike


@dataclasses.dataclass(frozen=True)
class Grid:
  """Shapes of one call: heads H, dimensions D of keys and Dv of values, T tokens, and the block of a step."""

  batch: int
  length: int
  heads: int
  key_dim: int
  value_dim: int
  block: Block
  reverse: bool  # whether the steps go from the end of the sequence to its start
  padding: bool = True  # with segments: whether there may be padding; False only to count the cycles of steps without

  @property
  def tokens(self) -> int:
    """Tokens per step."""
    return self.block.chunk_size * self.block.num_chunks

  @property
  def steps(self) -> int:
    """Steps along the sequence; the last one may extend past its end."""
    return -(-self.length // self.tokens)

  @property
  def num_chunks(self) -> int:
    """Chunks of the sequence, N."""
    return -(-self.length // self.block.chunk_size)

  @property
  def width(self) -> int:
    """Columns over which decay vectors are repeated, W: the larger of D and Dv."""
    return max(self.key_dim, self.value_dim)

  def keys(self) -> pl.BlockSpec:
    """Block of [B, T, H * D]."""
    return self._spec((1, self.tokens, self.block.num_heads * self.key_dim), lambda b, h, t: (b, t, h))

  def values(self) -> pl.BlockSpec:
    """Block of [B, T, H * Dv]."""
    return self._spec((1, self.tokens, self.block.num_heads * self.value_dim), lambda b, h, t: (b, t, h))

  def segment_meta(self) -> pl.BlockSpec:
    """Block of [B, META_ROWS, T]."""
    return self._spec((1, META_ROWS, self.tokens), lambda b, h, t: (b, 0, t))

  def chunk_states(self) -> pl.BlockSpec:
    """Block of [B, H, N, D, Dv], one state per chunk."""
    return self._spec((1, self.block.num_heads, self.block.num_chunks, *self._state), lambda b, h, t: (b, h, t, 0, 0))

  def state(self) -> pl.BlockSpec:
    """Block of [B, H, D, Dv], the same for all steps."""
    return self._spec((1, self.block.num_heads, *self._state), lambda b, h, t: (b, h, 0, 0))

  def scratch(self) -> list[Any]:
    """VMEM that persists between steps: a state per head, and the `Tables`."""
    heads, size = self.block.num_heads, self.block.chunk_size
    shapes = [self._state, (size, size), (size, self.width), (size, self.width)]
    return [pltpu.VMEM((heads, *shape), jnp.float32) for shape in shapes]

  def rows(self, index: int) -> Any:
    """The tokens of a chunk in a block."""
    return pl.ds(index * self.block.chunk_size, self.block.chunk_size)

  def per_head(self, block: Ref, index: int) -> list[jax.Array]:
    """The tokens of a chunk in a block [1, tokens, heads * D]: [C, D] for each head."""
    dim = block.shape[2] // self.block.num_heads
    return [block[0, self.rows(index), pl.ds(head * dim, dim)] for head in range(self.block.num_heads)]

  def write(self, block: Ref, index: int, head: int, x: jax.Array) -> None:
    """Writes the tokens [C, D] of a chunk and head to a block, in its dtype."""
    dim = x.shape[1]
    block[0, self.rows(index), pl.ds(head * dim, dim)] = x.astype(block.dtype)

  @property
  def _state(self) -> tuple[int, int]:
    return self.key_dim, self.value_dim

  def _spec(self, shape: tuple[int, ...], index_map: Callable[[Any, Any, Any], tuple[Any, ...]]) -> pl.BlockSpec:
    last = self.steps - 1
    # Pallas also passes the prefetched scalars to an index map.
    if self.reverse:
      return pl.BlockSpec(shape, lambda b, h, t, *_: index_map(b, h, last - t))
    return pl.BlockSpec(shape, lambda b, h, t, *_: index_map(b, h, t))


def call(
  kernel: Callable[..., None],
  name: str,
  grid: Grid,
  g_gamma: jax.Array,
  has_padding: jax.Array | None,
  inputs: Any,
  in_specs: Any,
  out_shapes: Any,
  out_specs: Any,
) -> Any:
  """Runs a kernel on the grid; it gets g_gamma, has_padding, the inputs, the outputs and the scratch memory.

  Inputs and outputs are NamedTuples; specs are given for all of their fields, used for those that are not None.
  """
  has_padding = jnp.zeros((1, 1), jnp.int32) if has_padding is None else has_padding  # the kernel does not read it then
  g_gamma, has_padding, inputs = vary_alike((g_gamma, has_padding, inputs))
  out_shapes = jax.tree.map(functools.partial(like_input, inputs[0]), out_shapes)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(grid.batch, grid.heads // grid.block.num_heads, grid.steps),
      in_specs=[_used(in_specs, inputs)],
      out_specs=[_used(out_specs, out_shapes)],
      scratch_shapes=grid.scratch(),
    ),
    out_shape=[out_shapes],
    name=name,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True
    ),
  )(g_gamma, has_padding, inputs)[0]


def _used(specs: Any, arrays: Any) -> Any:
  """The specs of the arrays that are not None."""
  return type(specs)(*(None if array is None else spec for spec, array in zip(specs, arrays, strict=True)))


def run_step(
  run_chunk: Callable[[int, list[Decays]], None],
  grid: Grid,
  g_gamma: Ref,
  has_padding: Ref,
  segment_meta: Ref | None,
  tokens: Sequence[Ref],
  tables: Tables,
  scale: float,
  state: Ref,
  state_in: Ref | None,
  state_out: Ref | None,
) -> None:
  """A grid step of both kernels: initializes the state in the first step, runs the chunks, writes it in the last step.

  Args:
    run_chunk: computes the chunk of an index, given the decays of each head; it reads and writes `state`.
    grid: the shapes.
    g_gamma: [H] log decays, in SMEM.
    has_padding: [B, steps], whether a step holds padding, in SMEM.
    segment_meta: block of segment metadata, or None if all chunks are dense.
    tokens: blocks of tokens, set to zero at padding.
    tables: scratch for the factors of dense chunks.
    scale: factor of the outputs.
    state: scratch [heads of a step, D, Dv] that persists between steps.
    state_in: block of the state before the first step; None: zeros.
    state_out: block for the state after the last step, or None.
  """
  log2_g = chunks.log2_decays(g_gamma, pl.program_id(1) * grid.block.num_heads, grid.block.num_heads)
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _() -> None:
    chunks.fill_tables(tables, log2_g, scale)
    state[...] = jnp.zeros_like(state) if state_in is None else state_in[0]

  _run_chunks(run_chunk, grid, has_padding, segment_meta, tokens, tables, log2_g, scale)

  if state_out is not None:

    @pl.when(step == grid.steps - 1)
    def _() -> None:
      state_out[0] = state[...]


def _run_chunks(
  run_chunk: Callable[[int, list[Decays]], None],
  grid: Grid,
  has_padding: Ref,
  segment_meta: Ref | None,
  tokens: Sequence[Ref],
  tables: Tables,
  log2_g: list[jax.Array],
  scale: float,
) -> None:
  """Runs the chunks of a grid step, in order or from the last to the first; arguments as in `run_step`.

  With segments every chunk is masked, also one without a document boundary. A branch per chunk would cost more: it keeps
  the compiler from overlapping the latency of one chunk with the work of the next (1.2 to 1.3 times the dense schedule; a
  mask costs 1.00 to 1.12 times, because it occupies the VPU, which otherwise waits for the MXU).
  """
  order = range(grid.block.num_chunks)[:: -1 if grid.reverse else 1]
  if segment_meta is None:
    for index in order:
      run_chunk(index, [chunks.dense_decays(tables, head, g) for head, g in enumerate(log2_g)])
    return

  def zero_padding() -> None:
    for index in order:
      for block in tokens:
        rows = grid.rows(index)
        block[0, rows] = chunks.zero_padding(segment_meta[0, :, rows], block[0, rows])

  if grid.padding:
    step = pl.program_id(2)
    pl.when(has_padding[pl.program_id(0), grid.steps - 1 - step if grid.reverse else step] != 0)(zero_padding)
  for index in order:
    distances = chunks.distances(segment_meta[0, :, grid.rows(index)], grid.width)
    run_chunk(index, [chunks.masked_decays(distances, g, scale) for g in log2_g])
