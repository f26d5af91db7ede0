"""What collectives send to other devices, and read from and write to the HBM for it."""

import dataclasses
import math
import re
from collections.abc import Iterator

from maxtext_ling2.plan.hlo import Instruction, Module, Table, arrays, called, size

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\] \{([^}]*)\})")
_MESH_AXIS = re.compile(r"'([\w]+)'=(\d+)")
_GROUP_AXIS = re.compile(r"'([\w]+)'(?::\(\d+\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One run of a collective, on one device.

  Attributes:
    kind: its opcode; "reduce-scatter" also for an all-reduce that is fused with the slice of what is kept.
    network_bytes: bytes that the device sends, by the ring algorithms.
    memory: bytes read from and written to the HBM, each once; what a ring keeps there between its steps is not known.
      0 for one within a fusion, whose own operands and result are counted.
    synchronous: whether nothing else runs meanwhile.
  """

  kind: str
  network_bytes: float
  memory: float
  synchronous: bool


def is_collective(one: Instruction) -> bool:
  """Whether an instruction by itself is one, or starts one."""
  return one.kind in _KINDS


def collectives_of(
  module: Module, one: Instruction, table: Table, beside: bool, routed_rows: float | None
) -> Iterator[Collective]:
  """The collective that an instruction is, or those that it fuses.

  Args:
    module: the program.
    one: the instruction.
    table: the instructions of its computation.
    beside: whether that computation runs beside others.
    routed_rows: rows that a device gives to its experts, all k of each token, where that is known: what a ragged
      all-to-all sends. Its operand is as large as the worst case needs.
  """
  if is_collective(one):
    network_bytes = _network_bytes(module, one, one.kind, table, routed_rows)
    yield Collective(
      one.kind, network_bytes, _memory(one, table, routed_rows), not (beside or one.opcode.endswith("-start"))
    )
  elif one.opcode == "fusion":
    # The TPU compiler's name for a reduce-scatter: of the fusion, or of what it calls.
    scatters = any("all-reduce-scatter" in name for name in (one.name, *called(one)))
    for inner, inner_table in module.fused(one):
      if is_collective(inner):
        kind = "reduce-scatter" if scatters else inner.kind
        yield Collective(
          kind, _network_bytes(module, inner, kind, inner_table, routed_rows), 0.0, not (beside or "async" in one.name)
        )


def _network_bytes(module: Module, one: Instruction, kind: str, table: Table, routed_rows: float | None) -> float:
  """Bytes that a device sends, by the ring algorithms."""
  group = _group(module, one.rest)
  share = (group - 1) / group
  if kind == "ragged-all-to-all":
    return _ragged_rows(one, table, routed_rows) * share
  given = sum(size(table[name].shape) for name in one.operands if name in table) or size(one.shape)
  if kind == "all-gather":
    return given * (group - 1)
  if kind == "all-reduce":
    return 2 * given * share
  return float(given) if kind == "collective-permute" else given * share


def _memory(one: Instruction, table: Table, routed_rows: float | None) -> float:
  """Bytes of operands and results that lie in the HBM."""
  if one.kind == "ragged-all-to-all":  # reads the rows that it sends, and writes as many
    return 2 * _ragged_rows(one, table, routed_rows)
  read = sum(table[name].bytes_in_hbm for name in one.operands if name in table)
  written = one.bytes_in_hbm
  if one.opcode.endswith("-start") and one.kind != "all-reduce":  # its type names the operands, too
    written = max(written - read, 0)
  return float(read + written)


def _ragged_rows(one: Instruction, table: Table, routed_rows: float | None) -> float:
  """Bytes of the rows that are given to a ragged all-to-all: those of its operand, unless fewer are routed."""
  shape = table[one.operands[0]].shape if one.operands and one.operands[0] in table else one.shape
  rows = arrays(shape)[0][1][0]
  return size(shape) * (1.0 if routed_rows is None else min(routed_rows / rows, 1.0))


def _group(module: Module, rest: str) -> int:
  """Devices that take part in a collective together; all of the program where none are named."""
  found = _GROUPS.search(rest)
  if not found:
    return module.devices
  if found[4]:
    sizes = dict(_MESH_AXIS.findall(found[4]))
    return math.prod(int(part or sizes[axis]) for axis, part in _GROUP_AXIS.findall(found[5]))
  return int(found[2]) if found[2] else max(len(found[3].split(",")), 1)
