"""How long Pallas TPU kernels take, read on a machine without a TPU from the schedules libtpu makes for real chips.

    python benchmarks/tpu_static.py benchmarks.gla_cases:forward --chip v6e --set length=4096 --set heads=16

The target is a function that returns (function, arguments as jax.ShapeDtypeStruct). For each Mosaic kernel in the
compiled program: VLIW cycles of one grid step, grid steps, the time of the schedule, the time its operands and results
need at the bandwidth of the HBM, and the larger of the two, which is the estimate. The count repeats to the cycle.

libtpu writes, for each kernel, one row per VLIW cycle with the slots in use (waiting cycles included), and the final
bundles, whose marks tell the depth of loops; the exit test of the grid's loop compares with the number of steps + 2, the
stages of the pipeline. So: cycles of a step = rows - bundles outside of the loop; time = steps * cycles / clock.

Limits. A branch counts as if it were always taken: what stands under two `pl.when` is added up (so the tables, which
GLA's kernels fill once per group of heads, count in every step). A loop within a kernel, or around it, is refused: the
schedule does not tell how often it runs. Contention for the HBM is not modelled, nor are the microseconds it takes to
start a program: it is a lower bound, good for comparing variants.
"""

import argparse
import dataclasses
import glob
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
  """A JAX device of a TPU generation: a chip, whose two cores (v4, v5p) share parallel grid dimensions; v7x: one core."""

  topology: str
  gigahertz: float
  gigabytes_per_second: float
  latency: int  # cycles from the start of a small copy out of the HBM to its end; no grid step is shorter


