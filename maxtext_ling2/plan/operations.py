"""What one run of a compiled program does on a device, instruction by instruction: bytes, operations, what is sent.

Bodies of loops count as often as they run, as far as the compiler knows it; XLA's own cost analysis counts them once. Of
a `conditional` one branch counts, and is named.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

from maxtext_ling2.plan.collectives import Collective, collectives_of, is_collective
from maxtext_ling2.plan.flops import flops, splash_flops
from maxtext_ling2.plan.fused_experts import experts_flops
from maxtext_ling2.plan.grouped import GroupedProduct, grouped_product
from maxtext_ling2.plan.hlo import Instruction, Module, Table, arrays, bits, branches, called, size

# Opcodes that move nothing by themselves.
_FREE = {
  *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all"),
  *("partition-id", "replica-id", "opt-barrier", "iota", "add-dependency", "domain"),
}
# Run a computation beside the others: the last two are how gathers and collectives are given to the sparse cores.
_ASYNC = ("async-start", "call-start", "custom-call-start")
_SLICING = {"dynamic-slice", "slice", "gather"}
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call".*?op_name="[^"]*?([\w]+)\)*/pallas_call', re.DOTALL)
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_FALLBACKS = ("layers/moe.py:", "model/fused_experts.py:")  # which write the conditionals of moe_dropless_fallback=layer


@dataclasses.dataclass(frozen=True)
class Operation:
  """An instruction that runs by itself; all figures but `run_count` are of one run.

  Attributes:
    name: in the program.
    sources: "file:function" it comes from, the innermost first; empty: the compiler added it.
    run_count: how often it runs.
    memory: bytes read from and written to the HBM.
    flops: operations of its matrix products in all passes (`plan.flops`); of a Pallas kernel what the kernel states.
    kernel: of a Pallas kernel its name.
    grouped: the grouped product that it is.
    reread: bytes of `memory` that a grouped product moves because of its tiles, beyond operands and results once;
      below 0 where its operands are larger than the rows that are routed.
    collectives: what it sends.
  """

  name: str
  sources: tuple[str, ...]
  run_count: int
  memory: float
  flops: float = 0.0
  kernel: str = ""
  grouped: GroupedProduct | None = None
  reread: float = 0.0
  collectives: tuple[Collective, ...] = ()

  @property
  def network_bytes(self) -> float:
    """Bytes to other devices."""
    return sum(one.network_bytes for one in self.collectives)


@dataclasses.dataclass(frozen=True)
class Program:
  """What one run of a program does on one device.

  Attributes:
    operations: all that run by themselves.
    assumed: which branch of each conditional was counted.
    unknown_loops: loops whose trip count the compiler does not know; their bodies count once.
  """

  operations: Sequence[Operation]
  assumed: tuple[str, ...]
  unknown_loops: int

  @property
  def memory(self) -> float:
    """Bytes read from and written to the HBM."""
    return sum(one.run_count * one.memory for one in self.operations)

  @property
  def collective_memory(self) -> float:
    """Part of `memory`: operands and results of collectives, where they are not within a fusion."""
    return sum(one.run_count * part.memory for one in self.operations for part in one.collectives)

  @property
  def reread(self) -> float:
    """Part of `memory`: what the tiles of grouped products add."""
    return sum(one.run_count * one.reread for one in self.operations)

  @property
  def collectives(self) -> dict[str, tuple[int, float]]:
    """Kind: (how often it runs, bytes that the device sends)."""
    return self._by_kind(False)

  @property
  def synchronous_collectives(self) -> dict[str, tuple[int, float]]:
    """Those of `collectives` beside which nothing else runs."""
    return self._by_kind(True)

  @property
  def kernels(self) -> dict[str, tuple[int, float]]:
    """Name of a Pallas kernel: (how often it runs, bytes of `memory` that are its own)."""
    found: dict[str, tuple[int, float]] = {}
    for one in self.operations:
      if one.kernel:
        runs, accessed = found.get(one.kernel, (0, 0.0))
        found[one.kernel] = (runs + one.run_count, accessed + one.run_count * one.memory)
    return found

  def _by_kind(self, synchronous_only: bool) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}
    for one in self.operations:
      for part in one.collectives:
        if part.synchronous or not synchronous_only:
          runs, sent = found.get(part.kind, (0, 0.0))
          found[part.kind] = (runs + one.run_count, sent + one.run_count * part.network_bytes)
    return dict(sorted(found.items()))


def is_gla(one: Operation) -> bool:
  """Whether it is a kernel of linear attention, whose cycles are counted (docs/kernels.md)."""
  return one.kernel.startswith("gla_")


def read_program(text: str, routed_rows: float | None = None) -> Program:
  """Counts a compiled program.

  Args:
    text: `compiled.as_text()`.
    routed_rows: rows that a device gives to its experts, all k of each token, and is given by others for its own; None:
      as many as its buffers hold. A calculated value: random routing.
  """
  return _Walk(Module(text), routed_rows).program()


class _Walk:
  """Goes through a program from its entry, with the number of times each computation runs."""

  def __init__(self, module: Module, routed_rows: float | None):
    self.module, self.routed_rows = module, routed_rows
    self.taken: dict[str, tuple[str, str]] = {}  # conditional: (the computation that counts, what is assumed)

  def program(self) -> Program:
    operations = list(self._operations(self.module.entry))
    runs = [one for name, _, _ in self._runs(self.module.entry, 1, False) for one in self.module.computations[name]]
    unknown = sum(self.module.trip_count(one) is None for one in runs if one.opcode == "while")
    assumed = dict.fromkeys(self.taken[one.name][1] for one in runs if one.opcode == "conditional")
    silent = {one.kernel for one in operations if one.kernel and not (one.flops or one.grouped or is_gla(one))}
    if silent:
      assumed[f"kernels of which nothing but the bytes is known: {', '.join(sorted(silent))}"] = None
    return Program(operations, tuple(assumed), unknown)

  def _operations(self, entry: str) -> Iterator[Operation]:
    for name, run_count, beside in self._runs(entry, 1, False):
      table = self.module.tables[name]
      for one in self.module.computations[name]:
        made = self._operation(one, table, run_count, beside)
        if made.memory or made.flops or made.collectives:
          yield made

  def _runs(self, name: str, run_count: int, beside: bool) -> Iterator[tuple[str, int, bool]]:
    """(computation, how often it runs, whether beside others) for all that are run by themselves, not in a fusion."""
    yield name, run_count, beside
    for one in self.module.computations[name]:
      if one.opcode == "conditional":
        yield from self._runs(self._branch(one), run_count, beside)
      elif one.opcode in ("while", "call", *_ASYNC):
        trips = (one.opcode == "while" and self.module.trip_count(one)) or 1
        for inner in called(one):
          yield from self._runs(inner, run_count * trips, beside or one.opcode in _ASYNC)

  def _branch(self, one: Instruction) -> str:
    """The branch of a conditional that counts.

    moe_dropless_fallback=layer is `jax.lax.cond(overflow, dropless, capped)`, in MaxText's layer and with this package's
    kernels: 0 is the capped path, which a step takes unless more tokens are routed to a device than its buffer holds.
    Of others, the one that moves most.
    """
    if one.name not in self.taken:
      names = branches(one)
      if any(file in source for source in self.module.sources(one)[:1] for file in _FALLBACKS):
        index, what = 0, "the capped path"
      else:
        index = max(range(len(names)), key=lambda place: self._cost(names[place]))
        what = f"of {len(names)} the one that moves most"
      assumed = f"conditional {one.name}: branch {index}, {what}, assumed in 100 % of the steps"
      self.taken[one.name] = names[index], assumed
    return self.taken[one.name][0]

  def _cost(self, name: str) -> float:
    """Bytes that a computation moves and sends."""
    return sum(one.run_count * (one.memory + one.network_bytes) for one in self._operations(name))

  def _operation(self, one: Instruction, table: Table, run_count: int, beside: bool) -> Operation:
    sent = tuple(collectives_of(self.module, one, table, beside, self.routed_rows))
    memory = self._bytes_accessed(one, table) + sum(part.memory for part in sent)
    kernel = found[1] if (found := _KERNEL.search(one.rest)) else ""
    grouped, reread = grouped_product(one, self.routed_rows), 0.0
    if grouped is not None:
      kernel = grouped.kernel
      grouped, once = _in_hbm(grouped, one, table)
      reread = grouped.bytes_accessed - once
    products = flops(self.module, one, table)
    if kernel and (cost := _COST.search(one.rest)):
      products = float(cost[1])
    elif kernel and grouped is None:
      products = splash_flops(kernel, one) or experts_flops(kernel, one, self.routed_rows) or 0.0
    sources = self.module.sources(one)
    return Operation(one.name, sources, run_count, memory + reread, products, kernel, grouped, reread, sent)

  def _bytes_accessed(self, one: Instruction, table: Table) -> float:
    """Bytes that an instruction reads from and writes to the HBM, operands and results once."""
    if one.opcode in (*_FREE, *_ASYNC) or one.opcode.endswith(("-done", "-update")) or is_collective(one):
      return 0.0
    if 'custom_call_target="AllocateBuffer"' in one.rest:  # room, which others write
      return 0.0
    operands = [table[name].bytes_in_hbm if name in table else 0 for name in one.operands]
    result: float = one.bytes_in_hbm
    if one.opcode in _SLICING:
      return 2.0 * result
    if one.opcode == "dynamic-update-slice":
      return 2.0 * operands[1]
    if one.opcode.endswith("-start"):  # a copy, of a slice maybe: (one end, the other end, mark)
      ends = list(itertools.islice(arrays(one.shape), 2))
      accessed = min(math.prod(sizes) * bits(dtype) // 8 for dtype, sizes, _ in ends)
      return float(accessed * sum(in_hbm for _, _, in_hbm in ends))
    if one.opcode == "fusion" and (name := next(iter(called(one)), "")) in self.module.computations:
      operands, result = self._fused(name, operands, result)
    return sum(operands) + result

  def _fused(self, name: str, operands: list[int], result: float) -> tuple[list[int], float]:
    """As `_bytes_accessed` for a fusion: of what it only slices the slices count, of what it only updates the update."""
    body, table = self.module.computations[name], self.module.tables[name]
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for one in body:
      for operand in one.operands:
        users[operand].append(one)
    for parameter in (one for one in body if one.opcode == "parameter"):
      index = int(found[1]) if (found := re.match(r"(\d+)\)", parameter.rest)) else -1
      uses = users[parameter.name]
      if not 0 <= index < len(operands) or not operands[index] or not uses:
        continue
      if all(use.opcode in _SLICING and use.operands[0] == parameter.name for use in uses):
        operands[index] = min(operands[index], sum(size(use.shape) for use in uses))
      elif all(use.opcode == "dynamic-update-slice" and use.operands[0] == parameter.name for use in uses):
        update = sum(size(table[use.operands[1]].shape) for use in uses)
        result = max(result - operands[index], 0) + update
        operands[index] = 0
    return operands, result


def _in_hbm(grouped: GroupedProduct, one: Instruction, table: Table) -> tuple[GroupedProduct, float]:
  """(the product, which knows what of it lies in the HBM; bytes of operands and result there, counted once)."""
  given = [table[name] for name in one.operands if name in table and len(arrays(table[name].shape)[0][1]) > 1][:2]
  kept = [array.bytes_in_hbm for array in (*given, one)]
  sizes = [bits(arrays(array.shape)[0][0]) / 8 for array in (*given, one)]
  first, second, result = (width if held else 0.0 for width, held in zip(sizes, kept, strict=True))
  return dataclasses.replace(grouped, itemsize=(first, second, result)), float(sum(kept))
