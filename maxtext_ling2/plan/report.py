"""What `maxtext-ling2 plan` prints and draws."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from maxtext_ling2.plan.estimate import Estimate
from maxtext_ling2.plan.search import Candidate

ASSUMPTIONS = (
  "Pessimistic: each instruction takes the longer of its computing and its bytes, one after the other, and all "
  "collectives, asynchronous ones too, come on top at the rate of a device at the edge of the slice. Optimistic: the "
  "longest of all computing, all bytes, and all that is sent over all links. MFU: the model's operations alone. "
  "Counted, in the compiled program: bytes, operands and results once, collectives' too; loops as often as they run; "
  "operations of matrix products, recomputed ones and each pass of precise ones too; cycles of GLA's kernels and, where "
  "a table has them, of grouped products, from libtpu's schedules. Calculated: visits of tiles by grouped products and "
  "their rereads, for random routing; rows of a ragged all-to-all; bytes sent, by ring algorithms; floors, from shapes. "
  "Neither bound models stalls, the latency of small transfers, the operations of the VPU, the network between slices, "
  "or which links a ring over a part of the slice uses (maybe one line alone). Nothing has run on these chips."
)


def line(option: Estimate) -> str:
  """What is told of an option as soon as it is there."""
  where, minutes = f"{option.topology}, {option.mesh or 'fsdp'}", f"{option.compile_seconds / 60:.1f} min"
  if option.fits:
    return f"{where}: compiled in {minutes}"
  if math.isnan(option.memory):  # there is no program
    return f"{where}: {option.problem}"
  return f"{where}: compiled in {minutes}; does not fit: {option.problem}"


def ranking(topology: str, candidates: Sequence[Candidate]) -> Table:
  """What the search found by arithmetic, before anything is compiled."""
  table = Table("mesh", "step ms", "GiB", "device us per token", title=f"{topology}: ranked by arithmetic, not compiled")
  for one in candidates:
    cells = (f"{one.seconds * 1e3:.0f}", f"{one.memory / 2**30:.0f}", f"{one.device_seconds_per_token * 1e6:.1f}")
    table.add_row(one.name, *cells)
  return table


def summary(options: Sequence[Estimate]) -> Table:
  """All options, a row each."""
  columns = (
    "topology",
    "mesh",
    "devices",
    "fits",
    "GiB",
    "TFLOP",
    "GiB moved",
    "GiB sent (sync)",
    "step s",
    "tokens/s",
  )
  table = Table(*columns, "MFU", title="a train step, per device (tokens/s: of all); optimistic - pessimistic")
  for one in options:
    cells = [one.topology, one.mesh or "fsdp", str(one.devices), "yes" if one.fits else "NO"]
    needed = "?" if math.isnan(one.memory) else f"{one.memory / 2**30:.1f}"
    cells.append(f"{needed} of {one.capacity / 2**30:.1f}")
    if one.fits and one.tflops is not None and one.bytes_accessed is not None:
      sent, waited = (sum(size for _, size in kinds.values()) for kinds in (one.collectives, one.synchronous))
      cells += [f"{one.tflops:.1f}", f"{one.bytes_accessed / 2**30:.0f}", f"{sent / 2**30:.1f} ({waited / 2**30:.1f})"]
      cells.append(f"{one.lower_seconds:.3f} - {one.upper_seconds:.3f}")
      slow, fast = one.tokens_per_second
      cells.append(f"{fast:,.0f} - {slow:,.0f}")
      cells.append(f"{one.mfu[1]:.0%} - {one.mfu[0]:.0%}")
    table.add_row(*cells)
  return table


def print_parts(console: Console, option: Estimate) -> None:
  """What each part of the model takes, and what was assumed."""
  title = f"{option.topology}, {option.mesh or 'fsdp'}: parts, pessimistic (links: {option.edge_share:.0%} of a chip's)"
  table = Table("part", "floor ms", "GB", "compute ms", "HBM ms", "ICI ms", "ms", "bound by", title=title)
  for part in option.parts:
    floor = "" if part.floor_seconds != part.floor_seconds else f"{part.floor_seconds * 1e3:.1f}"
    times = (part.compute_seconds, part.memory_seconds, part.ici_seconds, part.seconds)
    milliseconds = [f"{seconds * 1e3:.1f}" for seconds in times]
    table.add_row(part.name, floor, f"{part.bytes_accessed / 1e9:.1f}", *milliseconds, part.bound)
  console.print(table)
  for what, count in collections.Counter(
    re.sub(r"conditional \S+:", "conditional:", one) for one in option.assumed
  ).items():
    console.print(what if count == 1 else f"{count} x {what}")


def draw(options: Sequence[Estimate], model: str, path: Path) -> None:
  """Writes `figure` to a file, at 120 dots per inch."""
  figure(options, model).savefig(path, dpi=120)


def figure(options: Sequence[Estimate], model: str) -> Any:
  """A matplotlib Figure with bars for each option: memory, time by resource, and time by part of the model."""
  from matplotlib.figure import Figure

  names = [f"{one.topology}\n{one.mesh or 'fsdp'}" for one in options]
  drawn = Figure(figsize=(4 + 1.6 * len(options), 11), layout="constrained")
  memory, seconds, parts = drawn.subplots(3)
  memory.bar(names, [one.memory / 2**30 for one in options], color=["C0" if one.fits else "C3" for one in options])
  memory.plot(names, [one.capacity / 2**30 for one in options], "k_", markersize=30, label="capacity")
  memory.set(title=model, ylabel="GiB per device")
  resources = ("compute", "memory", "ici")
  times = {label: [getattr(one, f"{label}_seconds") if one.fits else 0.0 for one in options] for label in resources}
  _stack(seconds, names, times)
  seconds.set(ylabel="seconds per step, no overlap")
  found = dict.fromkeys(part.name for one in options for part in one.parts)
  taken = [{part.name: part.seconds for part in one.parts} for one in options]
  _stack(parts, names, {name: [one.get(name, 0.0) for one in taken] for name in found})
  parts.set(ylabel="seconds per step, pessimistic")
  for axes in (memory, seconds, *([parts] if found else [])):
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
  return drawn


def _stack(axes: Any, names: Sequence[str], values: Mapping[str, Sequence[float]]) -> None:
  """A bar for each name, of all values one on top of the other."""
  bottom = [0.0] * len(names)
  for number, (label, heights) in enumerate(values.items()):
    axes.bar(names, heights, bottom=bottom, label=label, color=f"C{number % 10}", hatch="//" if number > 9 else None)
    bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
