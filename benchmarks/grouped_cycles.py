"""How many cycles a grid step of a grouped product takes, read from libtpu's schedule of MaxText's own kernels.

`tpu_static.py` refuses kernels of which the grid is known only at run time, and takes every branch as taken. A grouped
product has both: its grid visits one tile of rows after the other, as many as the groups need. So this file finds the
branches in the final bundles (`sbr.rel` jumps over a region) and says how often each runs:

  gmm, one block of K      none, but where the block is larger than K: the product of a block that is not the last
  gmm, several blocks      the accumulator is zeroed at the first block and stored at the last one; the mean is given
  tgmm                     zeroed at the first visit of a group and stored at the last one; both are given apart
  gmm_v2, tgmm_v2          a pipeline within the kernel, after loops that prepare it; one of four branches runs (tgmm_v2)

A step does not know how many rows and groups there are, so few are enough here, and the arrays that tell the kernel which
tile belongs to which group are made up, because XLA takes longer to compile their computation than the kernel.
"""

import contextlib
import dataclasses
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.tpu_static import NotEstimated, _slots, one_device

TWO_CORES = ("v4", "v5p")
"""One JAX device of these chips has two cores, which share the blocks of N."""


@dataclasses.dataclass(frozen=True)
class Case:
  """One kernel with one choice of tiles, as the kernel sees it.

  Attributes:
    kernel: gmm: [m, k] x [groups, k, n] -> [m, n]; gmm_transposed: [m, k] x [groups, n, k] -> [m, n]; tgmm: [m, k] and
      [m, n] -> [groups, k, n]; gmm_v2, tgmm_v2: the same by MaxText's copy of tokamax's second version.
    k: the product's K.
    n: the product's N.
    tiles: rows, k and n of a block.
  """

  kernel: str
  k: int
  n: int
  tiles: tuple[int, int, int]

  @property
  def blocks(self) -> tuple[int, int]:
    """Blocks of K and of N."""
    return -(-self.k // self.tiles[1]), -(-self.n // self.tiles[2])

  def cores(self, chip: str) -> int:
    """Cores that share the grid: its parallel dimension is the blocks of N; the second version has none."""
    return 2 if chip in TWO_CORES and self.blocks[1] > 1 and not self.kernel.endswith("_v2") else 1


@dataclasses.dataclass(frozen=True)
class Cycles:
  """Cycles of one grid step.

  Attributes:
    all_branches: with every branch taken; an upper bound.
    step: mean of a step (tgmm: of one that is the first and the last visit of its group).
    per_group: tgmm: part of `step` that runs once per group, not once per visit.
  """

  all_branches: int
  step: int
  per_group: int


def count(chip: str, cases: Sequence[Case]) -> Iterator[tuple[Case, Cycles | NotEstimated]]:
  """Counts each case in one fresh process (libtpu reads its flags once), and yields each as soon as it is done."""
  command = [sys.executable, os.path.abspath(__file__), chip]
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
  ) as process:
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps([dataclasses.asdict(case) for case in cases]))
    process.stdin.close()
    lines = (line[len(_MARK) :] for line in process.stdout if line.startswith(_MARK))
    found = 0
    for case, line in zip(cases, lines, strict=False):
      answer = json.loads(line)
      yield case, NotEstimated(answer["error"]) if "error" in answer else Cycles(**answer)
      found += 1
  if found < len(cases):
    raise NotEstimated(f"the process for {chip} ended after {found} of {len(cases)} kernels")


_MARK = "CYCLES "


