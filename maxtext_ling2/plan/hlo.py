"""What a compiled program moves, read from the text of its HLO: bytes to and from the HBM, and between chips.

Bodies of loops count as often as they run, as far as the compiler knows it. XLA's own cost analysis counts them once.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\] \{([^}]*)\})")
_MESH_AXIS = re.compile(r"'([\w]+)'=(\d+)")
_GROUP_AXIS = re.compile(r"'([\w]+)'(?::\(\d+\)(\d+))?")

# Opcodes that move nothing by themselves.
_FREE = {
  *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all"),
  *("partition-id", "replica-id", "opt-barrier", "iota", "add-dependency", "domain"),
}
# Run a computation beside the others: the last two are how gathers and collectives are given to the sparse cores.
_ASYNC = ("async-start", "call-start", "custom-call-start")
_SLICING = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation: its result's type, opcode, operands' names, and everything behind them."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str

  @property
  def bytes_in_hbm(self) -> int:
    """Bytes of the result outside of the memory on the chip."""
    return _size(self.shape, hbm_only=True)


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one run of a program moves, on one device.

  Attributes:
    memory: bytes read from and written to the HBM by all operations.
    collectives: by opcode: (how often it runs, bytes that a device sends).
    kernels: by name of a Pallas kernel: (how often it runs, bytes of `memory` that are its own).
    unknown_loops: loops whose number of rounds the compiler does not know; their bodies count once.
  """

  memory: float
  collectives: Mapping[str, tuple[int, float]]
  kernels: Mapping[str, tuple[int, float]]
  unknown_loops: int


def traffic(text: str) -> Traffic:
  """Reads the text of a compiled module, `compiled.as_text()`."""
  return _Module(text).traffic()


def memory_by(text: str, part: Callable[[str, Sequence[str]], str]) -> dict[str, float]:
  """`Traffic.memory`, divided.

  Args:
    text: as for `traffic`.
    part: (name of an instruction, "file:function" of the source it comes from, the innermost first) -> a name.

  Returns:
    {name: bytes}, the largest first.
  """
  module, frames = _Module(text), _frames(text)
  found: dict[str, float] = collections.defaultdict(float)
  for one, moved, _ in module.memory():
    frame = re.search(r"stack_frame_id=(\d+)", one.rest)
    found[part(one.name, frames.get(int(frame[1]), ()) if frame else ())] += moved
  return dict(sorted(found.items(), key=lambda item: -item[1]))


def _frames(text: str) -> dict[int, tuple[str, ...]]:
  """The source of each stack frame, "file:function", from it to the outermost."""
  tables: dict[str, dict[int, str]] = {}
  table: dict[int, str] = {}
  for line in text.splitlines():
    if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
      table = tables.setdefault(line, {})
    elif found := re.match(r"(\d+) (.*)", line):
      table[int(found[1])] = found[2].strip('"')
    elif line.startswith("%"):
      break

  def number(row: str, key: str) -> int:
    return int(match[1]) if (match := re.search(rf"{key}=(\d+)", row)) else 0

  frames: dict[int, tuple[str, ...]] = {}
  for key, row in tables.get("StackFrames", {}).items():
    place = tables["FileLocations"][number(row, "file_location_id")]
    file, function = number(place, "file_name_id"), number(place, "function_name_id")
    source = f"{tables['FileNames'][file]}:{tables['FunctionNames'][function]}"
    frames[key] = (source, *frames.get(number(row, "parent_frame_id") - 1, ()))  # its own number means none
  return frames


