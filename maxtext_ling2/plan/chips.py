"""TPU generations as MaxText's topologies name them: one JAX device each (a chip; tpu7x: one of a chip's two cores).

Source: Google's published system architecture pages of each generation (peak bfloat16 FLOP/s, HBM, HBM bandwidth, clock,
and inter-chip interconnect bandwidth per chip; tpu7x halved). They name 2400, 1600, 4800 and 3200 Gbit/s for v4, v5e, v5p
and v6e, one direction of all of a chip's links: 50 or 100 GB/s per link, of which jax-ml.github.io/scaling-book gives 45
and 90 as reached. For tpu7x they name both directions, 1200 GB/s per chip.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.ops.devices import kind_of


class TopologyError(Ling2Error, ValueError):
  """The name of a topology is not one of MaxText's TPU topologies."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    name: the generation.
    flops: bfloat16 operations a second at peak.
    memory: bytes of HBM.
    memory_bandwidth: bytes a second.
    ici_bandwidth: bytes per second over all ICI links, one direction; where devices share a chip's links, their share.
    links: of a chip; two per dimension of the torus.
    clock: cycles a second.
    cores: that share a kernel's parallel grid dimensions.
    gla_time_ratio: time of GLA's kernels over that of their bytes, from counted cycles (docs/kernels.md; the larger of
      the ratios of packed and plain rows).
    experts_time_ratio: time of the experts' kernels over the longer of their operations at peak and their bytes, from
      counted cycles (docs/kernels.md; the largest of 128, 512 and 1024 rows per expert and of both passes). Assumed
      where none was counted.
  """

  name: str
  flops: float
  memory: float
  memory_bandwidth: float
  ici_bandwidth: float
  links: int
  clock: float
  cores: int = 1
  gla_time_ratio: float = 1.0
  experts_time_ratio: float = 1.35

  def edge_bandwidth(self, grid: Sequence[int], wrap: Sequence[bool]) -> float:
    """Link bandwidth of a device at a corner of a slice: what a collective over the whole slice ends at.

    Args:
      grid: chips of the slice along each dimension.
      wrap: whether the slice is closed to a ring along it.
    """
    return self.ici_bandwidth * edge_links(grid, wrap) / self.links


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 275e12, 32 * 2**30, 1228e9, 300e9, 6, 1.05e9, cores=2),
    Chip("v5e", 197e12, 16 * 2**30, 819e9, 200e9, 4, 1.503e9),
    Chip("v5p", 459e12, 95 * 2**30, 2765e9, 600e9, 6, 1.751e9, cores=2, experts_time_ratio=1.32),
    Chip("v6e", 918e12, 32 * 2**30, 1640e9, 400e9, 4, 1.751e9, experts_time_ratio=1.31),
    Chip("tpu7x", 1153.5e12, 96 * 2**30, 3690e9, 300e9, 6, 2.2e9, gla_time_ratio=1.34),
  )
}


def chip_of(topology: str) -> Chip:
  """The devices of a topology such as v6e-64.

  Raises:
    TopologyError: it is none of the generations above.
  """
  try:
    return CHIPS[topology.partition("-")[0]]
  except KeyError:
    raise TopologyError(
      f"--topology {topology}: not a TPU generation known here; use MaxText's names, GENERATION-SIZE with one of "
      f"{', '.join(CHIPS)}, such as v6e-64"
    ) from None


# `device_kind` -> generation.
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def peak_flops(device: Any) -> float | None:
  """A JAX device's bfloat16 operations per second at peak; None where it is no TPU generation above."""
  name = _KINDS.get(kind_of(device))
  return CHIPS[name].flops if name else None


def edge_links(grid: Sequence[int], wrap: Sequence[bool]) -> int:
  """Links of a chip at a corner of a slice: one per dimension, two where it is closed to a ring, none where it is 1.

  Args:
    grid: chips along each dimension.
    wrap: whether the slice is closed to a ring along each; may be longer than the grid.
  """
  return sum((2 if closed else 1) for size, closed in zip(grid, wrap, strict=False) if size > 1)


@dataclasses.dataclass(frozen=True)
class Slice:
  """What MaxText's table of topologies says of one.

  Attributes:
    chip: its devices.
    devices: how many.
    grid: chips along each dimension.
    wrap: whether it is closed to a ring along each.
  """

  chip: Chip
  devices: int
  grid: tuple[int, ...]
  wrap: tuple[bool, ...]

  @property
  def edge_bandwidth(self) -> float:
    """As `Chip.edge_bandwidth`."""
    return self.chip.edge_bandwidth(self.grid, self.wrap)


def slice_of(topology: str, figures: Mapping[str, Any] | None = None) -> Slice:
  """A slice of MaxText's compile_topology.

  Args:
    topology: its name.
    figures: of the user's own chip, which replace those of the generation.

  Raises:
    TopologyError: MaxText has no such topology.
  """
  from maxtext.utils import accelerator_to_spec_map

  chip = dataclasses.replace(chip_of(topology), **(figures or {}))
  found = accelerator_to_spec_map.UserFacingNameToSystemCharacteristics.get(topology)
  if found is None or found.topology_name is None:
    raise TopologyError(f"--topology {topology}: MaxText has no topology of this name and size; see its compile_topology")
  sizes = found.topology_name.partition(":")[2].split("x")
  return Slice(chip, int(found.devices_per_slice), tuple(map(int, sizes)), tuple(found.wrap[: len(sizes)]))


def slices_of(settings: Mapping[str, str]) -> int:
  """How many slices a step is compiled for, from settings of MaxText as text.

  Raises:
    TopologyError: it is no number of slices.
  """
  slices = settings.get("compile_topology_num_slices", "1")
  if not slices.isdecimal() or int(slices) < 1:
    raise TopologyError(f"compile_topology_num_slices={slices}: not a number of slices; pass at least 1")
  return int(slices)
