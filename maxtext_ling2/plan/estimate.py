"""From a compiled train step to memory, time, tokens a second and MFU of one topology and mesh."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from maxtext_ling2.host.compile_step import CompiledStep, CompilerError, OutOfMemoryError, compile_step
from maxtext_ling2.maxtext_api import overrides
from maxtext_ling2.plan.bounds import Bounds, Part, bounds
from maxtext_ling2.plan.chips import Chip, Slice, slice_of, slices_of
from maxtext_ling2.plan.floor import Shares, floors, routed_rows
from maxtext_ling2.plan.operations import Program, read_program

# "Used 39.30G of 31.25G hbm" or, of the temporaries alone, "temporaries (58.99G) exceeds available HBM (31.24G)".
_USED = re.compile(r"(?:[Uu]sed|temporaries) \(?([\d.]+)([KMG])\S* (?:of|exceeds available HBM) \(?([\d.]+)([KMG])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """One topology and mesh, and what a train step takes there.

  All figures are of one device (tpu7x: one of a chip's two cores) and one step. None where the step does not fit.

  Attributes:
    topology: as MaxText's compile_topology.
    mesh: MaxText's settings that differ from one big FSDP axis, as text.
    devices: how many.
    fits: whether the compiler found a place for everything.
    memory: bytes of HBM at the peak; what is needed, where it does not fit.
    arguments: bytes of parameters, optimizer state and batch, of this.
    temporaries: bytes of activations, gradients and code.
    capacity: bytes the compiler could use, or the chip's.
    tflops: 10^12 operations of the model, as MaxText counts them (rematerialisation does not count).
    bytes_accessed: from and to the HBM.
    collective_bytes: part of bytes_accessed: what collectives read and write, where they are not fused with others.
    reread_bytes: part of bytes_accessed: what grouped products move because of their tiles.
    collectives: opcode -> (runs, bytes sent).
    synchronous: those of them beside which nothing else runs.
    kernels: name of a Pallas kernel -> (runs, bytes from and to the HBM), part of bytes_accessed.
    model_seconds: tflops at peak.
    compute_seconds: of kernels their schedules, else operations of matrix products at peak, recomputed ones too.
    memory_seconds: bytes_accessed at full bandwidth.
    ici_seconds: bytes sent, one direction, at the rate of all links.
    pessimistic_seconds: no overlap, and the links of a device at the edge of the slice (`plan.bounds`).
    edge_share: the links of such a device, of all that a chip has.
    parts: of the model, the longest first.
    assumed: which branches of conditionals count, and how many grouped products' cycles are not counted.
    tokens: tokens of a step, of all devices together.
    compile_seconds: what compiling took here.
    problem: why it does not fit, or cannot be compiled; the memory is NaN then.
  """

  topology: str
  mesh: str
  devices: int
  fits: bool
  memory: float
  capacity: float
  arguments: float | None = None
  temporaries: float | None = None
  tflops: float | None = None
  bytes_accessed: float | None = None
  collective_bytes: float | None = None
  reread_bytes: float | None = None
  collectives: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  synchronous: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  kernels: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  model_seconds: float = math.nan
  compute_seconds: float = math.nan
  memory_seconds: float = math.nan
  ici_seconds: float = math.nan
  pessimistic_seconds: float = math.nan
  edge_share: float = math.nan
  parts: tuple[Part, ...] = ()
  assumed: tuple[str, ...] = ()
  tokens: int = 0
  compile_seconds: float = 0.0
  problem: str = ""

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> "Estimate":
    """What `dataclasses.asdict` made of one, after JSON."""
    parts = tuple(Part(**part) for part in fields["parts"])
    return cls(**{**fields, "parts": parts, "assumed": tuple(fields["assumed"])})

  @property
  def lower_seconds(self) -> float:
    """Lower bound: max(compute, HBM, ICI), perfect overlap."""
    return max(self.compute_seconds, self.memory_seconds, self.ici_seconds)

  @property
  def upper_seconds(self) -> float:
    """Upper estimate: the sum over all instructions, no overlap."""
    return self.pessimistic_seconds

  @property
  def tokens_per_second(self) -> tuple[float, float]:
    """(pessimistic, optimistic), of all devices together."""
    return self.tokens / self.upper_seconds, self.tokens / self.lower_seconds

  @property
  def mfu(self) -> tuple[float, float]:
    """(pessimistic, optimistic): the share of the peak that the model's operations get."""
    return self.model_seconds / self.upper_seconds, self.model_seconds / self.lower_seconds

  @property
  def device_seconds_per_token(self) -> float:
    """What options are compared by, the pessimistic."""
    return self.devices * self.upper_seconds / self.tokens


def estimate(
  yml: str, topology: str, mesh: str, settings: Mapping[str, str], figures: Mapping[str, Any] | None = None
) -> Estimate:
  """Compiles and measures one option.

  Args:
    yml: base yml.
    topology: as MaxText's compile_topology.
    mesh: text for the report.
    settings: MaxText's, the mesh's among them, as text for its command line.
    figures: as for `slice_of`; the program is that of the topology all the same.

  Raises:
    ConfigError: MaxText refuses the settings.
    TopologyError: the topology is not known.
  """
  place = slice_of(topology, figures)
  chip, devices = place.chip, place.devices * slices_of(settings)
  start = time.perf_counter()
  try:
    step = compile_step(yml, overrides.join({**settings, "compile_topology": topology}))
  except OutOfMemoryError as error:
    used, capacity = _out_of_memory(str(error), chip)
    first = next((line for line in str(error).splitlines() if _USED.search(line)), str(error).splitlines()[0])
    seconds = time.perf_counter() - start
    return Estimate(topology, mesh, devices, False, used, capacity, compile_seconds=seconds, problem=first.strip())
  except CompilerError as error:
    problem = f"this program cannot be compiled: {' '.join(str(error).split())[:500]}"
    return dataclasses.replace(refused(topology, mesh, settings, problem), compile_seconds=time.perf_counter() - start)
  empty = Estimate(topology, mesh, devices, True, math.nan, chip.memory, compile_seconds=time.perf_counter() - start)
  made = _measured(empty, step, place)
  if figures and made.memory > chip.memory:  # the compiler has the topology's own chip in mind
    return dataclasses.replace(made, fits=False, problem=f"Used {made.memory / 2**30:.2f}G of the chip's own memory")
  return made


def refused(topology: str, mesh: str, settings: Mapping[str, str], problem: str) -> Estimate:
  """One that has no program; `problem` says why."""
  place = slice_of(topology)
  devices = place.devices * slices_of(settings)
  return Estimate(topology, mesh, devices, False, math.nan, place.chip.memory, problem=problem)


def _measured(option: Estimate, step: CompiledStep, place: Slice) -> Estimate:
  """The option with all figures of its compiled step."""
  config, chip, edge = step.config, place.chip, place.edge_bandwidth
  shares = Shares.of(config, option.devices, option.devices // place.devices)
  program = read_program(step.compiled.as_text(), routed_rows(config, shares))
  least = {name: one.seconds(chip) for name, one in floors(config, shares).items()}
  times = bounds(program.operations, chip, edge, least)
  memory = step.compiled.memory_analysis()
  temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes  # results that do not take the place of an argument
  return dataclasses.replace(
    option,
    memory=memory.argument_size_in_bytes + temporaries + new,
    arguments=memory.argument_size_in_bytes,
    temporaries=temporaries,
    tflops=step.tflops,
    tokens=int(config.global_batch_size_to_train_on * config.max_target_length),
    model_seconds=step.tflops * 1e12 / chip.flops,
    edge_share=edge / chip.ici_bandwidth,
    **_counted(program, times, chip),
  )


def _counted(program: Program, times: Bounds, chip: Chip) -> dict[str, Any]:
  """The fields of an option that come from its program."""
  grouped = [one.grouped for one in program.operations if one.grouped is not None]
  counted = sum(one.seconds(chip)[1] for one in grouped)
  cycles = f"grouped products: cycles counted for {counted} of {len(grouped)}, else operations of visited tiles at peak"
  unknown = f"{program.unknown_loops} loops of unknown length: their bodies are counted once"
  return {
    "bytes_accessed": program.memory,
    "collective_bytes": program.collective_memory,
    "reread_bytes": program.reread,
    "collectives": program.collectives,
    "synchronous": program.synchronous_collectives,
    "kernels": program.kernels,
    "compute_seconds": times.compute_seconds,
    "memory_seconds": times.memory_seconds,
    "ici_seconds": times.ici_seconds,
    "pessimistic_seconds": times.pessimistic_seconds,
    "parts": times.parts,
    "assumed": (*program.assumed, *([cycles] if grouped else []), *([unknown] if program.unknown_loops else [])),
  }


def _out_of_memory(text: str, chip: Chip) -> tuple[float, float]:
  """(bytes needed, bytes there), as far as the compiler's text tells."""
  found = _USED.search(text)
  if not found:
    return math.nan, chip.memory
  return float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
