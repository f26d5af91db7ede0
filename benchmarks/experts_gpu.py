"""The routed experts of `ling2` on an NVIDIA GPU: our backend `xla`, the same with tokamax's products, and PyTorch.

    python benchmarks/experts_gpu.py [--tokens N ...] [--repeats N]

Needs JAX and PyTorch, both with CUDA. All get the same bfloat16 arrays and a random choice of 8 of 256 experts per token.
"torch" is what one would write there: rows sorted by expert, `torch.nn.functional.grouped_mm` per matrix, autograd. First
all results are compared with float64 (norm of the difference over the norm); an error of ours of more than 1 % makes the
run fail. Then they take turns, as in gla_gpu.py; the median is shown. "both" is forward and backward.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import gla_gpu
import jax
import tokamax

from maxtext_ling2.ops.experts import experts

EXPERTS, CHOICES, WIDTH, HIDDEN = 256, 8, 2048, 512
NAMES = ("y", "dx", "dweights", "dw_gate", "dw_up", "dw_down")
TOLERANCE = 0.01

Run = Callable[[], Any]


def make_inputs(tokens: int) -> list[Any]:
  """x, indices, weights, the three matrices and dy, as PyTorch's."""
  import torch

  random = torch.Generator("cuda").manual_seed(0)

  def normal(*shape: int, scale: float = 1.0) -> Any:
    return (torch.randn(shape, generator=random, device="cuda") * scale).to(torch.bfloat16)

  scores = torch.rand((tokens, EXPERTS), generator=random, device="cuda")
  weights, indices = scores.topk(CHOICES, dim=1)
  matrices = [normal(EXPERTS, WIDTH, HIDDEN, scale=WIDTH**-0.5) for _ in range(2)]
  matrices.append(normal(EXPERTS, HIDDEN, WIDTH, scale=HIDDEN**-0.5))
  return [normal(tokens, WIDTH), indices.int(), weights.float(), *matrices, normal(tokens, WIDTH)]


def ours(inputs: list[Any], gradients: bool, products: Any = jax.lax) -> Run:
  """Our backend, compiled, on the same memory; `products` has `ragged_dot` and `ragged_dot_general`."""
  x, indices, *differentiable, dy = (jax.dlpack.from_dlpack(a) for a in inputs)

  def output(x: jax.Array, *others: jax.Array) -> jax.Array:
    return experts(x, indices, *others, backend="xla")

  def all_of_it(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    if not gradients:
      return (output(*arrays[:-1]),)
    y, pull = jax.vjp(output, *arrays[:-1])
    return y, *pull(arrays[-1])

  names = ("ragged_dot", "ragged_dot_general")
  with mock.patch.multiple(jax.lax, **{name: getattr(products, name) for name in names}):
    compiled = jax.jit(all_of_it).lower(x, *differentiable, dy).compile()
  return functools.partial(compiled, x, *differentiable, dy)


def theirs(inputs: list[Any], gradients: bool) -> Run:
  """PyTorch with grouped products."""
  import torch
  from torch.nn.functional import grouped_mm, silu

  x, indices, weights, w_gate, w_up, w_down, dy = inputs
  leaves = [a.detach().requires_grad_(gradients) for a in (x, weights, w_gate, w_up, w_down)]

  def run() -> tuple[Any, ...]:
    x, weights, w_gate, w_up, w_down = leaves
    order = indices.flatten().argsort()
    ends = torch.bincount(indices.flatten(), minlength=EXPERTS).cumsum(0).int()
    rows = x[order // CHOICES]
    h = silu(grouped_mm(rows, w_gate, offs=ends)) * grouped_mm(rows, w_up, offs=ends)
    of_row = grouped_mm(h, w_down, offs=ends) * weights.flatten()[order, None]
    y = torch.zeros(x.shape, device=x.device).index_add(0, order // CHOICES, of_row.float()).to(x.dtype)
    return (y, *torch.autograd.grad(y, leaves, dy)) if gradients else (y,)

  return run


def exact(inputs: list[Any]) -> list[Any]:
  """Every result in float64, expert by expert."""
  import torch
  from torch.nn.functional import silu

  x, indices, weights, w_gate, w_up, w_down, dy = inputs
  leaves = [a.detach().double().requires_grad_() for a in (x, weights)]
  y, dleaves, dmatrices = torch.zeros_like(leaves[0]), [torch.zeros_like(a) for a in leaves], []
  for expert in range(EXPERTS):
    token, choice = torch.nonzero(indices == expert, as_tuple=True)
    matrices = [w[expert].double().requires_grad_() for w in (w_gate, w_up, w_down)]
    rows = leaves[0][token]
    part = leaves[1][token, choice, None] * ((silu(rows @ matrices[0]) * (rows @ matrices[1])) @ matrices[2])
    y = y.index_add(0, token, part.detach())
    gradients = torch.autograd.grad(part, [*leaves, *matrices], dy[token].double())
    dleaves = [a + b for a, b in zip(dleaves, gradients[:2], strict=True)]
    dmatrices.append(gradients[2:])
  return [y.detach(), *dleaves, *(torch.stack(d) for d in zip(*dmatrices, strict=True))]


def programs(inputs: list[Any], gradients: bool) -> dict[str, Run]:
  """What is timed, by name; what fails is printed and left out."""
  runs = {}
  for name, make in {"xla": ours, "tokamax": functools.partial(ours, products=tokamax), "torch": theirs}.items():
    try:
      runs[name] = make(inputs, gradients)
      runs[name]()
    except Exception as error:
      runs.pop(name, None)
      print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
  return runs


def compare(name: str, run: Run, inputs: list[Any]) -> bool:
  """Prints the errors of all results; returns whether they are within the tolerance."""
  import torch

  found = [a.detach() if isinstance(a, torch.Tensor) else torch.from_dlpack(a) for a in run()]
  errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact(inputs), strict=True)]
  print(f"{name}, errors:", ", ".join(f"{n} {e:.4f}" for n, e in zip(NAMES, errors, strict=True)), flush=True)
  return all(error <= TOLERANCE for error in errors)  # false for NaN, too


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384])
  parser.add_argument("--repeats", type=int, default=10)
  args = parser.parse_args()
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU's memory is for both
  import torch

  def wait(result: Any) -> None:
    if result is not None and isinstance(result[0], jax.Array):
      jax.block_until_ready(result)
    torch.cuda.synchronize()

  print(f"{torch.cuda.get_device_name()}, jax {jax.__version__}, torch {torch.__version__}, bfloat16", flush=True)
  near = True
  for tokens in args.tokens:
    inputs = make_inputs(tokens)
    torch.cuda.synchronize()
    for passes, gradients in gla_gpu.PASSES.items():
      runs = programs(inputs, gradients)
      if gradients:
        near &= {name: compare(name, run, inputs) for name, run in runs.items()}["xla"]
      times = gla_gpu.medians(runs, wait, args.repeats)
      operations = (3 if gradients else 1) * 2 * 3 * tokens * CHOICES * WIDTH * HIDDEN
      for name, seconds in times.items():
        rate = operations / seconds / 1e12
        print(f"{tokens} tokens, {passes}, {name}: {1e6 * seconds:.0f} us, {rate:.0f} TFLOP/s", flush=True)
  if not near:
    sys.exit(f"experts_gpu: an error of xla above is larger than {TOLERANCE}, or no number.")


if __name__ == "__main__":
  main()
