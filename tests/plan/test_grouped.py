"""Grouped products by hand: visits, blocks, bytes reread, cycles."""

import json

import numpy as np
import pytest

from maxtext_ling2.plan import grouped
from maxtext_ling2.plan.chips import CHIPS
from maxtext_ling2.plan.grouped import GroupedProduct
from maxtext_ling2.plan.operations import read_program

pytestmark = pytest.mark.unit

WIDE = GroupedProduct("gmm", 256, 32768.0, 2048, 512, "bfloat16", (512, 1024, 1024))
"""One of ling2's gate products with MaxText's default tiles, one row of 4096 tokens."""
GRADIENT = GroupedProduct("tgmm", 8, 1024.0, 512, 256, "bfloat16", (128, 256, 128))
SECOND = GroupedProduct("gmm_v2", 256, 32768.0, 2048, 512, "bfloat16", (128, 2048, 512), sublane=16)


@pytest.fixture
def table(tmp_path, monkeypatch):
  """Puts records in the place of the counted kernels."""

  def replace(records):
    (tmp_path / "cycles.json").write_text(json.dumps(records))
    monkeypatch.setattr(grouped, "CYCLES", tmp_path / "cycles.json")
    grouped._cycles.cache_clear()

  yield replace
  grouped._cycles.cache_clear()


def test_default_tiles_compute_ten_times_the_useful_operations():
  assert WIDE.visits == 64 + 255
  assert WIDE.blocks == (2, 1)
  assert WIDE.steps == 638
  assert WIDE.visited_flops == 2 * 638 * 512 * 1024 * 1024
  assert WIDE.visited_flops / WIDE.useful_flops == pytest.approx(9.97, abs=0.01)


def test_rereads():
  """Two blocks of K: both operands are fetched at each visit; one block: rows once per block of N, weights once."""
  rows, weights, result = 319 * 512 * 2048 * 2, 319 * 2048 * 512 * 2, 32768 * 512 * 2
  assert WIDE.bytes_accessed == rows + weights + result
  whole = GroupedProduct("gmm", 256, 32768.0, 2048, 512, "bfloat16", (128, 2048, 256))
  assert whole.bytes_accessed == 2 * 32768 * 2048 * 2 + 256 * 2048 * 512 * 2 + result
  transposed = GroupedProduct("gmm_transposed", 256, 32768.0, 2048, 512, "bfloat16", (128, 2048, 256))
  assert transposed.bytes_accessed == whole.bytes_accessed


def test_the_gradient_of_the_weights():
  """Rows of the first operand once per block of N, of the second once per block of K; the gradient once."""
  assert GRADIENT.visits == 8 + 7
  assert GRADIENT.steps == 15 * 2 * 2
  assert GRADIENT.bytes_accessed == 2 * (1024 * 512 * 2 + 1024 * 256 * 2 + 8 * 512 * 256)


def test_operands_on_the_chip_move_nothing():
  held = GroupedProduct("tgmm", 8, 1024.0, 512, 256, "bfloat16", (128, 512, 256), itemsize=(0.0, 0.0, 2.0))
  assert held.bytes_accessed == 8 * 512 * 256 * 2


def test_the_first_version_visits_what_random_routing_does():
  """Tiles of 512 rows, each group's rows counted one by one."""
  sizes = np.random.default_rng(0).multinomial(32768, np.full(256, 1 / 256))
  ends = np.cumsum(sizes)
  tiles = (ends - 1) // 512 - (ends - sizes) // 512 + 1
  assert abs(WIDE.visits - tiles[sizes > 0].sum()) <= 2


def test_the_second_version_begins_tiles_with_groups():
  rng = np.random.default_rng(0)
  counts = []
  for _ in range(50):
    sizes = rng.multinomial(32768, np.full(256, 1 / 256))
    starts = np.cumsum(sizes) - sizes
    counts.append(np.ceil((sizes + starts % 16) / 128).sum())
  error = np.std(counts) / np.sqrt(len(counts))
  assert abs(SECOND.visits - np.mean(counts)) < 4 * error
  assert SECOND.bytes_accessed == 2 * (32768 * 2048 + 256 * 2048 * 512 + 32768 * 512)


