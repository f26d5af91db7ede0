"""TPU generations as MaxText's topologies name them: one JAX device each (a chip; tpu7x: one of a chip's two cores).

Source: Google's published system architecture pages of each generation (peak bfloat16 FLOP/s, HBM, HBM bandwidth, and
inter-chip interconnect bandwidth, which counts both directions of all links); tpu7x halved.
"""

import dataclasses

from maxtext_ling2.errors import Ling2Error


class TopologyError(Ling2Error, ValueError):
  """The name of a topology is not one of MaxText's TPU topologies."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    flops: bfloat16 operations a second at peak.
    memory: bytes of HBM.
    memory_bandwidth: bytes a second.
    link_bandwidth: bytes a second over all links, both directions.
    gla_stretch: time of GLA's kernels over that of their bytes, from counted cycles (docs/kernels.md; packed, the worse).
  """

  flops: float
  memory: float
  memory_bandwidth: float
  link_bandwidth: float
  gla_stretch: float = 1.0


CHIPS = {
  "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
  "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
  "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
  "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
  "tpu7x": Chip(1153.5e12, 96 * 2**30, 3690e9, 600e9, 1.34),
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