class _Module:
  """The computations of a module."""

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ""
    current: list[Instruction] = []
    for line in text.splitlines():
      if head := _HEAD.match(line):
        current = self.computations.setdefault(head[1], [])
        if line.startswith("ENTRY"):
          self.entry = head[1]
      elif found := _LINE.match(line):
        current.append(_instruction(found[1], found[2]))

  def traffic(self) -> Traffic:
    """Walks from the entry, with the number of times each computation runs."""
    memory = 0.0
    number: collections.Counter[str] = collections.Counter()
    sent: dict[str, float] = collections.defaultdict(float)
    kernels: dict[str, tuple[int, float]] = {}
    unknown = 0
    for one, moved, (times, table) in self.memory():
      memory += moved
      unknown += one.opcode == "while" and self._rounds(one) is None
      if kernel := re.search(r'custom_call_target="tpu_custom_call".*?op_name="[^"]*?([\w]+)/pallas_call', one.rest):
        runs, size = kernels.get(kernel[1], (0, 0.0))
        kernels[kernel[1]] = (runs + times, size + moved)
      for collective in self._collectives(one):
        kind = collective.opcode.removesuffix("-start")
        number[kind] += times
        sent[kind] += times * _sent(collective, table)
    return Traffic(memory, {kind: (number[kind], sent[kind]) for kind in sorted(number)}, kernels, unknown)

  def memory(self) -> Iterator[tuple[Instruction, float, tuple[int, Mapping[str, Instruction]]]]:
    """Each instruction that runs by itself, its bytes in all its runs, and (their number, instructions beside it)."""
    for name, times in self._runs(self.entry, 1):
      table = {one.name: one for one in self.computations[name]}
      for one in self.computations[name]:
        yield one, times * self._moved(one, table), (times, table)

  def _runs(self, name: str, times: int) -> Iterator[tuple[str, int]]:
    """(computation, how often it runs) for all that are run by themselves, not inside of a fusion."""
    yield name, times
    for one in self.computations[name]:
      rounds = (one.opcode == "while" and self._rounds(one)) or 1
      if one.opcode in ("while", "call", "conditional", *_ASYNC):
        for called in _called(one):
          yield from self._runs(called, times * rounds)

  def _rounds(self, loop: Instruction) -> int | None:
    """How often the body of a loop runs, if its condition is that a counter (0, 1, 2 ...) is below a constant."""
    condition = self.computations[loop.rest.partition("condition=%")[2].partition(",")[0]]
    table = {one.name: one for one in condition}
    compares = [one for one in condition if one.opcode == "compare" and "direction=LT" in one.rest]
    limits = [table[name] for one in compares for name in one.operands if name in table]
    values = [one.rest.partition(")")[0] for one in limits if one.opcode == "constant"]
    return int(values[0]) if len(values) == 1 and values[0].isdigit() else None

  def _collectives(self, one: Instruction) -> Iterator[Instruction]:
    """The collective that an instruction is, or those that it fuses."""
    if _is_collective(one):
      yield one
    elif one.opcode == "fusion":
      scatters = "all-reduce-scatter" in one.name  # the TPU compiler's name for a reduce-scatter
      for inner in (inner for called in _called(one) for inner in self.computations.get(called, ())):
        if _is_collective(inner):
          yield dataclasses.replace(inner, opcode="reduce-scatter") if scatters else inner

  def _moved(self, one: Instruction, table: Mapping[str, Instruction]) -> float:
    """Bytes that an instruction reads from and writes to the HBM."""
    if one.opcode in (*_FREE, *_ASYNC) or one.opcode.endswith(("-done", "-update")) or _is_collective(one):
      return 0.0
    operands = [table[name].bytes_in_hbm if name in table else 0 for name in one.operands]
    result: float = one.bytes_in_hbm
    if one.opcode in _SLICING:
      return 2.0 * result
    if one.opcode == "dynamic-update-slice":
      return 2.0 * operands[1]
    if one.opcode.endswith("-start"):  # a copy, of a slice maybe: (one end, the other end, mark)
      ends = [found[0] for found in itertools.islice(_ARRAY.finditer(one.shape), 2)]
      return float(min(map(_size, ends)) * sum(_size(end, hbm_only=True) > 0 for end in ends))
    if one.opcode == "fusion" and (called := next(iter(_called(one)), "")) in self.computations:
      operands, result = self._fused(called, operands, result)
    return sum(operands) + result

  def _fused(self, called: str, operands: list[int], result: float) -> tuple[list[int], float]:
    """As `_moved` for a fusion: of what it only slices the slices count, of what it only updates the update."""
    body = self.computations[called]
    table = {one.name: one for one in body}
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for one in body:
      for name in one.operands:
        users[name].append(one)
    for parameter in (one for one in body if one.opcode == "parameter"):
      index = int(found[1]) if (found := re.match(r"(\d+)\)", parameter.rest)) else -1
      uses = users[parameter.name]
      if not 0 <= index < len(operands) or not operands[index] or not uses:
        continue
      if all(use.opcode in _SLICING and use.operands[0] == parameter.name for use in uses):
        operands[index] = min(operands[index], sum(_size(use.shape) for use in uses))
      elif all(use.opcode == "dynamic-update-slice" and use.operands[0] == parameter.name for use in uses):
        update = sum(_size(table[use.operands[1]].shape) for use in uses)
        result = max(result - operands[index], 0) + update
        operands[index] = 0
    return operands, result


def _is_collective(one: Instruction) -> bool:
  kind = one.opcode.removesuffix("-start")
  return kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


def _sent(one: Instruction, table: Mapping[str, Instruction]) -> float:
  """Bytes that a device sends in a collective, by the ring algorithms."""
  kind = one.opcode.removesuffix("-start")
  given = sum(_size(table[name].shape) for name in one.operands if name in table) or _size(one.shape)
  size = _group(one.rest)
  share = (size - 1) / size
  if kind == "all-gather":
    return given * (size - 1)
  if kind == "all-reduce":
    return 2 * given * share
  return given * share if kind != "collective-permute" else float(given)


def _group(rest: str) -> int:
  """Devices that take part in a collective together; 2 where the text does not tell."""
  found = _GROUPS.search(rest)
  if not found:
    return 2
  if found[4]:
    sizes = dict(_MESH_AXIS.findall(found[4]))
    return math.prod(int(part or sizes[axis]) for axis, part in _GROUP_AXIS.findall(found[5]))
  return int(found[2]) if found[2] else max(len(found[3].split(",")), 1)


def _called(one: Instruction) -> list[str]:
  names = _CALLED.findall(one.rest)
  for branches in _BRANCHES.findall(one.rest):
    names += _NAME.findall(branches)
  return names


def _instruction(name: str, text: str) -> Instruction:
  """Reads TYPE opcode(operands), attributes; types and operands may hold brackets."""
  end = _balanced(text, 0) if text.startswith("(") else text.find(" ")
  shape, text = text[:end], text[end:].lstrip()
  opcode, _, rest = text.partition("(")
  close = _balanced("(" + rest, 0) - 1
  return Instruction(name, shape, opcode, tuple(_NAME.findall(rest[:close])), rest)


def _balanced(text: str, start: int) -> int:
  """The place behind the bracket that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += (text[place] == "(") - (text[place] == ")")
    if depth == 0:
      return place + 1
  return len(text)


@functools.lru_cache(2**16)
def _size(shape: str, hbm_only: bool = False) -> int:
  """Bytes of all arrays of a type."""
  total = 0
  for dtype, sizes, layout in _ARRAY.findall(shape):
    if hbm_only and re.search(r"S\([1-9]\d*\)", layout):
      continue
    elements = math.prod(int(size) for size in sizes.split(",") if size)
    total += elements * _bits(dtype) // 8
  return total


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  found = re.match(r"[a-z]+(\d+)", dtype)
  return int(found[1]) if found else 0