def test_without_counted_cycles_the_visited_tiles_at_peak(table):
  """One block of N: one of a v5p's two cores has all of it; two blocks: both work. Others have one core."""
  table([])
  v5p, v6e = CHIPS["v5p"], CHIPS["v6e"]
  assert WIDE.seconds(v5p) == (pytest.approx(WIDE.visited_flops / (459e12 / 2)), False)
  assert WIDE.seconds(v6e) == (pytest.approx(WIDE.visited_flops / 918e12), False)
  assert GRADIENT.seconds(v5p) == (pytest.approx(GRADIENT.visited_flops / 459e12), False)
  assert SECOND.seconds(v5p) == (pytest.approx(SECOND.visited_flops / (459e12 / 2)), False)


def test_counted_cycles(table):
  """9000 cycles of a step on one core; 1000 on two, 100 of which once per group."""
  wide = {"chip": "v5p", "kernel": "gmm", "k": 2048, "n": 512, "dtype": "bfloat16", "tiles": [512, 1024, 1024]}
  gradient = {"chip": "v5p", "kernel": "tgmm", "k": 512, "n": 256, "dtype": "bfloat16", "tiles": [128, 256, 128]}
  table([wide | {"cycles": 9000, "cores": 1}, gradient | {"cycles": 1000, "per_group": 100, "cores": 2}])
  clock = 1.751e9
  assert WIDE.seconds(CHIPS["v5p"]) == (pytest.approx(638 * 9000 / clock), True)
  assert GRADIENT.seconds(CHIPS["v5p"]) == (pytest.approx((60 * 900 + 8 * 4 * 100) / 2 / clock), True)
  assert not WIDE.seconds(CHIPS["v6e"])[1]  # the table is of another chip


# As libtpu writes them; metadata of a kernel take lines of their own. The first operand of the second is on the chip.
CALLS = """HloModule m

ENTRY %main (a: bf16[1024,512]) -> bf16[1024,256] {
  %g = s32[9]{0} parameter(0)
  %a = bf16[1024,512]{1,0:T(8,128)(2,1)} parameter(1)
  %w = bf16[8,256,512]{2,1,0:T(8,128)(2,1)} parameter(2)
  %c = bf16[1024,512]{1,0:T(8,128)(2,1)S(1)} parameter(3)
  %v = bf16[8,512,256]{2,1,0:T(8,128)(2,1)} parameter(4)
  %gmm.1 = bf16[1024,256]{1,0:T(8,128)(2,1)} custom-call(%g, %a, %w), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[9]{0}, bf16[1024,512]{1,0}, bf16[8,256,512]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"tiling\\": {\\"tile_m\\": 128, \\"tile_k\\": 256, \\"tile_n\\": 128}, \\"transpose_rhs\\": true}"
}}, metadata={op_name="jit(gmm)/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"268435456","transcendentals":"0"}}}
  ROOT %gmm_v2.1 = bf16[1024,256]{1,0:T(8,128)(2,1)} custom-call(%g, %c, %v), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[9]{0}, bf16[1024,512]{1,0}, bf16[8,512,256]{2,1,0}}, frontend_attributes={kernel_metadata={
"dims.size_lhs_sublane":16,
"tiles.tile_k":512,
"tiles.tile_m":128,
"tiles.tile_n":256,
"zero_init":true
}}, metadata={op_name="jit(gmm_v2)/gmm_v2-g_8/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzv"}}
}
"""  # noqa: E501


def test_read_from_a_program():
  """First: both operands at each of 15 visits, the rows for both blocks of N. Second: weights and result once."""
  found = read_program(CALLS)
  first, second = found.operations
  names = 9 * 4  # the numbers of groups
  assert first.grouped == GroupedProduct("gmm_transposed", 8, 1024.0, 512, 256, "bfloat16", (128, 256, 128))
  assert first.memory == (15 * 128 * 512 * 2 + 15 * 512 * 256 + 1024 * 256) * 2 + names
  assert first.memory - first.reread == (1024 * 512 + 8 * 512 * 256 + 1024 * 256) * 2 + names
  assert first.flops == 2 * 1024 * 512 * 256
  assert (second.grouped.kernel, second.grouped.sublane, second.grouped.itemsize) == ("gmm_v2", 16, (0.0, 2.0, 2.0))
  assert (second.memory, second.reread) == ((8 * 512 * 256 + 1024 * 256) * 2 + names, 0)
  assert found.kernels == {"gmm_transposed": (1, first.memory), "gmm_v2": (1, second.memory)}


def test_rows_that_are_routed_and_not_the_buffer():
  """Of 1024 rows 512 are routed: less is read and written than the operands hold."""
  first, _ = read_program(CALLS, 512.0).operations
  assert first.grouped.visits == 4 + 7
  assert first.memory == (11 * 128 * 512 * 2 + 11 * 512 * 256 + 512 * 256) * 2 + 9 * 4
