"""GLA on an NVIDIA GPU: our backend `chunked` and flash-linear-attention's Triton kernels (`fla`), in one run.

    python benchmarks/gla_gpu.py [--quick] [--repeats N] [--chunks N ...]

Needs JAX and PyTorch, both with CUDA, and flash-linear-attention (`pip install fla-core`). Both get the same bfloat16
arrays and the decays of a layer of `ling2`. First outputs and gradients of three heads are compared with GLA's definition
in float64; an error of more than 1 % makes the run fail. Then the two take turns: each repeat queues ten calls, waits for
the last and counts a tenth; the median is shown. "fla, graph" replays their kernels as a recorded CUDA graph, without the
time of their Python. "both" is forward and backward.
"""

import argparse
import importlib.util
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla import gla, log_decay
from maxtext_ling2.ops.gla.base import GlaInputs
from maxtext_ling2.ops.gla.chunked import chunked

DIM = 128
NAMES = ("o", "dq", "dk", "dv")
PASSES = {"forward": False, "both": True}
CALLS = 10  # queued before each wait, so that the launch of one overlaps the work of another
TOLERANCE = 0.01  # of the Frobenius norm; bfloat16 operands give 0.002 to 0.005
ROWS = 2048  # of the scores [T, T] that the float64 computation holds at a time

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
  """A shape of LING2, and the lengths of the documents packed into its sequence (none: one document)."""

  model: str
  length: int
  heads: int
  documents: tuple[int, ...] = ()

  def __str__(self) -> str:
    packed = f", {len(self.documents)} documents" if self.documents else ""
    return f"{self.model}, T={self.length}, H={self.heads}{packed}"

  @property
  def g_gamma(self) -> Any:
    """[H] float32, log decay per token of a layer in the middle."""
    return log_decay(10, 20, self.heads, 0)


CASES = (
  Case("ling2", 4096, 16),
  Case("ling2", 4096, 16, (700, 5, 1291, 2000, 100)),
  Case("ling2.6-flash", 4096, 32),
  Case("ling2", 32768, 16),
  Case("ling2", 32768, 16, (4096, 1000, 20000, 7, 7665)),
)


def make_inputs(case: Case, device: str) -> list[Any]:
  """q, k, v and the cotangent of o as PyTorch's [1, T, H, D] bfloat16."""
  import torch

  random = torch.Generator(device).manual_seed(0)
  shape = (1, case.length, case.heads, DIM)
  return [torch.randn(shape, generator=random, device=device).to(torch.bfloat16) for _ in NAMES]


