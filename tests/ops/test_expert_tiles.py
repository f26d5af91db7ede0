"""The tiles of the experts' grouped products: the table, and that it is the best of what was counted."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import experts_tiles as benchmark
from benchmarks.grouped_counts import Counts
from benchmarks.grouped_cycles import Case, count
from maxtext_ling2.configs.tiles import SMALLEST_ROWS
from maxtext_ling2.ops.experts import tiles as expert_tiles

pytestmark = pytest.mark.unit

CHIPS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
WIDTHS = {"ling2": (2048, 512), "ling2.6-flash": (4096, 1024), "ling2.5-1t": (8192, 2048)}


def lookup(chip, model, product, rows, itemsize=2):
  width, hidden = WIDTHS[model]
  sizes = {"embed_dim": width, "mlp_dim": hidden}
  k, n = (sizes[axis] for axis in expert_tiles.AXES[product])
  return k, n, expert_tiles.tiles(chip, product, k, n, rows, itemsize)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", WIDTHS)
def test_tiles_are_blocks_that_the_kernels_take_and_that_fit(chip, model):
  for product, rows, itemsize in itertools.product(expert_tiles.AXES, (16, 128, 300, 1024, 4096), (2, 4)):
    k, n, tile = lookup(chip, model, product, rows, itemsize)
    padded = lookup(chip, model, "wi_fwd", rows, itemsize)[2].rows
    assert k % tile.k == n % tile.n == 0 and tile.k % 128 == tile.n % 128 == 0
    assert padded % tile.rows == 0 and tile.rows % SMALLEST_ROWS == 0
    assert expert_tiles.vmem(product, tile, itemsize) <= expert_tiles.vmem_of(chip)


@pytest.mark.parametrize("chip", CHIPS)
def test_weights_are_read_once_and_two_cores_have_work(chip):
  """The gradient of the weights aside, K in blocks would read the weights at every visit of a tile."""
  for model, product in itertools.product(WIDTHS, ("wi_fwd", "wo_fwd", "wi_dlhs", "wo_dlhs")):
    k, n, tile = lookup(chip, model, product, 128)
    assert tile.k == k
    if chip in ("TPU v4", "TPU v5"):
      assert (n // tile.n) % 2 == 0


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3"])
def test_devices_that_are_no_tpu_have_none(kind):
  assert expert_tiles.tiles(kind, "wi_fwd", 2048, 512, 128) is None


def test_widths_and_chips_without_an_entry_follow_the_rule():
  assert expert_tiles.tiles("TPU v6 lite", "wi_fwd", 3072, 768, 128) == (256, 3072, 768)
  assert expert_tiles.tiles("TPU v5", "wi_fwd", 3072, 768, 1024) == (256, 3072, 384)
  assert expert_tiles.tiles("TPU v5", "wo_fwd", 64, 128, 4) == (128, 64, 128)  # narrower than two blocks of 128
  assert expert_tiles.tiles("TPU v9", "wi_drhs", 8192, 2048, 128) == (256, 1024, 1024)  # 4 MiB of float32 sums


def test_an_entry_serves_the_rows_above_it():
  at = {rows: lookup("TPU v5", "ling2", "wi_fwd", rows)[2].rows for rows in (1, 128, 511, 512, 4095, 4096, 9999)}
  assert at == {1: 128, 128: 128, 511: 128, 512: 256, 4095: 256, 4096: 512, 9999: 512}


@pytest.mark.parametrize("chip", benchmark.CHIPS)
def test_the_table_is_the_best_of_what_was_counted(chip):
  counts, kind = Counts(), benchmark.CHIPS[chip]
  entries = expert_tiles._TABLE.get(kind, {})
  assert set(entries) == {benchmark.MODELS[m] for m in benchmark.MODELS if benchmark.is_counted(counts, chip, m)}
  for model, rows in itertools.product(benchmark.MODELS, benchmark.ROWS):
    if benchmark.MODELS[model] in entries:
      best = benchmark.best(chip, model, rows, counts.cases(chip))
      assert {name: tuple(lookup(kind, model, name, rows)[2]) for name in best} == {
        name: one.case.tiles for name, one in best.items()
      }


@pytest.mark.parametrize(
  ("chip", "rows", "most"),
  [("v6e", rows, 1.35) for rows in (128, 256, 512, 1024)] + [("v5p", 128, 1.9), ("v5p", 512, 1.9), ("v5p", 4096, 1.5)],
)
def test_the_twelve_products_of_a_layer_come_near_their_floor(chip, rows, most):
  """By counted cycles and bytes. tpu7x does not: 1.5 to 1.8 (docs/kernels.md)."""
  counts = Counts()
  *_, layer = benchmark.report(chip, "ling2", rows, benchmark.best(chip, "ling2", rows, counts.cases(chip)))
  assert layer["product"] == "layer" and layer["ratio"] <= most
  default = [case for case in counts.cases(chip) if case.tiles == benchmark.DEFAULT]
  *_, before = benchmark.report(chip, "ling2", rows, benchmark.best(chip, "ling2", rows, default))
  assert math.isclose(before["floor_ms"], layer["floor_ms"]) and before["ratio"] > layer["ratio"]


@pytest.mark.slow
def test_a_recount_finds_the_stored_cycles():
  case = Case("gmm", 2048, 512, (256, 2048, 512))
  assert dict(count("v6e", [case])) == {case: Counts().found["v6e", case]}


@pytest.mark.slow
def test_the_tiles_reach_the_kernels():
  """Traced for v5p with 128 rows per expert; one tile is the user's."""
  script = Path(__file__).with_name("trace_expert_tiles.py")
  root = str(Path(__file__).parents[2])
  run = subprocess.run(
    [sys.executable, str(script), "v5p", "wo_tile_dlhs_mlp_dim=128"],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
  )
  assert run.returncode == 0, run.stderr[-2000:]
  found = json.loads(run.stdout.splitlines()[-1])
  kernels = {"fwd": "gmm", "dlhs": "gmm_transposed", "drhs": "tgmm"}
  expected = {}
  for product in expert_tiles.AXES:
    k, n, tile = lookup("TPU v5", "ling2", product, 128)
    expected[f"{kernels[product.split('_')[1]]}, {k}, {n}"] = list(tile)
  assert expected["gmm_transposed, 2048, 512"] != [128, 2048, 128]
  assert found == expected | {"gmm_transposed, 2048, 512": [128, 2048, 128]}
