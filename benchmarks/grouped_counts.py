"""The counted cycles of grouped products, kept in files: all of them, and those that `maxtext-ling2 plan` reads."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tpu_static
from benchmarks.grouped_cycles import Case, Cycles, count
from maxtext_ling2.plan import grouped

ROOT = Path(__file__).parents[1]
STORE = ROOT / "benchmarks" / "results" / "experts_tiles.json"
PLAN = grouped.CYCLES


class Counts:
  """Counted cycles by chip and case, kept in a file; None: does not compile."""

  def __init__(self, path: Path = STORE, plan: Path | None = PLAN):
    self.path, self.plan = path, plan
    self.found: dict[tuple[str, Case], Cycles | None] = {}
    for record in json.loads(path.read_text()) if path.exists() else ():
      self.found[record["chip"], _case(record)] = Cycles(**record["cycles"]) if record["cycles"] else None

  def add(self, chip: str, cases: Iterable[Case]) -> None:
    """Counts those that are not there yet, and saves after each."""
    missing = [case for case in dict.fromkeys(cases) if (chip, case) not in self.found]
    for case, answer in count(_static(chip), missing):
      self.found[chip, case] = answer if isinstance(answer, Cycles) else None
      print(chip, case, answer if isinstance(answer, Cycles) else str(answer)[-200:], file=sys.stderr, flush=True)
      self.save()

  def save(self) -> None:
    """Writes all counts, and what `plan` reads of them."""
    order = sorted(self.found.items(), key=lambda item: (item[0][0], dataclasses.astuple(item[0][1])))
    _write(
      self.path,
      [{"chip": chip, **dataclasses.asdict(case), "cycles": x and dataclasses.asdict(x)} for (chip, case), x in order],
    )
    if self.plan:
      _write(self.plan, [_for_plan(chip, case, cycles) for (chip, case), cycles in order if cycles])
      grouped._cycles.cache_clear()

  def cases(self, chip: str) -> list[Case]:
    """Those of a chip that compile."""
    return [case for (of, case), cycles in self.found.items() if of == chip and cycles]


def _for_plan(chip: str, case: Case, cycles: Cycles) -> dict[str, Any]:
  """A record of what `plan` reads: no step is shorter than a copy out of the HBM takes to begin."""
  step = max(cycles.step, tpu_static.CHIPS[_static(chip)].latency)
  once = {"per_group": min(cycles.per_group, step - 1)} if cycles.per_group else {}
  shown = {"chip": chip, "kernel": case.kernel, "k": case.k, "n": case.n, "dtype": "bfloat16", "tiles": case.tiles}
  return {**shown, "cycles": step, "cores": case.cores(chip), **once}


def _static(chip: str) -> str:
  """The name of a chip in `tpu_static`."""
  return {"tpu7x": "v7x"}.get(chip, chip)


def _case(record: dict[str, Any]) -> Case:
  return Case(record["kernel"], record["k"], record["n"], tuple(record["tiles"]))


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
  """One record a line; another process may be reading."""
  beside = path.with_suffix(".tmp")
  beside.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
  beside.replace(path)
