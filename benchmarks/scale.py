"""Makes docs/scale.md and its picture: LING2's models compiled ahead of time for the chips they are trained on, by
`maxtext-ling2 plan`.

    python benchmarks/scale.py                 all rows, each in a process of its own; hours on two cores
    python benchmarks/scale.py --only 1t       the rows whose name holds this text
    python benchmarks/scale.py --render        only page and picture, from the results that are kept

What `plan` has compiled before it takes from its cache. Results are kept in benchmarks/results/scale, a file a row.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maxtext_ling2.maxtext_api import overrides

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "scale"
PAGE = ROOT / "docs" / "scale.md"
PICTURE = ROOT / "docs" / "images" / "scale.png"


class Row(NamedTuple):
  """A training job: what is given to `maxtext-ling2 plan`."""

  name: str
  model: str
  topology: str
  mesh: str = ""
  settings: tuple[str, ...] = ()
  recipe: str = ""

  @property
  def command(self) -> list[str]:
    given = [("--mesh", self.mesh), ("--recipe", self.recipe)]
    options = [word for option, value in given if value for word in (option, value)]
    return ["plan", self.model, "--topology", self.topology, *options, *self.settings]


LONG = ("max_target_length=32768", "per_device_batch_size=0.125")
"""Sequences of 32768 tokens, one for eight devices that share it."""
SHORT = ("max_target_length=2048",)
"""MaxText's own default."""

ROWS = (
  *(Row(f"recipe-ling2-{chips}", "ling2", chips, recipe=f"ling2-{chips}") for chips in ("v5p-64", "v6e-64", "tpu7x-64")),
  Row("recipe-flash-v5p-256", "ling2.6-flash", "v5p-256", settings=SHORT, recipe="ling2.6-flash-v5p-256"),
  *(Row(f"ling2-{chips}", "ling2", chips) for chips in ("v5p-64", "v6e-64", "tpu7x-64")),
  *(Row(f"ling2-{chips}-32k", "ling2", chips, "context=8", LONG) for chips in ("v5p-64", "v6e-64", "tpu7x-64")),
  Row("ling2-v6e-64-expert", "ling2", "v6e-64", "expert=8"),
  Row("ling2-v5p-64-128k", "ling2", "v5p-64", "context=8", ("max_target_length=131072", "per_device_batch_size=0.125")),
  # On v6e-256, whose chips are 16 x 16, FSDP alone, which gathers all experts of a layer, needs 59 GiB of temporaries.
  *(Row(f"flash-{chips}", "ling2.6-flash", chips, "expert=16", SHORT) for chips in ("v5p-256", "v6e-256")),
  # One FSDP axis of 1024 cannot cut kv_lora_rank, 512; the chips of a v5p-2048 are 8 x 8 x 16.
  *(Row(f"1t-{chips}", "ling2.5-1t", chips, "tensor=8", SHORT) for chips in ("v5p-2048", "tpu7x-1024")),
)


def measure(row: Row) -> None:
  """Compiles a row in a new process and keeps the result; the commit and the date stand in it."""
  RESULTS.mkdir(parents=True, exist_ok=True)
  file = RESULTS / f"{row.name}.json"
  made = file.with_suffix(".partial")
  print(" ".join(row.command), flush=True)
  done = subprocess.run(
    [sys.executable, "-m", "maxtext_ling2", *row.command, "--json", str(made)], stdout=subprocess.PIPE, text=True
  )
  if not made.is_file():
    raise SystemExit(f"{row.name}: exit {done.returncode}, no result")
  result = json.loads(made.read_text(encoding="utf-8"))
  result["date"] = datetime.date.today().isoformat()
  made.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
  made.replace(file)


