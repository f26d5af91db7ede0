"""The experts of a layer of `ling2`, MaxText's path and the kernels, compared with the limits of the hardware.

    python benchmarks/experts_tpu_static.py --chip v6e                 128, 512 and 1024 rows per expert; with the picture
    python benchmarks/experts_tpu_static.py --chip v5p --rows 128 --json
    python benchmarks/experts_tpu_static.py --chip v6e --recount       counts all cycles, not only the missing ones

Cycles of one block are libtpu's, for each tier of rows (`tpu_static.py`), kept in benchmarks/results. The blocks are
those of `schedule.py` for random routing: 256 experts, a fixed seed. A step takes as long as its cycles or its bytes,
whichever is longer (on two cores, each with half of the bandwidth), so waits for the next expert's weights are counted,
but not the start of a kernel. XLA's gathers and sums take as long as their bytes.

Before: the grouped products of MaxText with the tiles of `ops/experts/tiles.py`, counted by `experts_tiles.py`, and the
bytes of the operations between them, as they were seen in a compiled step, in rows of C and of F.

The floor of a pass is the longer of its operations at the peak (3 products forward; 8 backward, where gate and up are
computed again) and its bytes: matrices once, gradients of matrices once, rows and results once.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks import experts_tiles, tpu_static
from benchmarks.grouped_counts import Counts
from maxtext_ling2.ops.experts.block_sizes import BlockSizes, block_sizes_for
from maxtext_ling2.ops.experts.dispatch import ALIGNMENT, Dispatch, num_rows
from maxtext_ling2.ops.experts.schedule import schedule
from maxtext_ling2.plan import chips

RESULTS = Path(__file__).parent / "results"
WIDTH, HIDDEN = experts_tiles.MODELS["ling2"]
EXPERTS, CHOSEN = experts_tiles.EXPERTS, 8
ROWS = (128, 512, 1024)
TARGETS = {"v6e": {"forward": 1.15, "both": 1.25}, "v5p": {"forward": 1.3, "both": 1.4}}
"""Times the floor; the chips that are counted."""
PASSES = {"forward": 3, "backward": 8}
"""Products of each row with a matrix."""
MATRIX = 2 * WIDTH * HIDDEN
"""Bytes."""

BETWEEN = {  # between the products: (units of rows of C, of rows of F), bytes read and written
  "forward": {"sort gather": (2, 0), "silu * up": (0, 3), "unsort gather": (2, 0), "weighted sum": (1, 0)},
  "backward": {
    "sort gather, again": (2, 0),
    "silu * up, again": (0, 3),
    "unsort gather, again": (2, 0),
    "gradients of the weighted sum": (2.5, 0),
    "unsort gather, backward": (2, 0),
    "gradient of silu * up": (0, 5),
    "sum of both gradients of the rows": (3, 0),
    "sort gather, backward": (2, 0),
    "sum over the choices": (1, 0),
  },
}
"""MaxText's path, as seen (docs/train_step.md)."""
PRODUCTS = {
  "forward": {"wi_fwd": 2, "wo_fwd": 1},
  "backward": {"wi_fwd": 2, "wo_fwd": 1, "wi_dlhs": 2, "wi_drhs": 2, "wo_dlhs": 1, "wo_drhs": 1},
}
AROUND = {  # of the kernels: rows of C, with the padding between experts or without it
  "forward": {"gather of x": (2, True), "gather and sum of y": (3, False)},
  "backward": {"gather of x": (2, True), "gather of dy": (2, True), "gather and sum of dx": (3, False)},
}
"""XLA's operations around the kernels, as compiled; sorts and other arrays of numbers are less than 1 % of the bytes."""


@dataclasses.dataclass(frozen=True)
class Part:
  """A line of the table. Cycles are of the core that has most of them, 0 for XLA's operations."""

  chip: str
  rows: int
  path: str  # "before" or "after"
  passes: str  # "forward", "backward"
  part: str
  bytes: float
  cycles: int
  ms: float
  floor_ms: float | None


