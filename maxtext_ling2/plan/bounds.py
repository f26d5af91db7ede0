"""How long a compiled train step takes at least, and with nothing hidden behind anything; by part of the model."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from maxtext_ling2.plan.chips import Chip
from maxtext_ling2.plan.fused_experts import experts_seconds, is_experts
from maxtext_ling2.plan.operations import Operation, is_gla
from maxtext_ling2.plan.parts import part_of_operation

RESOURCES = ("compute", "HBM", "ICI")


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the model in one step, on one device.

  Attributes:
    name: of the part.
    bytes_accessed: from and to the HBM.
    compute_seconds: of kernels their schedules, else the operations of matrix products at peak; recomputed ones too.
    memory_seconds: bytes_accessed at full bandwidth.
    ici_seconds: bytes sent, at the rate of a device at the edge of the slice.
    seconds: pessimistic: each instruction the longer of its compute and its bytes, then what it sends.
    floor_seconds: what the part must take at least, calculated from shapes (`plan.floor`); NaN: not calculated.
  """

  name: str
  bytes_accessed: float
  compute_seconds: float
  memory_seconds: float
  ici_seconds: float
  seconds: float
  floor_seconds: float = math.nan

  @property
  def bound(self) -> str:
    """What takes longest."""
    taken = (self.compute_seconds, self.memory_seconds, self.ici_seconds)
    return RESOURCES[taken.index(max(taken))]


@dataclasses.dataclass(frozen=True)
class Bounds:
  """Both bounds of a step's time.

  Attributes:
    compute_seconds: of all parts.
    memory_seconds: of all parts.
    ici_seconds: bytes sent at the rate of all links.
    pessimistic_seconds: all instructions one after the other, and then all collectives, the asynchronous ones too, at the
      rate of a device at the edge of the slice.
    parts: the longest first.
  """

  compute_seconds: float
  memory_seconds: float
  ici_seconds: float
  pessimistic_seconds: float
  parts: tuple[Part, ...]

  @property
  def optimistic_seconds(self) -> float:
    """Everything hidden behind what takes longest."""
    return max(self.compute_seconds, self.memory_seconds, self.ici_seconds)


def bounds(
  operations: Iterable[Operation], chip: Chip, edge_bandwidth: float, floors: Mapping[str, float] | None = None
) -> Bounds:
  """Adds up a program's operations.

  Args:
    operations: of the program.
    chip: the device.
    edge_bandwidth: bytes per second of all links of a device at the edge of the slice; 0: there is no other device.
    floors: seconds that parts must take, by name.
  """
  parts: dict[str, list[tuple[float, ...]]] = {}
  network_bytes = 0.0
  for one in operations:
    memory, compute, ici = one.memory / chip.memory_bandwidth, compute_seconds(one, chip), 0.0
    if one.network_bytes:
      ici = one.network_bytes / (edge_bandwidth or chip.ici_bandwidth)  # 0: both devices are on one chip
      network_bytes += one.run_count * one.network_bytes
    figures = (one.memory, compute, memory, ici, max(compute, memory) + ici)
    parts.setdefault(part_of_operation(one), []).append(tuple(one.run_count * figure for figure in figures))
  made = [_part(name, rows, floors) for name, rows in parts.items()]
  return Bounds(
    math.fsum(part.compute_seconds for part in made),
    math.fsum(part.memory_seconds for part in made),
    network_bytes / chip.ici_bandwidth,
    math.fsum(part.seconds for part in made),
    tuple(sorted(made, key=lambda part: -part.seconds)),
  )


def compute_seconds(one: Operation, chip: Chip) -> float:
  """Of one run: a kernel's schedule where it was counted, else its operations at peak."""
  if one.grouped is not None:
    return one.grouped.seconds(chip)[0]
  if is_gla(one):
    return chip.gla_time_ratio * one.memory / chip.memory_bandwidth
  if is_experts(one.kernel):
    return experts_seconds(one.flops, one.memory, chip)
  return one.flops / chip.flops


def _part(name: str, rows: Iterable[tuple[float, ...]], floors: Mapping[str, float] | None) -> Part:
  """The sum of all operations of a part, in the order of its fields."""
  accessed, compute, memory, ici, seconds = map(math.fsum, zip(*rows, strict=True))
  floor = math.nan if floors is None else floors.get(name, 0.0)
  return Part(name, accessed, compute, memory, ici, seconds, floor)