def render() -> str:
  """The page, of all results that are kept."""
  rows = [(row, json.loads(file.read_text())) for row in ROWS if (file := RESULTS / f"{row.name}.json").is_file()]
  lines = [
    "# Scale",
    "",
    "What a training step takes, before the chips are there: the whole step (forward, backward, AdamW, fp32 weights and",
    "moments, scanned layers, MaxText's default rematerialisation) compiled ahead of time for the named chips by",
    "[`maxtext-ling2 plan`](plan.md). A row is one device: a chip, on tpu7x one of its two cores. v5p-64 are",
    "32 chips, as MaxText and Google count. Made by `python benchmarks/scale.py`; do not edit.",
    "",
    "| model | T | topology | devices | mesh | batch | GiB of | fits | step s | tokens/s | MFU | min |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  lines += [_line(row, result) for row, result in rows]
  lines += ["", "![Memory and MFU of each row](images/scale.png)", "", *_READ, "## Commands", "", "```sh"]
  lines += [f"maxtext-ling2 {' '.join(row.command)}" for row, _ in rows]
  missing = [row for row in ROWS if row not in [made for made, _ in rows]]
  if missing:
    lines += ["```", "", "Not compiled yet:", "", "```sh", *(f"maxtext-ling2 {' '.join(row.command)}" for row in missing)]
  lines += ["```", "", "## Versions", "", *_versions([result for _, result in rows])]
  return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
  """Draws memory against capacity, and the two bounds of the MFU where they stand, into a PNG file."""
  from matplotlib.figure import Figure

  found = [
    (row, json.loads(file.read_text())["options"][0]) for row in ROWS if (file := RESULTS / f"{row.name}.json").is_file()
  ]
  figure = Figure(figsize=(10, 0.32 * len(found) + 1), layout="constrained")
  memory, mfu = figure.subplots(1, 2, sharey=True)
  for place, (_, one) in enumerate(found):
    memory.barh(place, (one["memory"] or 0) / 2**30, color="C0" if one["fits"] else "C3")
    memory.plot(one["capacity"] / 2**30, place, "k|", markersize=14)
    if "parts" in one and one["fits"]:
      least, most = one["mfu"]
      mfu.barh(place, 100 * (most - least), left=100 * least, color="C2")
  names = [
    f"{row.model}, {row.topology}, {row.mesh or ('recipe' if row.recipe else 'fsdp')}, T={_length(row)}"
    for row, _ in found
  ]
  memory.set(yticks=range(len(found)), yticklabels=names, xlabel="GiB per device; | is what it has")
  memory.invert_yaxis()
  mfu.set(xlim=(0, 100), xlabel="MFU in %, pessimistic to optimistic")
  for axes in (memory, mfu):
    axes.grid(axis="x", alpha=0.3)
  figure.savefig(path, dpi=100)


_READ = (
  "**Memory** is the compiler's: arguments, temporaries and code at the peak; where a step does not fit, what it needs.",
  "**batch** is in sequences, of all devices together. **min** are minutes to compile here, on a part of two cores.",
  "",
  "**Step time** lies between two bounds, which [`plan`](train_step.md#what-plan-counts) explains: optimistic, the",
  "longest of all computing, all bytes from and to the HBM, and all bytes sent; pessimistic, every instruction after",
  "the other and all collectives on top, at the rate of a device at the edge of the slice. **MFU** is the share of the",
  "peak that the model's operations, as MaxText counts them, get. No row has run on these chips.",
  "",
  "**Withdrawn**: the step times, tokens per second and MFU that this page gave before 2026-11-26 were wrong, and both",
  "of their bounds too hopeful. They counted each grouped product of the experts as if its tiles fitted, no bytes that",
  "collectives write, synchronous collectives as if they overlapped, and links in both directions at once. (For ling2",
  "on v5p-64 the page said 16 % to 32 % MFU; with the same settings 7 % to 11 % were to be expected.) Rows that have",
  "not been compiled since keep what the compiler said of their memory alone.",
  "",
)


def _length(row: Row) -> str:
  """Tokens per sequence; ling2.yml has 4096."""
  return overrides.parse(row.settings).get("max_target_length", "4096")


def _line(row: Row, result: dict[str, Any]) -> str:
  (one,) = result["options"]
  length, slices = _length(row), overrides.parse(row.settings).get("compile_topology_num_slices", "1")
  where = row.topology if slices == "1" else f"{slices} x {row.topology}"
  memory = "?" if one["memory"] is None else f"{one['memory'] / 2**30:.1f}"
  cells = [row.model, length, where, str(one["devices"]), row.mesh or (f"recipe {row.recipe}" if row.recipe else "fsdp")]
  cells.append(f"{one['tokens'] / int(length):.0f}" if one["fits"] else "")
  cells += [f"{memory} / {one['capacity'] / 2**30:.1f}", "yes" if one["fits"] else "no"]
  if "parts" in one and one["fits"]:
    (low, high), (slow, fast), (least, most) = one["seconds"], one["tokens_per_second"], one["mfu"]
    cells += [f"{low:.2f} - {high:.2f}", f"{_round(slow)} - {_round(fast)}", f"{least:.0%} - {most:.0%}"]
  elif one["fits"]:
    cells += ["withdrawn"] * 3
  else:
    cells += ["", "", ""]
  cells.append(f"{one['compile_seconds'] / 60:.0f}")
  return f"| {' | '.join(cells)} |"


def _round(value: float) -> str:
  """Two digits that count, in thousands."""
  step = 10 ** max(math.floor(math.log10(value)) - 1, 0)
  return f"{round(value / step) * step / 1000:,.0f} k"


def _versions(results: Sequence[dict[str, Any]]) -> list[str]:
  """A line for each set of versions, with its dates."""
  dates: dict[str, set[str]] = {}
  for result in results:
    text = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    dates.setdefault(text, set()).add(result["date"])
  return [f"{text}: compiled on {', '.join(sorted(days))}." for text, days in dates.items()]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds this")
  parser.add_argument("--render", action="store_true", help="compile nothing")
  options = parser.parse_args()
  rows = [row for row in ROWS if options.only in row.name]
  if not rows:
    raise SystemExit(f"--only {options.only}: no row; there are {', '.join(row.name for row in ROWS)}")
  for row in () if options.render else rows:
    measure(row)
    PAGE.write_text(render(), encoding="utf-8")
  PAGE.write_text(render(), encoding="utf-8")
  draw(PICTURE)


if __name__ == "__main__":
  main()
