"""The TPU kernels of the experts as libtpu compiles them, without a TPU: where they are chosen, cycles, bytes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import experts_tiles, experts_tpu_static
from benchmarks.tpu_static import CHIPS, estimate
from maxtext_ling2.ops.experts.block_sizes import why_not_kernel
from maxtext_ling2.ops.experts.dispatch import ALIGNMENT, num_rows

TOKENS = 512
TAKEN = [chip for chip, kind in experts_tiles.CHIPS.items() if not why_not_kernel(2048, 512, 2, kind)]


def test_the_chips_that_take_the_kernels():
  """TPU v4 has 16 MiB of VMEM."""
  assert TAKEN == ["v5p", "v6e", "tpu7x", "v5e"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", TAKEN)
def test_a_layer_compiles_to_one_kernel_per_pass(chip, tmp_path):
  """Two rematerialised layers: no forward kernel runs again, and no rows are copied to another tiling around them."""
  script = Path(__file__).with_name("compile_experts.py")
  name = chip.replace("tpu7x", "v7x")
  run = subprocess.run(
    [sys.executable, script, name, str(TOKENS), tmp_path / "hlo"], capture_output=True, text=True, check=False
  )
  assert run.returncode == 0, run.stderr[-3000:]
  (line,) = (line for line in run.stdout.splitlines() if line.startswith("KERNELS "))
  kernels = [re.sub(r"^(transpose_|jvp_)+|_+$", "", kernel) for kernel in json.loads(line.removeprefix("KERNELS "))]
  assert sorted(kernels) == ["experts_backward"] * 2 + ["experts_forward"] * 2
  copies = re.findall(r"= bf16\[(\d+)(?:,16)?,2048\]\S* (?:copy|scatter)\(", (tmp_path / "hlo").read_text())
  padded = num_rows(TOKENS * 8, 256, ALIGNMENT)
  assert not {str(TOKENS * 8), str(padded), str(padded // ALIGNMENT)} & set(copies)


@pytest.mark.slow
@pytest.mark.parametrize(
  "case",
  [("v5p", "forward", 128), ("v6e", "forward", 512), ("v5p", "backward", 128), ("v6e", "backward", 512)],
  ids=str,
)
def test_a_recount_finds_the_stored_cycles_and_the_bytes(case):
  chip, passes, rows = case
  (result,) = estimate(chip, [experts_tpu_static.job((*case, "one block"))])
  (kernel,) = result.kernels
  stored = experts_tpu_static.stored()[*case, "one block"]
  assert kernel.cycles == pytest.approx(stored, rel=0.03)  # another libtpu may schedule a little differently
  experts = 8 * experts_tpu_static.sizes_of(chip).cores
  matrices, of_rows = (1, 2) if passes == "forward" else (2, 3)
  moved = experts * (3 * matrices * experts_tpu_static.MATRIX + of_rows * rows * 2 * experts_tpu_static.WIDTH)
  assert kernel.hbm_us * CHIPS[chip].gigabytes_per_second * 1e3 == pytest.approx(moved, rel=0.05)


@pytest.mark.parametrize("rows", experts_tpu_static.ROWS)
@pytest.mark.parametrize("chip", experts_tpu_static.TARGETS)
def test_kernels_reach_their_targets(chip, rows):
  """By counted cycles and bytes, for random routing; and the whole path is faster than MaxText's."""
  parts = experts_tpu_static.all_parts(chip, [rows], experts_tpu_static.stored())
  for line in experts_tpu_static.summary(parts):
    assert line["ratio"] <= line["target"], line
    assert line["after_ms"] < line["before_ms"] and line["after_gb"] < line["before_gb"], line


def test_the_blocks_of_random_routing_hold_all_rows():
  for chip, passes in (("v5p", "forward"), ("v6e", "backward")):
    blocks, tiles = experts_tpu_static.blocks_of(chip, passes, 128)
    assert blocks.tiles.sum() == tiles.sum() and 16 * tiles.sum() == pytest.approx(1.06 * 128 * 256, rel=0.01)
    assert blocks.first.sum() == blocks.last.sum() == 256
