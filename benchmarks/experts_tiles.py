"""Which tiles suit the grouped products of LING2's experts on each TPU generation: counted, on a machine without one.

    python benchmarks/experts_tiles.py --quick                    # v5p and v6e, recounts a few kernels
    python benchmarks/experts_tiles.py                            # counts what is not stored yet (hours), then all
    python benchmarks/experts_tiles.py --chip v5p --model ling2   # the same for one chip and model
    python benchmarks/experts_tiles.py --table                    # the table of maxtext_ling2/ops/experts/tiles.py

Counts are kept in benchmarks/results/experts_tiles.json; `maxtext-ling2 plan` reads grouped_cycles.json, made of them.

The time of a product is the longer of its schedule (grid steps x cycles / clock / cores) and its bytes (rereads included;
see maxtext_ling2/plan/grouped.py, which `plan` counts with, too). Steps that wait for the weights of the next expert are
not in it, nor is the start of the kernel: it is a lower bound, good for comparing tiles. The floor is the longer of the
useful operations at the peak and of each array's bytes, once.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.grouped_counts import PLAN, Counts
from benchmarks.grouped_cycles import TWO_CORES, Case
from maxtext_ling2.ops.experts import tiles as expert_tiles
from maxtext_ling2.plan import chips
from maxtext_ling2.plan.grouped import GroupedProduct

MODELS = {"ling2": (2048, 512), "ling2.6-flash": (4096, 1024), "ling2.5-1t": (8192, 2048)}
"""C and F, the width of the model and of an expert."""
EXPERTS = 256
ROWS = (128, 256, 512, 1024, 4096)
"""Rows per expert: 128 of one row of 4096 tokens per device under FSDP, 1024 with the experts over 8 devices."""
CHIPS = {"v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x", "v5e": "TPU v5 lite", "v4": "TPU v4"}
"""Generation -> JAX's `device_kind`."""
PRODUCTS = {
  "wi_fwd": ("gmm", "CF"),
  "wi_dlhs": ("gmm_transposed", "FC"),
  "wi_drhs": ("tgmm", "CF"),
  "wo_fwd": ("gmm", "FC"),
  "wo_dlhs": ("gmm_transposed", "CF"),
  "wo_drhs": ("tgmm", "FC"),
}
"""The kernel that computes each product, and its K and N."""
TIMES_PER_LAYER = {"wi_fwd": 4, "wi_dlhs": 2, "wi_drhs": 2, "wo_fwd": 2, "wo_dlhs": 1, "wo_drhs": 1}
"""wi is two weights (gate, up), and the forward pass runs again for the backward one."""
DEFAULT = (512, 1024, 1024)
"""MaxText's tiles."""
SEARCHED = [(chip, "ling2") for chip in ("v5p", "v6e", "tpu7x")]
SECOND = {"gmm": "gmm_v2", "gmm_transposed": "gmm_v2", "tgmm": "tgmm_v2"}
"""The kernel of use_gmm_v2; it has no transposed weights, MaxText copies them."""


def product(name: str, model: str) -> tuple[str, int, int]:
  """(kernel, K, N)"""
  kernel, (k, n) = PRODUCTS[name]
  width = dict(zip("CF", MODELS[model], strict=True))
  return kernel, width[k], width[n]