def ours(case: Case, inputs: Sequence[Any], gradients: bool, chunk: int | None = None) -> Run:
  """Our backend, compiled, on the same memory; `chunk` replaces the backend's own chunk size."""
  q, k, v, do = (jax.dlpack.from_dlpack(x) for x in inputs)
  lengths = jnp.asarray(case.documents, jnp.int32)
  count = len(case.documents)
  ids = jnp.repeat(jnp.arange(1, count + 1), lengths, total_repeat_length=case.length)[None] if count else None

  def output(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
    if chunk is None:
      return gla(q, k, v, case.g_gamma, segment_ids=ids, backend="chunked")[0]
    inputs = GlaInputs(q, k, v, jnp.asarray(case.g_gamma), ids, None)
    return chunked(chunk_size=chunk)(inputs, scale=DIM**-0.5, output_final_state=False)[0]

  def all_of_it(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, ids: jax.Array | None) -> tuple[jax.Array, ...]:
    if not gradients:
      return (output(q, k, v, ids),)
    o, pull = jax.vjp(lambda q, k, v: output(q, k, v, ids), q, k, v)
    return o, *pull(do)

  compiled = jax.jit(all_of_it).lower(q, k, v, do, ids).compile()
  return lambda: compiled(q, k, v, do, ids)


def theirs(case: Case, inputs: Sequence[Any], gradients: bool) -> Run:
  """`chunk_simple_gla` of flash-linear-attention, with the same `g_gamma`."""
  import torch
  from fla.ops.simple_gla import chunk_simple_gla

  q, k, v, do = (x.detach().requires_grad_(gradients and x is not inputs[3]) for x in inputs)
  g_gamma = torch.from_numpy(case.g_gamma).to(q.device)
  bounds = [sum(case.documents[:i]) for i in range(len(case.documents) + 1)]
  cu_seqlens = torch.tensor(bounds, dtype=torch.int64, device=q.device) if case.documents else None

  def run() -> tuple[Any, ...]:
    o, _ = chunk_simple_gla(q, k, v, g_gamma=g_gamma, cu_seqlens=cu_seqlens)
    return (o, *torch.autograd.grad(o, (q, k, v), do)) if gradients else (o,)

  return run


def exact(case: Case, inputs: Sequence[Any], heads: Sequence[int]) -> list[Any]:
  """o, dq, dk and dv [T, heads, D] from the definition, in float64: every pair of tokens of one document."""
  import torch

  index = torch.arange(case.length, device=inputs[0].device)
  ends = torch.tensor(case.documents or (case.length,), device=index.device).cumsum(0)
  document = torch.searchsorted(ends, index, right=True)
  results = []
  for head in heads:
    q, k, v, do = (x[0, :, head].double() for x in inputs)
    o, dq, dk, dv = (torch.zeros_like(x) for x in (v, q, k, v))
    for start in range(0, case.length, ROWS):
      rows = slice(start, min(start + ROWS, case.length))
      distance = index[rows, None] - index
      seen = (distance >= 0) & (document[rows, None] == document)
      weight = torch.where(seen, torch.exp(float(case.g_gamma[head]) * distance.clamp(min=0)) * DIM**-0.5, 0.0)
      scores, dscores = weight * (q[rows] @ k.T), weight * (do[rows] @ v.T)  # [rows, T]
      o[rows], dq[rows] = scores @ v, dscores @ k
      dk += dscores.T @ q[rows]
      dv += scores.T @ do[rows]
    results.append((o, dq, dk, dv))
  return [torch.stack(x, 1) for x in zip(*results, strict=True)]


def errors(found: Sequence[Any], expected: Sequence[Any], heads: Sequence[int]) -> list[tuple[float, float]]:
  """Relative errors per array: of the norm, and of the largest absolute value."""
  import torch

  pairs = []
  for x, y in zip(found, expected, strict=True):
    array = x.detach() if isinstance(x, torch.Tensor) else torch.from_dlpack(x)
    difference = array[0][:, list(heads)].double() - y
    pairs.append((float(difference.norm() / y.norm()), float(difference.abs().max() / y.abs().max())))
  return pairs


def compare(case: Case, inputs: Sequence[Any], runs: dict[str, Run]) -> bool:
  """Prints the errors of each run; returns whether all are within the tolerance."""
  heads = (0, case.heads // 2, case.heads - 1)
  expected = exact(case, inputs, heads)
  near = True
  for name, run in runs.items():
    found = errors(run(), expected, heads)
    near &= all(norm <= TOLERANCE for norm, _ in found)  # false for NaN, too
    print(f"| {case} | {name} |", " | ".join(f"{norm:.4f} ({largest:.4f})" for norm, largest in found), "|", flush=True)
  return near


def graph(run: Run) -> Run | None:
  """The same kernels as one recorded CUDA graph, or None where they cannot be recorded."""
  import torch

  try:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
      for _ in range(3):
        run()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
      results = run()
  except RuntimeError as error:
    print(f"(no CUDA graph: {str(error).splitlines()[0]})")
    return None

  def replay() -> Any:
    recorded.replay()
    return results  # the memory that it writes to

  return replay


def medians(runs: dict[str, Run], wait: Callable[[Any], None], repeats: int) -> dict[str, float]:
  """Seconds per call, the runs in turn."""
  times: dict[str, list[float]] = {name: [] for name in runs}
  for repeat in range(repeats + 2):  # two to warm up
    for name, run in runs.items():
      wait(None)
      start = time.perf_counter()
      for _ in range(CALLS):
        result = run()
      wait(result)
      if repeat >= 2:
        times[name].append((time.perf_counter() - start) / CALLS)
  return {name: statistics.median(values) for name, values in times.items()}


def missing() -> str | None:
  """What this benchmark lacks, None if nothing."""
  if jax.default_backend() != "gpu":
    return f"JAX runs on {jax.default_backend()!r}; install a JAX with CUDA, and do not set JAX_PLATFORMS=cpu"
  for module, package in {"torch": "torch", "fla": "fla-core"}.items():
    if importlib.util.find_spec(module) is None:
      return f"there is no module {module!r}; pip install {package}"
  import torch

  return None if torch.cuda.is_available() else "PyTorch sees no GPU; install a PyTorch with CUDA"


def row(first: str, times: dict[str, float]) -> str:
  """A line of the table: microseconds, and the ratios of ours to theirs."""
  found = {name: f"{1e6 * value:.0f}" for name, value in times.items()}
  ratios = [times["chunked"] / times[name] if name in times else None for name in ("fla", "fla, graph")]
  cells = [first, found["chunked"], found["fla"], found.get("fla, graph", "")]
  return "| " + " | ".join([*cells, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]) + " |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="only T = 4096")
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--chunks", type=int, nargs="*", default=[], help="sizes of our chunks to time, too")
  args = parser.parse_args()
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is for both
  lacking = missing()
  if lacking:
    sys.exit(f"gla_gpu: {lacking}.")
  import torch

  def wait(result: Any) -> None:
    if result is not None and isinstance(result[0], jax.Array):
      jax.block_until_ready(result)
    torch.cuda.synchronize()

  cases = [case for case in CASES if not args.quick or case.length <= 4096]
  near = True
  rows = []
  print(f"{torch.cuda.get_device_name()}, jax {jax.__version__}, torch {torch.__version__}, bfloat16, D={DIM}\n")
  print("Error against float64: of the norm (the largest difference, of the largest value)\n")
  print("| | backend |", " | ".join(NAMES), "|\n|---|---|---|---|---|---|")
  for case in cases:
    inputs = make_inputs(case, "cuda")
    torch.cuda.synchronize()
    programs = {name: {"chunked": ours(case, inputs, g), "fla": theirs(case, inputs, g)} for name, g in PASSES.items()}
    near &= compare(case, inputs, programs["both"])
    for name, runs in programs.items():
      recorded = graph(runs["fla"])
      everything = runs if recorded is None else runs | {"fla, graph": recorded}
      rows.append(row(f"{case} | {name}", medians(everything, wait, args.repeats)))
      print(rows[-1], file=sys.stderr, flush=True)
  print(f"\nMicroseconds per call, median of {args.repeats}\n")
  print("| | passes | chunked | fla | fla, graph | chunked / fla | chunked / graph |\n|---|---|---|---|---|---|---|")
  print("\n".join(rows), flush=True)
  for case, chunk in itertools.product((CASES[0], CASES[3]), args.chunks):
    inputs = make_inputs(case, "cuda")
    torch.cuda.synchronize()
    times = medians({name: ours(case, inputs, g, chunk) for name, g in PASSES.items()}, wait, args.repeats)
    print(f"chunks of {chunk}, {case}:", ", ".join(f"{name} {1e6 * x:.0f}" for name, x in times.items()), flush=True)
  if not near:
    sys.exit(f"gla_gpu: an error above is larger than {TOLERANCE}, or no number.")


if __name__ == "__main__":
  main()