def _work(chip: str) -> None:
  """The fresh process: reads cases from stdin, prints one line per case."""
  with tempfile.TemporaryDirectory(prefix="grouped_cycles") as folder:
    os.environ.update(
      JAX_PLATFORMS="cpu",
      TPU_SKIP_MDS_QUERY="1",
      ALLOW_MULTIPLE_LIBTPU_LOAD="1",
      DECOUPLE_GCLOUD="TRUE",
      LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_msa_enable=false",
    )
    for fields in json.load(sys.stdin):
      case = Case(**{**fields, "tiles": tuple(fields["tiles"])})
      try:
        _compile(chip, case)
        answer = dataclasses.asdict(_read(Path(folder), case))
      except Exception as e:  # compilers raise what they like; the caller decides
        answer = {"error": f"{case} on {chip}: {e}"[:1000]}
      print(_MARK + json.dumps(answer), flush=True)
      for file in Path(folder).iterdir():
        file.unlink()


_ROWS, _GROUPS = 4096, 8


def _compile(chip: str, case: Case) -> None:
  import jax

  mesh = one_device(chip)
  sharding = jax.NamedSharding(mesh, jax.P())
  with _no_metadata(), jax.set_mesh(mesh):
    function, arguments = _program(case)
    jax.jit(function, in_shardings=sharding, out_shardings=sharding).trace(*arguments).lower().compile()


