"""From a compiled train step to memory, time, tokens a second and MFU of one topology and mesh."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping

from maxtext_ling2 import overrides
from maxtext_ling2.host.compile_step import OutOfMemoryError, compile_step, devices_of
from maxtext_ling2.plan import hlo
from maxtext_ling2.plan.chips import Chip, TopologyError, chip_of

# "Used 39.30G of 31.25G hbm" or, of the temporaries alone, "temporaries (58.99G) exceeds available HBM (31.24G)".
_USED = re.compile(r"(?:[Uu]sed|temporaries) \(?([\d.]+)([KMG])\S* (?:of|exceeds available HBM) \(?([\d.]+)([KMG])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Option:
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
    bytes_moved: from and to the HBM.
    collectives: opcode -> (runs, bytes sent).
    kernels: name of a Pallas kernel -> (runs, bytes from and to the HBM), part of bytes_moved.
    compute_seconds: tflops at peak.
    memory_seconds: bytes_moved at full bandwidth; for GLA's kernels, the time of their schedules if that is longer.
    link_seconds: bytes sent at full bandwidth of all links.
    tokens: tokens of a step, of all devices together.
    compile_seconds: what compiling took here.
    problem: why it does not fit.
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
  bytes_moved: float | None = None
  collectives: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  kernels: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  compute_seconds: float = math.nan
  memory_seconds: float = math.nan
  link_seconds: float = math.nan
  tokens: int = 0
  compile_seconds: float = 0.0
  problem: str = ""

  @property
  def lower_seconds(self) -> float:
    """No step is faster: the slowest of computing, memory and links, the others hidden behind it."""
    return max(self.compute_seconds, self.memory_seconds, self.link_seconds)

  @property
  def upper_seconds(self) -> float:
    """Nothing hidden behind anything: one after the other."""
    return self.compute_seconds + self.memory_seconds + self.link_seconds

  @property
  def tokens_per_second(self) -> tuple[float, float]:
    """(without overlap, at most), of all devices together."""
    return self.tokens / self.upper_seconds, self.tokens / self.lower_seconds

  @property
  def mfu(self) -> tuple[float, float]:
    """(without overlap, at most): the share of the peak that the model's operations get."""
    return self.compute_seconds / self.upper_seconds, self.compute_seconds / self.lower_seconds

  @property
  def device_seconds_per_token(self) -> float:
    """What options are compared by, without overlap."""
    return self.devices * self.upper_seconds / self.tokens


def make_option(yml: str, topology: str, mesh: str, settings: Mapping[str, str]) -> Option:
  """Compiles and measures one option.

  Args:
    yml: base yml.
    topology: as MaxText's compile_topology.
    mesh: text for the report.
    settings: MaxText's, the mesh's among them, as text for its command line.

  Raises:
    PlanConfigError: MaxText refuses the settings.
    TopologyError: the topology is not known.
  """
  chip, devices = chip_of(topology), devices_of(topology)
  if devices is None:
    raise TopologyError(f"--topology {topology}: MaxText has no topology of this name and size; see its compile_topology")
  slices = settings.get("compile_topology_num_slices", "1")
  if not slices.isdecimal() or int(slices) < 1:
    raise TopologyError(f"compile_topology_num_slices={slices}: not a number of slices; pass at least 1")
  devices *= int(slices)
  start = time.perf_counter()
  try:
    step = compile_step(yml, overrides.join({**settings, "compile_topology": topology}))
  except OutOfMemoryError as error:
    used, capacity = _out_of_memory(str(error), chip)
    first = next((line for line in str(error).splitlines() if _USED.search(line)), str(error).splitlines()[0])
    seconds = time.perf_counter() - start
    return Option(topology, mesh, devices, False, used, capacity, compile_seconds=seconds, problem=first.strip())
  seconds = time.perf_counter() - start
  memory = step.compiled.memory_analysis()
  moved = hlo.traffic(step.compiled.as_text())
  sent = sum(size for _, size in moved.collectives.values())
  gla = sum(size for name, (_, size) in moved.kernels.items() if name.startswith("gla_"))
  arguments = memory.argument_size_in_bytes
  temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes  # results that do not take the place of an argument
  return Option(
    topology,
    mesh,
    devices,
    True,
    arguments + temporaries + new,
    chip.memory,
    arguments,
    temporaries,
    step.tflops,
    moved.memory,
    moved.collectives,
    moved.kernels,
    step.tflops * 1e12 / chip.flops,
    (moved.memory + (chip.gla_stretch - 1) * gla) / chip.memory_bandwidth,
    sent / chip.link_bandwidth,
    int(step.config.global_batch_size_to_train_on * step.config.max_target_length),
    seconds,
  )


def _out_of_memory(text: str, chip: Chip) -> tuple[float, float]:
  """(bytes needed, bytes there), as far as the compiler's text tells."""
  found = _USED.search(text)
  if not found:
    return math.nan, chip.memory
  return float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
