"""The text of a compiled program, `compiled.as_text()`, as computations and instructions with sizes and sources."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
_LOOP = (r"condition=%?([\w.\-]+)", r"body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_COMPUTATIONS = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_BINARY = re.compile(r'"(?:body|debug_locations)":"[^"]*",?')  # a kernel's own program


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
    return size(self.shape, hbm_only=True)

  @property
  def kind(self) -> str:
    """The opcode, the same for both forms of an operation that runs beside others."""
    return self.opcode.removesuffix("-start")


Computation = list[Instruction]
Table = Mapping[str, Instruction]
"""A computation's instructions by name."""


class Module:
  """The computations of a compiled program.

  Attributes:
    computations: by name.
    entry: name of the computation that is run.
    devices: that run it together.
  """

  def __init__(self, text: str):
    self.computations: dict[str, Computation] = {}
    self.entry = ""
    first = text.partition("\n")[0]
    counts = [re.search(rf"{key}=(\d+)", first) for key in ("replica_count", "num_partitions")]
    self.devices = math.prod(int(found[1]) for found in counts if found)
    self._frames = _frames(text)
    current: Computation = []
    for line in _lines(text):
      if head := _HEAD.match(line):
        current = self.computations.setdefault(head[1], [])
        if line.startswith("ENTRY"):
          self.entry = head[1]
      elif found := _LINE.match(line):
        current.append(_instruction(found[1], found[2]))

  @functools.cached_property
  def tables(self) -> Mapping[str, Table]:
    """The instructions of each computation, by name."""
    return {name: {one.name: one for one in lines} for name, lines in self.computations.items()}

  def sources(self, one: Instruction) -> tuple[str, ...]:
    """Where an instruction comes from, "file:function", the innermost first; empty: the compiler added it."""
    found = re.search(r"stack_frame_id=(\d+)", one.rest)
    return self._frames.get(int(found[1]), ()) if found else ()

  def trip_count(self, loop: Instruction) -> int | None:
    """How often a loop runs, if its counter starts at a constant, grows by one, and is compared with a constant.

    A loop that XLA has unrolled counts in steps larger than 1. None: the text does not tell.
    """
    condition, body = (found[1] for found in map(functools.partial(re.search, string=loop.rest), _LOOP) if found)
    table = self.tables[condition]
    compares = [one for one in table.values() if one.opcode == "compare" and "direction=LT" in one.rest]
    if len(compares) != 1 or len(compares[0].operands) != 2:
      return None
    counter, limit = (table.get(name) for name in compares[0].operands)
    place = _place(counter)
    last, step = _constant(limit), None if place is None else self._step(body, place)
    if place is None or last is None or not step:
      return None
    return max(-(-(last - self._start(loop, place)) // step), 0)

  def _step(self, body: str, place: int) -> int | None:
    """What the body of a loop adds to its counter, which is at a place of the loop's values."""
    root, table = self.computations[body][-1], self.tables[body]
    one = table.get(root.operands[place]) if root.opcode == "tuple" and place < len(root.operands) else None
    while one is not None and one.opcode in ("copy", "bitcast", "fusion"):
      if one.opcode == "fusion":  # of scalars: its root is the sum
        name = called(one)[0]
        one, table = self.computations[name][-1], self.tables[name]
      else:
        one = table.get(one.operands[0])
    if one is None or one.opcode != "add":
      return None
    steps = [_constant(table.get(name)) for name in one.operands]
    return next((step for step in steps if step is not None), None)

  def _start(self, loop: Instruction, place: int) -> int:
    """The counter's first value; 0 where the text does not tell, as JAX's scans begin."""
    for table in self.tables.values():
      if table.get(loop.name) is loop:
        values = table.get(loop.operands[0])
        first = table.get(values.operands[place]) if values and place < len(values.operands) else None
        while first is not None and first.opcode in ("copy", "bitcast"):
          first = table.get(first.operands[0])
        return _constant(first) or 0
    return 0

  def fused(self, one: Instruction) -> Iterator[tuple[Instruction, Table]]:
    """The instructions within a fusion, with those beside them; fusions within it are opened, too."""
    for name in called(one):
      for inner in self.computations.get(name, ()):
        yield inner, self.tables[name]
        if inner.opcode == "fusion":
          yield from self.fused(inner)


def _place(one: Instruction | None) -> int | None:
  """The place of a loop's value that an instruction reads."""
  found = re.search(r"index=(\d+)", one.rest) if one is not None and one.opcode == "get-tuple-element" else None
  return int(found[1]) if found else None


def _constant(one: Instruction | None) -> int | None:
  """The value of a whole number."""
  found = re.match(r"(-?\d+)\)", one.rest) if one is not None and one.opcode == "constant" else None
  return int(found[1]) if found else None


def called(one: Instruction) -> list[str]:
  """Names of the computations that an instruction runs."""
  names = _CALLED.findall(one.rest)
  for several in _COMPUTATIONS.findall(one.rest):
    names += _NAME.findall(several)
  return names


def branches(one: Instruction) -> list[str]:
  """The computations of a `conditional`, in the order of its index; of one by a truth value, false is 0 and true 1."""
  if found := re.search(r"true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)", one.rest):
    return [found[2], found[1]]
  return called(one)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], bool]]:
  """(dtype, sizes, whether it lies in the HBM) of each array of a type."""
  found = []
  for dtype, sizes, layout in _ARRAY.findall(shape):
    on_chip = re.search(r"S\([1-9]\d*\)", layout)
    found.append((dtype, tuple(int(part) for part in sizes.split(",") if part), on_chip is None))
  return found


@functools.lru_cache(2**16)
def size(shape: str, hbm_only: bool = False) -> int:
  """Bytes of all arrays of a type."""
  return sum(math.prod(sizes) * bits(dtype) // 8 for dtype, sizes, in_hbm in arrays(shape) if in_hbm or not hbm_only)


def bits(dtype: str) -> int:
  """Of an element."""
  if dtype in _BITS:
    return _BITS[dtype]
  found = re.match(r"[a-z]+(\d+)", dtype)
  return int(found[1]) if found else 0


def _lines(text: str) -> Iterator[str]:
  """The lines; an instruction whose metadata of a kernel take lines of their own is one."""
  held: list[str] = []
  for line in text.splitlines():
    if held:
      held.append(line)
      if line.startswith("}"):
        yield "\n".join(held)
        held = []
    elif line.startswith(" ") and line.endswith("{"):
      held = [line]
    else:
      yield line


def _instruction(name: str, text: str) -> Instruction:
  """Reads TYPE opcode(operands), attributes; types and operands may hold brackets."""
  end = _balanced(text, 0) if text.startswith("(") else text.find(" ")
  shape, text = text[:end], text[end:].lstrip()
  opcode, _, rest = text.partition("(")
  close = _balanced("(" + rest, 0) - 1
  return Instruction(name, shape, opcode, tuple(_NAME.findall(rest[:close])), _BINARY.sub("", rest))


def _balanced(text: str, start: int) -> int:
  """The place behind the bracket that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += (text[place] == "(") - (text[place] == ")")
    if depth == 0:
      return place + 1
  return len(text)


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