# Clock and bandwidth: Google's published figures of each chip (v7x: halved for one core).
CHIPS = {
  "v4": Chip("v4:2x2x1", 1.05, 1228.0, 400),
  "v5e": Chip("v5e:2x2", 1.503, 819.0, 600),
  "v5p": Chip("v5p:2x2x1", 1.751, 2765.0, 460),
  "v6e": Chip("v6e:2x2", 1.751, 1640.0, 360),
  "v7x": Chip("tpu7x:2x2x1", 2.2, 3690.0, 455),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One kernel of a compiled program.

  Attributes:
    name: its name in the program.
    cycles: VLIW cycles of a grid step.
    steps: grid steps of one core.
    schedule_us: microseconds of the schedule.
    hbm_us: microseconds its operands and results need at full bandwidth.
    units: share of the cycles in which each unit is busy, averaged over its slots.
  """

  name: str
  cycles: int
  steps: int
  schedule_us: float
  hbm_us: float
  units: dict[str, float]

  @property
  def us(self) -> float:
    """The estimate, microseconds."""
    return max(self.schedule_us, self.hbm_us)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A compiled program.

  Attributes:
    kernels: its Pallas kernels; none if only bytes were asked for.
    around_bytes: what XLA's own operations read and write.
    product_bytes: of `around_bytes`, what cannot be saved: operands and results of each matrix product, once.
    temporary_bytes: of the whole program.
  """

  kernels: tuple[Kernel, ...]
  around_bytes: int
  product_bytes: int
  temporary_bytes: int

  @property
  def us(self) -> float:
    """All kernels, one after the other, microseconds."""
    return sum(kernel.us for kernel in self.kernels)


class NotEstimated(Exception):
  """The program does not compile, or its schedule does not tell how long it takes."""


Job = tuple[str, dict[str, Any]]
"""module:function and its arguments."""


def estimate(
  chip: str, jobs: Sequence[Job], timeout: float = 3600, *, bytes_only: bool = False
) -> list[Estimate | NotEstimated]:
  """Estimates programs for one chip, in one fresh process (libtpu reads its flags once).

  With `bytes_only` nothing is said of kernels, and they may hold loops, as MaxText's attention does.
  """
  command = [sys.executable, os.path.abspath(__file__), "--worker", chip, *(["--bytes-only"] if bytes_only else [])]
  root = str(Path(__file__).parents[1])
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
  run = subprocess.run(
    command, input=json.dumps(jobs), capture_output=True, text=True, timeout=timeout, check=False, env=environment
  )
  lines = [json.loads(line[len(_MARK) :]) for line in run.stdout.splitlines() if line.startswith(_MARK)]
  if len(lines) != len(jobs):
    raise NotEstimated(f"the process for {chip} ended early: {run.stderr.strip()[-2000:]}")
  return [_decoded(line) for line in lines]


_MARK = "ESTIMATE "


def _decoded(line: dict[str, Any]) -> Estimate | NotEstimated:
  if "error" in line:
    return NotEstimated(line["error"])
  return Estimate(tuple(Kernel(**kernel) for kernel in line.pop("kernels")), **line)


def _work(chip: str, bytes_only: bool) -> None:
  """The fresh process: reads jobs from stdin, prints one line a job."""
  with tempfile.TemporaryDirectory(prefix="tpu_static") as folder:
    os.environ.update(
      JAX_PLATFORMS="cpu",
      TPU_SKIP_MDS_QUERY="1",  # asks no metadata server, there is none
      ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # another process may be compiling, too
      LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_msa_enable=false",
    )
    for target, arguments in json.load(sys.stdin):
      try:
        answer = dataclasses.asdict(_estimate(chip, target, arguments, None if bytes_only else Path(folder)))
      except Exception as e:  # compilers raise what they like; the caller decides
        answer = {"error": f"{target} {arguments} on {chip}: {e}"[:2000]}
      print(_MARK + json.dumps(answer), flush=True)
      for file in Path(folder).iterdir():
        file.unlink()


def _estimate(chip: str, target: str, arguments: dict[str, Any], folder: Path | None) -> Estimate:
  """Compiles in this process and reads what libtpu left in the folder, if there is one."""
  import jax

  module, name = target.split(":")
  cases = importlib.import_module(module)
  mesh = one_device(chip, getattr(cases, "MESH_AXES", ("device",)))
  sharding = jax.NamedSharding(mesh, jax.P())
  with jax.set_mesh(mesh):  # it tells the program for which device kind it is traced
    function, args = getattr(cases, name)(**arguments)
    lowered = jax.jit(function, in_shardings=sharding, out_shardings=sharding).trace(*args)
    looping = sorted(_looping(lowered.jaxpr.jaxpr)) if folder else []
    if looping:
      raise NotEstimated(f"there is a loop within {', '.join(looping)}")
    products = sum(_products(lowered.jaxpr.jaxpr))
    compiled = lowered.lower().compile()
  text = compiled.as_text()
  moved, around = _bytes_moved(text)
  kernels = tuple(_all_kernels(folder, CHIPS[chip], text, moved)) if folder else ()
  return Estimate(kernels, around, products, compiled.memory_analysis().temp_size_in_bytes)


def one_device(chip: str, axes: Sequence[str] = ("device",)) -> Any:
  """A mesh of one device of a chip that is not there, for compiling ahead of time."""
  import jax
  import numpy as np
  from jax.experimental import topologies

  devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices
  return jax.sharding.Mesh(np.array(devices[:1]).reshape([1] * len(axes)), axes)


def _looping(jaxpr: Any, kernel: str = "") -> set[str]:
  """Names of Pallas kernels that keep a loop."""
  found = set()
  for equation in jaxpr.eqns:
    kind, parameters = equation.primitive.name, equation.params
    if kernel and (kind == "while" or (kind == "scan" and parameters["unroll"] < parameters["length"])):
      found.add(kernel)
    inside = str(parameters.get("name") or "a kernel") if kind == "pallas_call" else kernel
    for inner in _inner(equation):
      found |= _looping(inner, inside)
  return found


def _products(jaxpr: Any) -> Iterator[int]:
  """Bytes of operands and result of each matrix product outside of kernels."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      arrays = [x.aval for x in (*equation.invars, *equation.outvars)]
      yield sum(array.size * array.dtype.itemsize for array in arrays)
    elif equation.primitive.name != "pallas_call":
      for inner in _inner(equation):
        yield from _products(inner)


def _inner(equation: Any) -> Iterator[Any]:
  """The jaxprs that an equation runs."""
  for value in equation.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(item, "jaxpr", item)
      if hasattr(inner, "eqns"):
        yield inner


_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
_NOT_MOVED = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "custom-call", "copy-done", "copy-start"}


def _bytes_moved(hlo: str) -> tuple[dict[str, int], int]:
  """Bytes that each kernel reads and writes, and those of XLA's own instructions at the top level."""
  bodies = set(re.findall(r"body=%?([\w.\-]+)", hlo))
  sizes: dict[str, int] = {}
  kernels: dict[str, int] = {}
  around, computation, entry = 0, "", False
  for line in hlo.splitlines():
    if header := _COMPUTATION.match(line):
      entry, computation = bool(header.group(1)), header.group(2)
    elif instruction := _INSTRUCTION.match(line):
      name, shape, kind, operands = instruction.groups()
      sizes[name] = _size(shape)
      moved = sizes[name] + sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))
      if "tpu_custom_call" in line:
        if computation in bodies:
          raise NotEstimated(f"{name} is within a loop")
        kernels[name] = moved
      elif entry and kind not in _NOT_MOVED:
        around += moved
  return kernels, around