def _program(case: Case) -> tuple[Any, tuple[Any, ...]]:
  """(function, arguments)"""
  import jax
  import jax.numpy as jnp
  from maxtext.kernels.megablox import backend
  from maxtext.kernels.megablox import pallas_mosaic_tpu_v2_gmm_kernel as gmm_v2
  from maxtext.kernels.megablox import pallas_mosaic_tpu_v2_tgmm_kernel as tgmm_v2

  def array(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  k, n, out = case.k, case.n, jnp.bfloat16
  tiles = gmm_v2.TileSizes(*case.tiles)
  functions = {
    "gmm": lambda lhs, rhs, sizes: backend.gmm(lhs, rhs, sizes, out, case.tiles),
    "gmm_transposed": lambda lhs, rhs, sizes: backend.gmm(lhs, rhs, sizes, out, case.tiles, transpose_rhs=True),
    "tgmm": lambda lhs, rhs, sizes: backend.tgmm(lhs.swapaxes(0, 1), rhs, sizes, out, case.tiles),
    "gmm_v2": lambda lhs, rhs, sizes: gmm_v2.gmm_v2(lhs, rhs, sizes, tile_info=tiles, preferred_element_type=out),
    "tgmm_v2": lambda lhs, rhs, sizes: tgmm_v2.tgmm_v2(
      lhs=lhs, rhs=rhs, group_sizes=sizes, num_actual_groups=_GROUPS, tile_info=tiles, preferred_element_type=out
    ),
  }
  weights = array(_GROUPS, n, k) if case.kernel == "gmm_transposed" else array(_GROUPS, k, n)
  rhs = array(_ROWS, n) if case.kernel.startswith("tgmm") else weights
  return functions[case.kernel], (array(_ROWS, k), rhs, jax.ShapeDtypeStruct((_GROUPS,), jnp.int32))


@contextlib.contextmanager
def _no_metadata() -> Iterator[None]:
  """Gives the kernels arrays of the right shapes in place of which tile belongs to which group."""
  import jax.numpy as jnp
  from maxtext.kernels.megablox import backend

  def made_up(*, group_sizes: Any, m: int, tm: int, **_: Any) -> Any:
    ids = jnp.full((m // tm + group_sizes.shape[0] - 1,), group_sizes[0], jnp.int32)
    return (jnp.pad(group_sizes, (0, 1)), ids, ids), group_sizes[1]

  original, backend.make_group_metadata = backend.make_group_metadata, made_up
  try:
    yield
  finally:
    backend.make_group_metadata = original


_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-fA-F]+|\d+)\s+[A-Z, ]*?\s*:\s*(>*)\s*\{")
_HEAD = re.compile(r"^\s*(?:0x[0-9a-fA-F]+|\d+)\s+[A-Z, ]*\bLB\b")
_BRANCH = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")
_LANDING = re.compile(r"Start/End empty region (\d+)")
_SHORT = 32  # bundles; a copy of a block that may not be whole is one
_DELAY_SLOTS = 5  # the jump and the four bundles after it run whether it is taken or not


def _read(folder: Path, case: Case) -> Cycles:
  """The cycles of the one kernel that libtpu left in the folder."""
  paths = [path for path in folder.glob("*gmm*final_bundles.txt") if "schedule-analysis" not in path.name]
  if len(paths) != 1:
    raise NotEstimated(f"libtpu wrote {len(paths)} schedules")
  bundles = _bundles(paths[0].read_text(errors="replace"))
  number = paths[0].name.partition("-")[0]
  _, rows = _slots(next(folder.glob(f"{glob.escape(number)}-*pre-delay_hlo-static*")))
  waits = len(rows) - len(
    bundles
  )  # cycles in which nothing starts have no bundle of their own; products wait, copies not
  start, end = _last_loop(bundles)
  lengths = _branches(bundles, start, end)
  if case.kernel.endswith("_v2"):
    return _second_version(end - start, waits, lengths)
  depths = [depth for depth, _ in bundles]
  if max(depths) > 1:
    raise NotEstimated("there is a loop within the kernel")
  cycles = len(rows) - depths.count(0)
  if case.kernel == "tgmm":
    return Cycles(cycles, cycles, sum(lengths[:-1]))
  if case.blocks[0] == 1:  # the one branch is then around everything, or one of two products never runs
    return Cycles(cycles, cycles - (lengths[-2] if len(lengths) > 1 else 0), 0)
  if len(lengths) < 2:
    raise NotEstimated(f"branches {lengths} where two products were expected")
  *once, other, last = lengths  # zeroing is shorter than the two products, one of which runs
  blocks, products = case.blocks[0], other + last + waits
  return Cycles(cycles, round(cycles - sum(once) * (1 - 1 / blocks) - products / 2), 0)


def _second_version(body: int, waits: int, lengths: Sequence[int]) -> Cycles:
  """Of a kernel with no more branches than the one around everything, or with four, of which one runs."""
  if len(lengths) not in (0, 1, 4):
    raise NotEstimated(f"branches {lengths} where none or four were expected")
  never = (sum(lengths) + waits) * 3 // 4 if len(lengths) == 4 else 0
  return Cycles(body + waits, body + waits - never, 0)


def _bundles(text: str) -> list[tuple[int, str]]:
  """(depth of loops, text) of each bundle."""
  found: list[tuple[int, str]] = []
  for line in text.splitlines():
    if match := _BUNDLE.match(line):
      found.append((len(match.group(1)), line))
    elif found:
      found[-1] = (found[-1][0], found[-1][1] + line)
  return found


def _last_loop(bundles: Sequence[tuple[int, str]]) -> tuple[int, int]:
  """First and last bundle of the last loop, which is the grid's, or the pipeline's."""
  inside = [i for i, (depth, _) in enumerate(bundles) if depth]
  heads = [i for i in inside if _HEAD.match(bundles[i][1]) and bundles[i][0] == 1]
  return max(heads, default=0), max(inside, default=0) + 1


def _branches(bundles: Sequence[tuple[int, str]], start: int, end: int) -> list[int]:
  """Bundles that each innermost branch of the grid's loop leaves out, the shortest first, without those of copies."""
  landings = {name: i for i, (_, text) in enumerate(bundles) for name in _LANDING.findall(text)}
  jumps = [
    (i, landings[match.group(1)])
    for i in range(start, end)
    if (match := _BRANCH.search(bundles[i][1])) and i < landings.get(match.group(1), 0) <= end
  ]
  innermost = [(a, b) for a, b in jumps if not any(a < c and d <= b for c, d in jumps)]
  return sorted(b - a - _DELAY_SLOTS for a, b in innermost if b - a >= _SHORT)


if __name__ == "__main__":
  _work(sys.argv[1])
