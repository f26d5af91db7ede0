"""Rows per grid step of the experts' kernels, by TPU generation, and whether a chip takes them.

Chosen by counting cycles (`benchmarks/experts_tpu_static.py`). The kernels have a program for each of a few numbers of
rows (`tiers`) and run the next one, so that an expert with few rows does not pay for a whole block. On most chips 256
rows are nearly as good as 512, and compile in half the time. v6e is different: its MXU takes longer to load, and its
forward kernel waits for HBM, as a small block is done before the next expert's matrices, fetched meanwhile, are there.

A contraction over rows costs as if they were the next multiple of the MXU's side (256 on v6e), and a block of few rows as
much as one of 128; so on v6e an expert's last block takes up to 128 rows more than the others.
"""

import dataclasses
from typing import Final, NamedTuple

from maxtext_ling2.ops.devices import device_kind
from maxtext_ling2.ops.pallas_utils import LANES

_MIB: Final = 2**20


@dataclasses.dataclass(frozen=True)
class Block:
  """The work of one grid step.

  Attributes:
    rows: at most; a multiple of 16.
    stride: rows of each block of an expert but its last one.
    tiers: numbers of rows that the kernel has a program for, increasing; the last one is `rows`.
    vmem_limit: bytes that the kernel may use.
    experts: "any"; to count cycles, only the program of an expert's "one block", of one of "several" that is not the
      last one, or of the "last" one.
  """

  rows: int
  stride: int
  tiers: tuple[int, ...]
  vmem_limit: int
  experts: str = "any"


class BlockSizes(NamedTuple):
  """Blocks of both kernels, and cores that share their grid."""

  forward: Block
  backward: Block
  cores: int


class Chip(NamedTuple):
  """What the choice depends on."""

  cores: int  # of one JAX device
  vmem: int  # bytes of a core's VMEM
  forward: tuple[int, ...]  # tiers; the last one is taken as the rows of a block, if they fit
  backward: tuple[int, ...]
  strides: tuple[int, int]  # of forward and backward


_BY_64: Final = (64, 128, 192, 256)

_CHIPS: Final = {
  "TPU v4": Chip(2, 16 * _MIB, _BY_64, _BY_64, (256, 256)),
  "TPU v5 lite": Chip(1, 128 * _MIB, _BY_64, _BY_64, (256, 256)),
  "TPU v5": Chip(2, 64 * _MIB, _BY_64, (64, 128, 160, 192, 256), (256, 256)),
  "TPU v6 lite": Chip(
    1, 128 * _MIB, (128, 256, 384, 512, 640, 768, 1024, 1152), (128, 256, 384, 512, 576, 640), (1024, 512)
  ),
  "TPU7x": Chip(1, 64 * _MIB, (128, 192, 256), (128, 192, 256), (256, 256)),
}
"""By `device_kind`, the name JAX gives a generation. VMEM: Google's published figures."""

_OTHER: Final = Chip(1, 16 * _MIB, _BY_64, _BY_64, (256, 256))

_LEAST: Final = 128
"""Rows of a block at least: with fewer, loading matrices into the MXU takes longer than the products."""
_USABLE: Final = 0.9
"""Part of VMEM that a kernel may use; the compiler needs some."""


def why_not_kernel(width: int, hidden: int, itemsize: int, kind: str | None = None) -> str | None:
  """Why the kernels do not take experts of this shape, in one line; None if they do.

  Args:
    width: C.
    hidden: F.
    itemsize: bytes of an element.
    kind: the kind of device; None: `device_kind()`.
  """
  if width % LANES or hidden % LANES:
    return f"C={width} and F={hidden} are not both multiples of {LANES}"
  kind = kind or device_kind()
  need, room = vmem(_LEAST, width, hidden, itemsize, gradients=True), _room(_CHIPS.get(kind, _OTHER))
  if need > room:
    return (
      f"experts of {width} x {hidden} need {need / _MIB:.0f} MiB of VMEM, and a kernel on {kind} has {room / _MIB:.0f}"
    )
  return None


def block_sizes_for(width: int, hidden: int, itemsize: int, choices: int, kind: str | None = None) -> BlockSizes:
  """Block sizes for a shape that `why_not_kernel` has nothing against.

  Args:
    width: C.
    hidden: F.
    itemsize: bytes of an element.
    choices: N * k; a tier that is beyond all of them has no use.
    kind: the kind of device; None: `device_kind()`.
  """
  chip = _CHIPS.get(kind or device_kind(), _OTHER)

  def block(tiers: tuple[int, ...], stride: int, gradients: bool) -> Block:
    fitting = [rows for rows in tiers if vmem(rows, width, hidden, itemsize, gradients) <= _room(chip)]
    useful = [rows for i, rows in enumerate(fitting) if i == 0 or fitting[i - 1] < choices]
    return Block(useful[-1], min(stride, useful[-1]), tuple(useful), _room(chip))

  forward, backward = chip.strides
  return BlockSizes(
    block(chip.forward, forward, gradients=False), block(chip.backward, backward, gradients=True), chip.cores
  )


def _room(chip: Chip) -> int:
  return int(_USABLE * chip.vmem)


def vmem(rows: int, width: int, hidden: int, itemsize: int, gradients: bool) -> int:
  """Bytes of VMEM of a kernel with blocks of `rows` rows.

  Matrices, rows and results are there twice, the next ones being fetched; float32 sums of the matrices' gradients once.
  What a block computes is float32: [rows, C] once and [rows, F] four times.
  """
  matrices, block = 3 * width * hidden, rows * width
  copies = 2 * itemsize * (matrices * (2 if gradients else 1) + block * (3 if gradients else 2))
  return copies + 4 * (matrices if gradients else 0) + 4 * (block + 4 * rows * hidden)