def _twins(hlo: str) -> dict[str, list[str]]:
  """Each kernel -> the kernels with the same program on arrays of the same shapes, itself among them."""
  programs: dict[str, list[str]] = {}
  for line in hlo.splitlines():
    if "tpu_custom_call" in line and (instruction := _INSTRUCTION.match(line)):
      program = re.sub(r"metadata=\{.*?\}, backend_config", "backend_config", line.split("custom_call_target", 1)[1])
      programs.setdefault(instruction.group(2) + program, []).append(instruction.group(1))
  return {name: names for names in programs.values() for name in names}


def _size(shape: str) -> int:
  """Bytes of the arrays in an HLO shape."""
  total = 0
  for dtype, dims in _ARRAY.findall(shape):
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    count = 1
    for dim in filter(None, dims.split(",")):
      count *= int(dim)
    total += count * bits // 8
  return total


_FINAL = re.compile(r"\d+-(.*)-\d+-final_bundles\.txt")
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-fA-F]+|\d+)\s+[A-Z, ]*?\s*:\s*(>*)\s*\{")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")


def _all_kernels(folder: Path, chip: Chip, hlo: str, moved: dict[str, int]) -> Iterator[Kernel]:
  """Of kernels with one program libtpu compiles the first only; the others are the same."""
  scheduled = {kernel.name: kernel for kernel in _kernels(folder, chip, moved)}
  twins = _twins(hlo)
  for name in moved:
    found = [scheduled[twin] for twin in twins[name] if twin in scheduled]
    if not found:
      raise NotEstimated(f"libtpu wrote no schedule of {name}")
    yield scheduled.get(name) or dataclasses.replace(found[0], name=name)


def _kernels(folder: Path, chip: Chip, moved: dict[str, int]) -> Iterator[Kernel]:
  for path in sorted(folder.glob("*final_bundles.txt")):
    name = match.group(1) if (match := _FINAL.fullmatch(path.name)) else ""
    if name not in moved:
      continue
    text = path.read_text(errors="replace")
    depths = [len(bundle.group(1)) for bundle in map(_BUNDLE.match, text.splitlines()) if bundle]
    exits = [int(x) for x in _EXIT.findall(text)]
    if max(depths, default=0) > 1 or len(exits) > 1:
      raise NotEstimated(f"there is a loop within {name}")
    units, rows = _slots(next(folder.glob(f"*-{glob.escape(name)}-*pre-delay_hlo-static*")))
    steps = exits[0] - 2 if exits else 1
    cycles = len(rows) - (depths.count(0) if exits else 0)
    schedule = steps * max(cycles, chip.latency) / chip.gigahertz / 1e3
    busy = {unit: sum(row[i] for row in rows) / slots / cycles for i, (unit, slots) in enumerate(units.items())}
    yield Kernel(name, cycles, steps, schedule, moved[name] / chip.gigabytes_per_second / 1e3, busy)


def _slots(path: Path) -> tuple[dict[str, int], list[list[int]]]:
  """Slots of each unit, and the slots in use in each cycle."""
  _, names, capacities, _, *rows = path.read_text().splitlines()
  units = dict(zip(names.split(", "), map(int, capacities.split()), strict=True))
  return units, [[int(x) for x in row.split()] for row in rows if row.strip()]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("target", nargs="?", help="module:function")
  parser.add_argument("--chip", choices=CHIPS)
  parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of the function")
  parser.add_argument("--worker", choices=CHIPS, help=argparse.SUPPRESS)
  parser.add_argument("--bytes-only", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    _work(args.worker, args.bytes_only)
    return
  if not (args.target and args.chip):
    parser.error("a target and --chip are needed")
  (result,) = estimate(args.chip, [(args.target, dict(map(_setting, args.set)))])
  if isinstance(result, NotEstimated):
    sys.exit(str(result))
  show(result)


def _setting(text: str) -> tuple[str, Any]:
  name, value = text.split("=", 1)
  try:
    return name, json.loads(value)
  except json.JSONDecodeError:
    return name, value


def show(result: Estimate) -> None:
  """Prints an estimate."""
  for k in result.kernels:
    print(f"{k.name:20} {k.cycles:6} cycles x {k.steps:5} = {k.schedule_us:8.1f} us, HBM {k.hbm_us:8.1f} us")
    print("  busy: " + ", ".join(f"{unit} {share:.0%}" for unit, share in k.units.items()))
  print(f"{result.us:.1f} us; XLA moves {result.around_bytes / 2**20:.1f} MiB around the kernels")


if __name__ == "__main__":
  main()
