"""GLA's TPU kernels as libtpu compiles them, without a TPU: that they compile for every generation, and their cycles."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gla_tpu_static, layer_tpu_static
from benchmarks.tpu_static import NotEstimated, estimate
from maxtext_ling2.ops.gla import block_sizes

SLACK = 1.03  # another libtpu may schedule a little differently


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "v7x"])
def test_compiles_for(chip):
  script = Path(__file__).with_name("compile_for_tpu.py")
  run = subprocess.run([sys.executable, script, chip], capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr[-3000:]
  (line,) = (line for line in run.stdout.splitlines() if line.startswith("KERNELS "))
  found = json.loads(line.removeprefix("KERNELS "))
  norms = ["gated_norm", "gated_norm_gradient", "rotated_norm", "rotated_norm_gradient"]
  assert len(found) == 9
  for program, kernels in found.items():
    assert kernels == (norms if program.startswith("norms") else ["gla_backward", "gla_forward"]), program


@pytest.mark.slow
@pytest.mark.parametrize("chip", gla_tpu_static.TESTED)
def test_cycles_reach_the_targets(chip):
  rows = list(gla_tpu_static.measure(chip, [(4096, 16)]))
  assert len(rows) == 4
  for row in rows:
    assert row.us <= SLACK * gla_tpu_static.target_us(row, rows), row


@pytest.mark.slow
@pytest.mark.parametrize("chip", gla_tpu_static.TESTED)
def test_a_token_costs_the_same_in_a_sequence_of_131072(chip):
  heads = 16 if chip == "v5e" else 64  # 64 do not fit a v5e's memory
  short, long = gla_tpu_static.measure(chip, [(4096, 16), (131072, heads)], passes=["both"], packed=[False])
  assert long.us / (131072 * heads) <= 1.05 * short.us / (4096 * 16)


@pytest.mark.slow
def test_a_program_that_cannot_be_counted_is_refused():
  good, missing, loop = estimate(
    "v6e",
    [
      ("benchmarks.gla_cases:forward", {"length": 512, "heads": 2, "save": False}),
      ("benchmarks.gla_cases:sideways", {}),
      ("tests.ops.looping_case:looping", {}),
    ],
  )
  (kernel,) = good.kernels
  assert (kernel.name.split(".")[0], kernel.steps) == ("gla_forward", 1)
  assert 1000 < kernel.cycles < 4000
  assert kernel.hbm_us == pytest.approx(4 * 512 * 2 * 128 * 2 / 1640e3, rel=1e-3)
  assert isinstance(missing, NotEstimated) and "sideways" in str(missing)
  assert isinstance(loop, NotEstimated) and "loop" in str(loop)


def test_the_limit_is_that_of_the_specification():
  # As docs/kernels.md has them: forward, and forward + backward at the chunk in use; bytes bound both on all chips.
  limits = {
    chip: [gla_tpu_static.limit_us(chip, 4096, 16, passes) for passes in ("forward", "both")]
    for chip in ("v5e", "v5p", "v6e", "v7x")
  }
  assert {chip: [round(x) for x in pair] for chip, pair in limits.items()} == {
    "v5e": [82, 246],
    "v5p": [24, 79],
    "v6e": [41, 123],
    "v7x": [18, 59],
  }


def test_every_chip_of_the_table_has_block_sizes_of_its_own():
  chunks = {chip: block_sizes.chunk_size(4096, kind) for chip, kind in gla_tpu_static.TESTED.items()}
  assert chunks == {"v5e": 256, "v5p": 128, "v6e": 256, "v7x": 128}
  for kind in gla_tpu_static.TESTED.values():
    forward, backward = block_sizes.block_sizes_for(4096, 16, 128, 2, kind)
    assert forward.chunk_size == backward.chunk_size


@pytest.fixture(scope="module")
def fused_layer():
  """{passes: row} of a v6e."""
  return {row.passes: row for row in layer_tpu_static.measure("v6e", ["fused"])}


@pytest.mark.slow
@pytest.mark.parametrize(("passes", "mib", "floor"), [("forward", 255.1, 200), ("both", 848.2, 600)])
def test_fused_layer_moves(fused_layer, passes, mib, floor):
  """What XLA moves around the kernels of a layer of ling2 on a v6e; the kernels and their time."""
  row = fused_layer[passes]
  # Five products of [4096, 2048] and [2048, 2048], and two more for each in the backward pass.
  assert row.floor == pytest.approx(floor, rel=1e-3)
  assert row.around == pytest.approx(mib, rel=0.05)
  assert row.missed() == []
  calls = {"forward": ["gated_norm", "gla_forward", "rotated_norm"]}
  calls["both"] = sorted([*calls["forward"], "gated_norm_gradient", "gla_backward", "rotated_norm_gradient"])
  assert sorted(row.kernels) == calls[passes]