Cycles = dict[tuple[str, str, int, str], int]
"""(chip, pass, rows of the tier, one block / several / last) -> cycles."""


def cases(chip: str) -> Iterator[tuple[str, str, int, str]]:
  """The programs of both kernels."""
  sizes = sizes_of(chip)
  for rows in sizes.forward.tiers:
    yield chip, "forward", rows, "one block"
  for rows in sizes.backward.tiers:
    yield chip, "backward", rows, "one block"
    yield chip, "backward", rows, "last"
  yield chip, "backward", sizes.backward.stride, "several"


def sizes_of(chip: str) -> BlockSizes:
  return block_sizes_for(WIDTH, HIDDEN, 2, 10**9, experts_tiles.CHIPS[chip])


def count(cases: Sequence[tuple[str, str, int, str]]) -> Cycles:
  """Counts each case; a process per chip."""
  found: Cycles = {}
  for chip in dict.fromkeys(case[0] for case in cases):
    own = [case for case in cases if case[0] == chip]
    results = tpu_static.estimate(chip, [job(case) for case in own])
    for case, result in zip(own, results, strict=True):
      if isinstance(result, tpu_static.NotEstimated):
        raise result
      (kernel,) = result.kernels
      found[case] = kernel.cycles
  return found


def job(case: tuple[str, str, int, str]) -> tpu_static.Job:
  chip, passes, rows, experts = case
  options: dict[str, Any] = {"rows": rows, "cores": sizes_of(chip).cores}
  return f"benchmarks.experts_cases:{passes}", options | ({} if passes == "forward" else {"experts": experts})


def stored() -> Cycles:
  path = RESULTS / "experts_tpu_static.json"
  records = json.loads(path.read_text())["cycles"] if path.exists() else []
  return {(x["chip"], x["pass"], x["rows"], x["experts"]): x["cycles"] for x in records}


