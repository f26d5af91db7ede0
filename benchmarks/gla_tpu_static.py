"""GLA's TPU kernels compared with the limits of the hardware, for every chip, without one.

    python benchmarks/gla_tpu_static.py --quick   T = 4096, 16 heads, with targets; fails if one is missed
    python benchmarks/gla_tpu_static.py           everything: writes benchmarks/results/gla_tpu_static.{json,md,png}

Microseconds are those of `tpu_static.py`: cycles of libtpu's schedule, at least the bytes over the bandwidth. Packed: the
kernel for several documents per sequence, which masks every chunk, so that their number does not matter. The limit is the
longer time of the bytes and of the operations that an implementation with this chunk size needs at least. Per token and
head: forward 8 D bytes and 4 C D + 4 D^2 operations; backward 14 D and 10 C D + 8 D^2, and 4 D^2 / C bytes for states
written and read again.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.gla_cases import make_grid
from benchmarks.tpu_static import CHIPS, Estimate, Job, Kernel, NotEstimated, estimate

RESULTS = Path(__file__).parent / "results"
DIM = 128
TESTED = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "v7x": "TPU7x"}
"""Chips and their `device_kind`."""

PEAK_TFLOPS = {"v5e": 197.0, "v5p": 459.0, "v6e": 918.0, "v7x": 1153.5}
"""Published peak in bfloat16, of a chip (v7x: of one of its two cores)."""

TARGETS = {
  "forward": {"v5e": 84, "v5p": 25, "v6e": 42, "v7x": 25},
  "both": {"v5e": 255, "v5p": 83, "v6e": 126, "v7x": 82},
}
PACKED_TARGET = 1.15  # times the time without documents
EXCEPTIONS: dict[tuple[str, str, bool], str] = {}
"""(chip, passes, packed) -> why the target is missed: the unit that is busy, and what was tried."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table.

  Attributes:
    chip: as in `tpu_static.CHIPS`.
    length: tokens T of a sequence; the batch is 1.
    heads: H.
    passes: "forward" (for inference: no states are saved), or "both" (forward that saves them, and backward).
    packed: several documents per sequence, instead of one.
    us: the estimate in microseconds; None if the program does not fit the chip.
    limit_us: what the hardware allows.
    busiest: of the longest kernel: its busiest unit, and the share of the cycles in which it is.
  """

  chip: str
  length: int
  heads: int
  passes: str
  packed: bool
  us: float | None
  limit_us: float
  busiest: str

  @property
  def ratio(self) -> float | None:
    """Times the limit."""
    return None if self.us is None else self.us / self.limit_us


def jobs_for(length: int, heads: int, passes: str, packed: bool) -> list[Job]:
  """The kernels of one row of the table."""
  shape = {"length": length, "heads": heads, "packed": packed}
  if passes == "forward":
    return [("benchmarks.gla_cases:forward", {**shape, "save": False})]
  return [("benchmarks.gla_cases:forward", {**shape, "save": True}), ("benchmarks.gla_cases:backward", shape)]


def measure(
  chip: str,
  shapes: Sequence[tuple[int, int]],
  passes: Sequence[str] = tuple(TARGETS),
  packed: Sequence[bool] = (False, True),
) -> Iterable[Row]:
  """Rows of a chip, for each (length, heads)."""
  cases = [(*shape, *rest) for shape, *rest in itertools.product(shapes, passes, packed)]
  jobs = [job for case in cases for job in jobs_for(*case)]
  results = iter(estimate(chip, jobs))
  for case in cases:
    yield _row(chip, case, [next(results) for _ in jobs_for(*case)])


def _row(chip: str, case: tuple[int, int, str, bool], results: Sequence[Estimate | NotEstimated]) -> Row:
  limit = limit_us(chip, *case[:3])
  kernels = []
  for result in results:
    if isinstance(result, Estimate):
      kernels += result.kernels
    elif "RESOURCE_EXHAUSTED" in str(result) and "hbm" in str(result).lower():
      return Row(chip, *case, None, limit, "does not fit the memory")
    else:
      raise result
  longest = max(kernels, key=lambda kernel: kernel.us)
  return Row(chip, *case, sum(kernel.us for kernel in kernels), limit, _busiest(longest))


def _busiest(kernel: Kernel) -> str:
  if kernel.hbm_us >= kernel.schedule_us:
    return f"HBM {kernel.hbm_us / kernel.us:.0%}"
  unit = max(kernel.units, key=kernel.units.__getitem__)
  return f"{unit} {kernel.units[unit]:.0%}"


def limit_us(chip: str, length: int, heads: int, passes: str) -> float:
  chunk = make_grid(length, heads, reverse=False, kind=TESTED[chip]).block.chunk_size
  count, operations = 8 * DIM, 4 * chunk * DIM + 4 * DIM**2
  if passes == "both":
    count += 14 * DIM + 4 * DIM**2 // chunk
    operations += 10 * chunk * DIM + 8 * DIM**2
  tokens = length * heads
  return max(tokens * count / CHIPS[chip].gigabytes_per_second / 1e3, tokens * operations / PEAK_TFLOPS[chip] / 1e6)


def target_us(row: Row, rows: Iterable[Row]) -> float:
  """The target of a row for T = 4096 and 16 heads."""
  if not row.packed:
    return TARGETS[row.passes][row.chip]
  (plain,) = (x.us for x in rows if (x.chip, x.passes, x.packed) == (row.chip, row.passes, False))
  assert plain is not None
  return PACKED_TARGET * plain


def quick() -> int:
  """Prints the table for T = 4096 and 16 heads; returns the number of targets missed without an excuse."""
  rows = [row for chip in TESTED for row in measure(chip, [(4096, 16)])]
  missed = 0
  print(f"{'chip':5}{'passes':9}{'packed':8}{'target':>8}{'estimate':>10}{'limit':>8}{'ratio':>7}  busiest")
  for row in rows:
    assert row.us is not None and row.ratio is not None
    target = target_us(row, rows)
    excuse = EXCEPTIONS.get((row.chip, row.passes, row.packed))
    missed += row.us > target and excuse is None
    verdict = "" if row.us <= target else f"  MISSED ({excuse or 'no exception documented'})"
    packed = "yes" if row.packed else "no"
    print(
      f"{row.chip:5}{row.passes:9}{packed:8}{target:8.1f}{row.us:10.1f}{row.limit_us:8.1f}{row.ratio:7.2f}  "
      f"{row.busiest}{verdict}"
    )
  return missed


def everything(chips: Sequence[str]) -> None:
  """Measures all shapes and writes the results; with some chips only, the others' rows stay as they were."""
  path = RESULTS / "gla_tpu_static.json"
  before = json.loads(path.read_text())["rows"] if path.exists() else []
  rows = [Row(**row) for row in before if row["chip"] not in chips]
  for chip in chips:
    rows += measure(chip, [(length, heads) for length in (4096, 32768, 131072) for heads in (16, 32, 64)])
  rows.sort(key=lambda row: (row.chip, row.passes, row.length, row.heads, row.packed))
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
  RESULTS.mkdir(exist_ok=True)
  path.write_text(json.dumps({"versions": versions, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n")
  (RESULTS / "gla_tpu_static.md").write_text(_markdown(rows, versions))
  _plot(rows, RESULTS / "gla_tpu_static.png")


def _markdown(rows: Sequence[Row], versions: dict[str, str]) -> str:
  made = ", ".join(f"{name} {version}" for name, version in versions.items())
  lines = [
    f"Microseconds, batch 1, D = 128, bfloat16; {made}.",
    "",
    "| chip | passes | T | H | packed | us | limit | ratio | busiest |",
  ]
  lines.append("|---|---|---|---|---|---|---|---|---|")
  for row in rows:
    us, ratio = ("-", "-") if row.us is None or row.ratio is None else (f"{row.us:.1f}", f"{row.ratio:.2f}")
    packed = "yes" if row.packed else "no"
    cells = (row.chip, row.passes, row.length, row.heads, packed, us, f"{row.limit_us:.1f}", ratio, row.busiest)
    lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join(lines) + "\n"


def _plot(rows: Sequence[Row], path: Path) -> None:
  """Ratio to the limit over the length, one panel per chip."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, panels = plt.subplots(1, len(TESTED), figsize=(13, 3.6), sharey=True, layout="constrained")
  for chip, panel in zip(TESTED, panels, strict=True):
    for passes, colour in (("forward", "tab:blue"), ("both", "tab:red")):
      for packed, style in ((False, "o-"), (True, "s--")):
        line = [r for r in rows if (r.chip, r.passes, r.packed, r.heads) == (chip, passes, packed, 16) and r.us]
        label = f"{'forward' if passes == 'forward' else 'forward + backward'}{', packed' if packed else ''}"
        panel.plot([r.length for r in line], [r.ratio for r in line], style, color=colour, label=label, alpha=0.8)
    panel.set(title=f"{chip}, 16 heads", xscale="log", xlabel="tokens", ylim=(0.9, 1.8))
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set_xticks([4096, 32768, 131072], ["4k", "32k", "128k"], minor=False)
    panel.minorticks_off()
  panels[0].set_ylabel("time / hardware limit")
  panels[-1].legend(fontsize=8)
  figure.savefig(path, dpi=110)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="T = 4096 and 16 heads, against the targets")
  parser.add_argument("--chip", action="append", choices=TESTED, help="only this chip (may be given more than once)")
  args = parser.parse_args()
  if args.quick:
    sys.exit(1 if quick() else 0)
  everything(args.chip or list(TESTED))


if __name__ == "__main__":
  main()