def candidates(chip: str, name: str, model: str) -> Iterator[Case]:
  """MaxText's tiles, and K and N whole or in blocks, as far as they may fit the VMEM; two cores need two blocks of N.

  Where SEARCHED does not name chip and model: the largest blocks that fit, which were the best where it does.
  """
  kernel, k, n = product(name, model)
  yield Case(kernel, k, n, DEFAULT)
  parts = (2, 4) if chip in TWO_CORES else (1, 2)
  while kernel != "tgmm" and vmem(Case(kernel, k, n, (128, k, n // parts[0]))) > room(chip):
    parts = (2 * parts[0], 2 * parts[1])
  blocks = list(
    itertools.product((1, 2, 4) if n < k else (1, 2), parts) if kernel == "tgmm" else itertools.product((1,), parts)
  )
  fitting = [
    (i, j) for i, j in blocks if k // i >= 128 <= n // j and vmem(Case(kernel, k, n, (128, k // i, n // j))) <= room(chip)
  ]
  if (chip, model) not in SEARCHED:
    fitting = [(i, j) for i, j in fitting if i * j <= min(x * y for x, y in fitting) * (2 if kernel == "tgmm" else 1)]
  for tm, (i, j) in itertools.product((128, 256, 512), fitting):
    if vmem(case := Case(kernel, k, n, (tm, k // i, n // j))) <= room(chip):
      yield case


def second_version(chip: str, name: str, model: str) -> Iterator[Case]:
  """Kernels of use_gmm_v2 with K and N whole: the tiles that its own heuristic takes, and more rows."""
  kernel, k, n = product(name, model)
  for tm in (128, 256) if (chip, model) in SEARCHED else ():
    yield Case(SECOND[kernel], k, n, (tm, k, n))


def vmem(case: Case) -> int:
  """Bytes of a grid step."""
  return expert_tiles.vmem("wi_drhs" if case.kernel.startswith("tgmm") else "wi_fwd", expert_tiles.Tiles(*case.tiles))


def room(chip: str) -> int:
  """Bytes of the VMEM that libtpu lets one kernel use, with a margin: the compiler decides."""
  return int(1.2 * 2**20 * (32 if chip in ("v6e", "tpu7x") else 16))


@dataclasses.dataclass(frozen=True)
class Timed:
  """A kernel with tiles: seconds of its schedule and of its bytes, the copy of its weights among them."""

  case: Case
  schedule: float
  copies: float

  @property
  def seconds(self) -> float:
    """The longer of the two."""
    return max(self.schedule, self.copies)


def timed(chip: str, case: Case, rows: int, transposes_weights: bool = False) -> Timed | None:
  """A product with `rows` per expert, None where its cycles were not counted.

  Args:
    chip: of CHIPS.
    case: kernel and tiles.
    rows: per expert.
    transposes_weights: whether XLA copies the weights for it first; that comes on top of the kernel.
  """
  sublane = 16 if case.kernel.endswith("_v2") else 8
  one = GroupedProduct(
    case.kernel, EXPERTS, float(rows * EXPERTS), case.k, case.n, "bfloat16", case.tiles, sublane=sublane
  )
  limits = chips.CHIPS[chip]
  schedule, counted = one.seconds(limits)
  copied = 4 * EXPERTS * case.k * case.n / limits.memory_bandwidth if transposes_weights else 0.0  # read and written
  return Timed(case, schedule + copied, one.bytes_accessed / limits.memory_bandwidth + copied) if counted else None


def floor(chip: str, case: Case, rows: int) -> float:
  """Seconds that the useful operations need at the peak, or the arrays, moved once, at the bandwidth of the HBM."""
  m, limits = rows * EXPERTS, chips.CHIPS[chip]
  moved = 2 * (m * case.k + EXPERTS * case.k * case.n + m * case.n)
  return max(2 * m * case.k * case.n / limits.flops, moved / limits.memory_bandwidth)


Choice = dict[str, Timed]
"""By product."""


def best(chip: str, model: str, rows: int, cases: Iterable[Case]) -> Choice:
  """The fastest tiles of the six products whose rows divide those of wi_fwd, to which MaxText pads."""
  cases = list(cases)
  of = {name: [case for case in cases if (case.kernel, case.k, case.n) == product(name, model)] for name in PRODUCTS}
  return _best({name: [x for case in some if (x := timed(chip, case, rows))] for name, some in of.items()})


def best_second_version(chip: str, model: str, rows: int) -> Choice | None:
  """The same for use_gmm_v2; None where its kernels were not counted."""
  of = {
    name: [x for case in second_version(chip, name, model) if (x := timed(chip, case, rows, name.endswith("dlhs")))]
    for name in PRODUCTS
  }
  return _best(of) if all(of.values()) else None


def _best(of: dict[str, list[Timed]]) -> Choice:
  """Of those that take as long, as they wait for the same bytes, the one with the shorter schedule."""
  choices = []
  for padding in {x.case.tiles[0] for x in of["wi_fwd"]}:
    fitting = {name: [x for x in some if padding % x.case.tiles[0] == 0] for name, some in of.items()}
    fitting["wi_fwd"] = [x for x in fitting["wi_fwd"] if x.case.tiles[0] == padding]
    if all(fitting.values()):
      choices.append({name: min(some, key=lambda x: (x.seconds, x.schedule)) for name, some in fitting.items()})
  return min(choices, key=lambda choice: (layer(choice), sum(x.schedule for x in choice.values())))


def layer(choice: Choice) -> float:
  """Seconds of the twelve products of a layer."""
  return sum(TIMES_PER_LAYER[name] * one.seconds for name, one in choice.items())


def report(chip: str, model: str, rows: int, choice: Choice) -> list[dict[str, Any]]:
  """A record per product, and one for the twelve of a layer."""
  known = {(x["chip"], x["kernel"], x["k"], x["n"], tuple(x["tiles"])): x["cycles"] for x in json.loads(PLAN.read_text())}
  shown = {"chip": chip, "model": model, "rows": rows}
  records, whole = [], 0.0
  for name, one in choice.items():
    case, least = one.case, floor(chip, one.case, rows)
    whole += TIMES_PER_LAYER[name] * least
    cycles = known[chip, case.kernel, case.k, case.n, case.tiles]
    records.append(
      {**shown, "product": name, "kernel": case.kernel, "tiles": case.tiles, "cycles": cycles}
      | {
        "schedule_ms": one.schedule * 1e3,
        "hbm_ms": one.copies * 1e3,
        "floor_ms": least * 1e3,
        "ratio": one.seconds / least,
      }
    )
  if set(choice) == set(PRODUCTS):
    kernel = "use_gmm_v2" if choice["wi_fwd"].case.kernel.endswith("_v2") else "megablox"
    records.append(
      {**shown, "product": "layer", "kernel": kernel, "layer_ms": layer(choice) * 1e3, "floor_ms": whole * 1e3}
      | {"ratio": layer(choice) / whole}
    )
  return records


def show(records: Sequence[dict[str, Any]]) -> None:
  """Prints records as a table; rows are those per expert, cycles those of a grid step."""
  print("chip  | model         | rows | product | kernel          | tiles          | cycles |      ms |   floor | ratio")
  for x in records:
    time = x.get("layer_ms") or max(x["schedule_ms"], x["hbm_ms"])
    tiles = ", ".join(map(str, x.get("tiles", ("all twelve",))))
    print(
      f"{x['chip']:5} | {x['model']:13} | {x['rows']:4} | {x['product']:7} | {x['kernel']:15} | {tiles:14} | "
      f"{x.get('cycles', ''):6} | {time:7.3f} | {x['floor_ms']:7.3f} | {x['ratio']:5.2f}"
    )


def is_counted(counts: Counts, chip: str, model: str) -> bool:
  """Whether there is a count of megablox's kernel for each product."""
  return {product(name, model) for name in PRODUCTS} <= {(x.kernel, x.k, x.n) for x in counts.cases(chip)}


def everything(counts: Counts, models: Iterable[str], of_chips: Iterable[str]) -> list[dict[str, Any]]:
  """The best tiles, MaxText's own, and use_gmm_v2, as far as they are counted."""
  records = []
  for model, chip, rows in itertools.product(models, list(of_chips), ROWS):
    cases = counts.cases(chip)
    if not is_counted(counts, chip, model):
      continue
    records += report(chip, model, rows, best(chip, model, rows, cases))
    default = [case for case in cases if case.tiles == DEFAULT]
    if {product(name, model) for name in PRODUCTS} <= {(case.kernel, case.k, case.n) for case in default}:
      records += [{**report(chip, model, rows, best(chip, model, rows, default))[-1], "kernel": "MaxText's tiles"}]
    if second := best_second_version(chip, model, rows):
      records += report(chip, model, rows, second)[-1:]
  return records


def quick() -> list[dict[str, Any]]:
  """Recounts a few kernels and says where a stored count differs."""
  records = []
  with tempfile.TemporaryDirectory() as folder:
    stored, new = Counts(), Counts(Path(folder) / "counts.json", None)
    for chip, tiles in {"v5p": (128, 2048, 256), "v6e": (256, 2048, 512)}.items():
      new.add(chip, [Case("gmm", 2048, 512, DEFAULT), Case("gmm", 2048, 512, tiles), Case("tgmm", 2048, 512, tiles)])
    for (chip, case), cycles in new.found.items():
      if cycles != stored.found.get((chip, case)):
        print(f"{chip} {case}: stored {stored.found.get((chip, case))}, now {cycles}")
      name = "wi_fwd" if case.kernel == "gmm" else "wi_drhs"
      for rows in ROWS:
        records += report(chip, "ling2", rows, {name: one}) if (one := timed(chip, case, rows)) else []
  return records


def table(counts: Counts) -> str:
  """The table of ops/experts/tiles.py, as Python."""
  lines = []
  for chip, kind in CHIPS.items():
    lines.append(f'  "{kind}": {{')
    for model, widths in MODELS.items():
      if not is_counted(counts, chip, model):
        continue
      lines.append(f"    {widths}: {{")
      before: list[tuple[int, int, int]] = []
      for rows in ROWS:
        choice = best(chip, model, rows, counts.cases(chip))
        tiles = [choice[name].case.tiles for name in PRODUCTS]
        if tiles != before:
          lines.append(f"      {rows}: ({', '.join(map(str, tiles))}),")
        before = tiles
      lines.append("    },")
    lines.append("  },")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="recount a few kernels; about two minutes on an idle core")
  parser.add_argument("--table", action="store_true", help="prints the table from the stored counts; counts nothing")
  parser.add_argument("--stored", action="store_true", help="counts nothing")
  parser.add_argument("--chip", choices=CHIPS, action="append", help="default: all")
  parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
  parser.add_argument("--json", type=Path, metavar="FILE", help="writes what is printed")
  args = parser.parse_args()
  counts = Counts()
  if args.table:
    print(table(counts))
    return
  models, of_chips = args.model or MODELS, args.chip or CHIPS
  if not (args.quick or args.stored):
    for model, chip in itertools.product(models, of_chips):
      counts.add(
        chip, [case for name in PRODUCTS for case in (*candidates(chip, name, model), *second_version(chip, name, model))]
      )
  records = quick() if args.quick else everything(counts, models, of_chips)
  show(records)
  if args.json:
    args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
  main()