def blocks_of(chip: str, passes: str, rows: int) -> tuple[Any, np.ndarray]:
  """The schedule of a pass for random routing, and tiles of each expert."""
  import jax.numpy as jnp

  sizes = np.random.default_rng(0).multinomial(rows * EXPERTS, np.full(EXPERTS, 1 / EXPERTS)).astype(np.int32)
  tiles = -(-sizes // ALIGNMENT)
  where = Dispatch(
    row=jnp.zeros((rows * EXPERTS // CHOSEN, CHOSEN), jnp.int32),
    starts=jnp.asarray((np.cumsum(tiles) - tiles) * ALIGNMENT, jnp.int32),
    sizes=jnp.asarray(sizes),
    **dict.fromkeys(("choice", "order", "inverse"), jnp.zeros(0, jnp.int32)),
  )
  of_chip = sizes_of(chip)
  block = of_chip.forward if passes == "forward" else of_chip.backward
  blocks, steps = schedule(where, of_chip.cores, block.stride, block.rows, passes == "backward")
  return type(blocks)(*(np.asarray(x)[:, : int(steps)] for x in blocks)), tiles


def kernel(chip: str, passes: str, rows: int, cycles: Cycles) -> Part:
  """A kernel on all experts of a layer."""
  blocks, _ = blocks_of(chip, passes, rows)
  sizes, limits = sizes_of(chip), tpu_static.CHIPS[chip]
  tiers = (sizes.forward if passes == "forward" else sizes.backward).tiers
  moved, longest, most = 0, 0.0, 0
  for core in range(sizes.cores):
    seconds, of_core = 0.0, 0
    for tiles, first, last in zip(blocks.tiles[core], blocks.first[core], blocks.last[core], strict=True):
      size = next((tier for tier in tiers if tier >= 16 * tiles), None) if tiles else 0
      program = "one block" if passes == "forward" or (first and last) else "last" if last else "several"
      step = cycles[chip, passes, size, program] if size else 0
      bytes_of_step = 16 * int(tiles) * 2 * WIDTH * (2 if passes == "forward" else 3) + 3 * MATRIX * int(first)
      bytes_of_step += 3 * MATRIX * int(last) if passes == "backward" else 0
      moved, of_core = moved + bytes_of_step, of_core + step
      bandwidth = limits.gigabytes_per_second * 1e9 / sizes.cores
      seconds += max(step / limits.gigahertz / 1e9, bytes_of_step / bandwidth)
    longest, most = max(longest, seconds), max(most, of_core)
  return Part(chip, rows, "after", passes, "kernel", moved, most, longest * 1e3, floor_ms(chip, passes, rows))


def floor_ms(chip: str, passes: str, rows: int) -> float:
  """The floor of a pass."""
  m = rows * EXPERTS
  moved = EXPERTS * 3 * MATRIX * (1 if passes == "forward" else 2) + m * 2 * WIDTH * (2 if passes == "forward" else 3)
  operations = 2 * m * WIDTH * HIDDEN * PASSES[passes]
  return max(moved / tpu_static.CHIPS[chip].gigabytes_per_second / 1e6, operations / chips.CHIPS[chip].flops * 1e3)


def after(chip: str, rows: int, cycles: Cycles) -> list[Part]:
  """The kernels, and XLA's operations around them."""
  parts = []
  for passes in PASSES:
    parts.append(kernel(chip, passes, rows, cycles))
    for name, (units, padded) in AROUND[passes].items():
      units *= num_rows(rows * EXPERTS, EXPERTS, ALIGNMENT) / (rows * EXPERTS) if padded else 1
      parts.append(_moving(chip, rows, "after", passes, name, units, 0))
  return parts


def before(chip: str, rows: int) -> list[Part]:
  """MaxText's path."""
  counts = Counts()
  best = experts_tiles.best(chip, "ling2", rows, counts.cases(chip))
  products = {x["product"]: x for x in experts_tiles.report(chip, "ling2", rows, best)}
  parts = []
  for passes, times in PRODUCTS.items():
    for name, number in times.items():
      x, limits = products[name], tpu_static.CHIPS[chip]
      ms = number * max(x["schedule_ms"], x["hbm_ms"])
      moved = number * x["hbm_ms"] * limits.gigabytes_per_second * 1e6
      cycles = round(number * x["schedule_ms"] * limits.gigahertz * 1e6)
      parts.append(Part(chip, rows, "before", passes, f"{number} x {name}", moved, cycles, ms, number * x["floor_ms"]))
    parts += [_moving(chip, rows, "before", passes, name, *units) for name, units in BETWEEN[passes].items()]
  return parts


def _moving(chip: str, rows: int, path: str, passes: str, name: str, of_c: float, of_f: float) -> Part:
  moved = rows * EXPERTS * 2 * (of_c * WIDTH + of_f * HIDDEN)
  return Part(chip, rows, path, passes, name, moved, 0, moved / tpu_static.CHIPS[chip].gigabytes_per_second / 1e6, None)


def summary(parts: Sequence[Part]) -> list[dict[str, Any]]:
  """Kernels against their targets, and both paths whole, per chip and rows."""
  found = []
  for chip, rows in dict.fromkeys((part.chip, part.rows) for part in parts):
    own = [part for part in parts if (part.chip, part.rows) == (chip, rows)]
    for name, passes in (("forward", ["forward"]), ("both", list(PASSES))):
      of = {path: [x for x in own if x.path == path and x.passes in passes] for path in ("before", "after")}
      floor = sum(floor_ms(chip, x, rows) for x in passes)
      kernels = sum(x.ms for x in of["after"] if x.part == "kernel")
      line = {"chip": chip, "rows": rows, "passes": name, "floor_ms": floor, "kernels_ms": kernels}
      line |= {"ratio": kernels / floor, "target": TARGETS[chip][name]}
      for path, some in of.items():
        line |= {f"{path}_ms": sum(x.ms for x in some), f"{path}_gb": sum(x.bytes for x in some) / 1e9}
      found.append(line)
  return found


def show(parts: Sequence[Part]) -> None:
  """Prints both tables."""
  print(
    "chip | rows | path   | pass     | part                              |    GB |    cycles |     ms |  floor | ratio"
  )
  for x in parts:
    floor, ratio = ("", "") if x.floor_ms is None else (f"{x.floor_ms:.3f}", f"{x.ms / x.floor_ms:.2f}")
    print(
      f"{x.chip:4} | {x.rows:4} | {x.path:6} | {x.passes:8} | {x.part:33} | {x.bytes / 1e9:5.2f} | {x.cycles or '':9} | "
      f"{x.ms:6.3f} | {floor:>6} | {ratio:>5}"
    )
  print("\nchip | rows | passes  | kernels, ms |  floor | ratio | target | whole, ms before, after | GB before, after")
  for s in summary(parts):
    verdict = "" if s["ratio"] <= s["target"] else "  MISSED"
    print(
      f"{s['chip']:4} | {s['rows']:4} | {s['passes']:7} | {s['kernels_ms']:11.3f} | {s['floor_ms']:6.3f} | "
      f"{s['ratio']:5.2f} | {s['target']:6.2f} | {s['before_ms']:15.2f}, {s['after_ms']:5.2f} | "
      f"{s['before_gb']:8.2f}, {s['after_gb']:5.2f}{verdict}"
    )


def save(cycles: Cycles) -> None:
  """Writes the counted cycles of today's tiers, and the summary and the picture of all chips that are counted."""
  current = {case for chip in TARGETS for case in cases(chip)}
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
  records = [
    {"chip": chip, "pass": passes, "rows": rows, "experts": experts, "cycles": value}
    for (chip, passes, rows, experts), value in sorted(cycles.items())
    if (chip, passes, rows, experts) in current
  ]
  parts = [part for chip in TARGETS if set(cases(chip)) <= set(cycles) for part in all_parts(chip, ROWS, cycles)]
  text = json.dumps({"versions": versions, "cycles": records, "summary": summary(parts)}, indent=1)
  (RESULTS / "experts_tpu_static.json").write_text(text + "\n")
  if parts:
    _plot(summary(parts), RESULTS / "experts_tpu_static.png")


def all_parts(chip: str, rows: Sequence[int], cycles: Cycles) -> list[Part]:
  """Both paths."""
  return [part for n in rows for part in (*before(chip, n), *after(chip, n, cycles))]


def _plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
  """Forward and backward pass of a layer's experts: MaxText's path, the kernels' path, the kernels alone, the floor."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  names = list(dict.fromkeys(line["chip"] for line in lines))
  figure, panels = plt.subplots(1, len(names), figsize=(11, 3.8), squeeze=False, layout="constrained")
  for chip, panel in zip(names, panels[0], strict=True):
    own = [line for line in lines if line["chip"] == chip and line["passes"] == "both"]
    bars = {"MaxText's path": "before_ms", "with kernels": "after_ms", "kernels alone": "kernels_ms", "floor": "floor_ms"}
    for i, (label, key) in enumerate(bars.items()):
      panel.bar(np.arange(len(own)) + 0.2 * i, [line[key] for line in own], 0.2, label=label)
    panel.set(title=f"{chip}, one layer, forward + backward", xlabel="rows per expert", ylabel="ms")
    panel.set_xticks(np.arange(len(own)) + 0.3, [str(line["rows"]) for line in own])
  panels[0][0].legend(fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--chip", choices=TARGETS, action="append", help="may be given more than once; without it all")
  parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows per expert, with commas between")
  parser.add_argument("--json", action="store_true", help="print parts and summary as JSON")
  parser.add_argument("--recount", action="store_true", help="count all kernels of the chip, not only the missing ones")
  args = parser.parse_args()
  names, cycles = args.chip or list(TARGETS), stored()
  for chip in names:
    for case in cases(chip):
      if args.recount or case not in cycles:
        cycles |= count([case])
        save(cycles)
  parts = [part for chip in names for part in all_parts(chip, [int(x) for x in args.rows.split(",")], cycles)]
  if args.json:
    print(json.dumps({"parts": [dataclasses.asdict(part) for part in parts], "summary": summary(parts)}, indent=1))
  else:
    show(parts)


if __name__ == "__main__":
  main()
