"""A GLA layer of ling2 on TPUs, without one: the time of its kernels, and the bytes XLA moves around them.

    python benchmarks/layer_tpu_static.py --chip v6e   the table of a chip, with targets; fails if one is missed
    python benchmarks/layer_tpu_static.py              all chips: writes benchmarks/results/layer_tpu_static.{json,md,png}
    python benchmarks/layer_tpu_static.py --rest       the other parts of a layer: MLA, router, shared expert, MTP's input

T = 4096, batch 1, bfloat16, one device: products for q, k, v and gate, norm, rotation, GLA, norm and gate, product of the
output. "Plain" is the layer as a sequence of modules, in which only GLA is a kernel; "fused" is the plugin's. Kernels are
counted by `tpu_static.py`. Around them: bytes that XLA's own operations read and write. Their floor: each product reads
its two operands and writes its result, once, and nothing else. In microseconds, products are at the peak of the chip or
at the bandwidth of their floor, whichever is slower, and what is moved beyond the floor is at full bandwidth.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.gla_tpu_static import PEAK_TFLOPS, RESULTS, TESTED
from benchmarks.tpu_static import CHIPS, Estimate, estimate

LENGTH, EMBED, HEADS, DIM = 4096, 2048, 16, 128
PRODUCTS = {"forward": 5, "both": 15}
"""q, k, v, gate and output; backward two more for each."""

TARGET_MIB = {"forward": 280, "both": 1100}
"""Bytes around the kernels of the fused layer, on v6e."""
KERNEL_TARGET = 1.25
"""On v6e: time of the kernels over that of the bytes they must move. (On v7x GLA's own kernels take 1.28.)"""


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table.

  Attributes:
    chip: as in `tpu_static.CHIPS`.
    passes: "forward", or "both": forward and backward.
    form: "plain" or "fused".
    kernels: name -> microseconds, all its runs together.
    kernel_ratio: time of all kernels over that of their bytes at full bandwidth.
    around: MiB.
    floor: MiB around the kernels that are needed in any case.
  """

  chip: str
  passes: str
  form: str
  kernels: dict[str, float]
  kernel_ratio: float
  around: float
  floor: float

  @property
  def product_us(self) -> float:
    """Time of the products at the chip's peak."""
    return PRODUCTS[self.passes] * 2 * LENGTH * EMBED * HEADS * DIM / PEAK_TFLOPS[self.chip] / 1e6

  def moved_us(self, mib: float) -> float:
    """At full bandwidth."""
    return mib * 2**20 / CHIPS[self.chip].gigabytes_per_second / 1e3

  def parts(self) -> dict[str, float]:
    """The parts of the layer's time, in microseconds."""
    gla = sum(us for name, us in self.kernels.items() if name.startswith("gla_"))
    return {
      "GLA": gla,
      "norm, rotation, gate": sum(self.kernels.values()) - gla,
      "products": max(self.product_us, self.moved_us(self.floor)),
      "XLA moves besides": self.moved_us(max(self.around - self.floor, 0.0)),
    }

  def missed(self) -> list[str]:
    """Targets that are not met."""
    if self.form == "plain" or self.chip != "v6e":
      return []
    found = [f"kernels {self.kernel_ratio:.2f} x"] if self.kernel_ratio > KERNEL_TARGET else []
    if self.around > TARGET_MIB[self.passes]:
      found.append(f"around {self.around:.0f} MiB")
    return found


def measure(chip: str, forms: Sequence[str] = ("plain", "fused")) -> Iterator[Row]:
  """Rows of a chip."""
  cases = [(passes, form) for passes in PRODUCTS for form in forms]
  layer = "benchmarks.layer_cases:gla_layer"
  jobs = [(layer, {"length": LENGTH, "gradients": passes == "both", "plain": form == "plain"}) for passes, form in cases]
  results: dict[tuple[str, str], Estimate] = {}
  for case, result in zip(cases, estimate(chip, jobs), strict=True):
    if not isinstance(result, Estimate):
      raise result
    results[case] = result
  for (passes, form), result in results.items():
    # One floor for all forms: the products of the plain form move more.
    floor = min(results[passes, other].product_bytes for other in forms)
    kernels: dict[str, float] = {}
    for kernel in result.kernels:
      name = kernel.name.split(".")[0]
      kernels[name] = kernels.get(name, 0.0) + kernel.us
    ratio = result.us / sum(kernel.hbm_us for kernel in result.kernels)
    yield Row(chip, passes, form, kernels, ratio, result.around_bytes / 2**20, floor / 2**20)


REST = ("mla_layer", "router", "shared_expert", "mtp_input")


def rest(chip: str) -> str:
  """A table of the other parts of a layer: MiB that XLA moves, against its floor."""
  jobs = [(f"benchmarks.layer_cases:{name}", {"gradients": passes == "both"}) for name in REST for passes in PRODUCTS]
  lines = ["| chip | part | passes | around, MiB | floor | x floor |", "|---|---|---|---|---|---|"]
  for (target, arguments), result in zip(jobs, estimate(chip, jobs, bytes_only=True), strict=True):
    if not isinstance(result, Estimate):
      raise result
    moved, floor = result.around_bytes / 2**20, result.product_bytes / 2**20
    passes = "forward + backward" if arguments["gradients"] else "forward"
    name = target.partition(":")[2].replace("_", " ")
    lines.append(f"| {chip} | {name} | {passes} | {moved:.0f} | {floor:.0f} | {moved / floor:.2f} |")
  return "\n".join(lines) + "\n"


HEADINGS = (
  *("chip", "passes", "form", "around, MiB", "target", "floor", "x floor", "around, us", "products, us", "GLA, us"),
  *("norms, us", "kernels x HBM", "target", "layer, us"),
)


def cells(row: Row) -> list[str]:
  """A line of the table, under `HEADINGS`."""
  parts = row.parts()
  has_target = row.form == "fused" and row.chip == "v6e"
  target = str(TARGET_MIB[row.passes]) if has_target else ""
  figures = [f"{row.around:.0f}", target, f"{row.floor:.0f}", f"{row.around / row.floor:.2f}"]
  figures += [
    f"{us:.1f}" for us in (row.moved_us(row.around), row.product_us, parts["GLA"], parts["norm, rotation, gate"])
  ]
  figures += [f"{row.kernel_ratio:.2f}", str(KERNEL_TARGET) if has_target else "", f"{sum(parts.values()):.1f}"]
  return [row.chip, "forward" if row.passes == "forward" else "forward + backward", row.form, *figures]


def table(rows: Sequence[Row]) -> str:
  """As Markdown."""
  lines = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
  """Stacked bars: the parts of a layer's time, one panel per chip."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  chips = list(dict.fromkeys(row.chip for row in rows))
  figure, panels = plt.subplots(1, len(chips), figsize=(3.3 * len(chips), 4), layout="constrained", squeeze=False)
  for chip, panel in zip(chips, panels[0], strict=True):
    chosen = [row for row in rows if row.chip == chip]
    height = [0.0] * len(chosen)
    for part, colour in zip(chosen[0].parts(), ("tab:blue", "tab:cyan", "tab:green", "tab:red"), strict=True):
      values = [row.parts()[part] for row in chosen]
      panel.bar(range(len(chosen)), values, bottom=height, color=colour, label=part)
      height = [low + value for low, value in zip(height, values, strict=True)]
    labels = [f"{row.form}\n{'fwd' if row.passes == 'forward' else 'fwd + bwd'}" for row in chosen]
    panel.set_xticks(range(len(chosen)), labels, fontsize=8)
    panel.set(title=chip, ylabel="microseconds" if chip == chips[0] else None)
  panels[0][0].legend(fontsize=8, loc="upper left")
  figure.savefig(path, dpi=110)


def _versions() -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "maxtext")}


def _made() -> str:
  return ", ".join(f"{name} {version}" for name, version in _versions().items())


def main() -> int:
  """Exit code: 1 if a target is missed."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--chip", action="append", choices=TESTED, help="only this chip (may be given more than once)")
  parser.add_argument("--rest", action="store_true", help="the other parts of a layer")
  arguments = parser.parse_args()
  chips = arguments.chip
  if arguments.rest:
    text = "\n".join(map(rest, chips or ("v6e", "v5p")))
    print(text)
    if not chips:
      (RESULTS / "layer_rest_tpu_static.md").write_text(f"{_made()}.\n\n{text}")
    return 0
  rows = [row for chip in chips or TESTED for row in measure(chip)]
  print(table(rows))
  if not chips:
    results = {"versions": _versions(), "rows": [dataclasses.asdict(row) for row in rows]}
    (RESULTS / "layer_tpu_static.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "layer_tpu_static.md").write_text(f"{_made()}.\n\n{table(rows)}")
    plot(rows, RESULTS / "layer_tpu_static.png")
  missed = [f"{row.chip}, {row.passes}: {', '.join(row.missed())}" for row in rows if row.missed()]
  print("\n".join(f"MISSED: {text}" for text in missed) or "every target is met")
  return 1 if missed else 0


if __name__ == "__main__":
  sys.exit(main())
