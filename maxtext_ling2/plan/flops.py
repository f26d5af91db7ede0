"""Operations of the matrix products of a compiled program, those within fusions too; nothing else is counted.

On a TPU a product is a `convolution`: one with batch dimensions is a dilated convolution over them, of whose positions
only those count that meet a number and not a hole. The rule: openxla/xla, hlo_cost_analysis.cc, HandleConvolution.
A matrix unit multiplies bfloat16. Products of float32 at a higher precision, such as the router's, are several passes of
it, and count as often: 3 at "high", 6 at "highest" (jax.lax.Precision).
"""

import functools
import math
import re
from typing import Final

import numpy as np

from maxtext_ling2.plan.hlo import Instruction, Module, Table, arrays

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_PRECISION = re.compile(r"operand_precision=\{(high|highest),")
_PASSES = {"high": 3.0, "highest": 6.0}


def flops(module: Module, one: Instruction, table: Table) -> float:
  """Operations of one run of an instruction: two for each product of two numbers, and pass."""
  if one.opcode == "fusion":
    return sum(_product(inner, inner_table) for inner, inner_table in module.fused(one))
  return _product(one, table)


_FLOATS: Final = ("bf16", "f32", "f16")
_SPLASH: Final = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
"""Kernel of MaxText's splash attention -> its products over the width of q and k, and over that of v.

Forward: q k^T; p v. dq: q k^T and ds k; do v^T. dkv: q k^T and ds^T q; do v^T and p^T do.
"""


def splash_flops(kernel: str, one: Instruction) -> float | None:
  """Operations of a kernel of splash attention, which states none; None: it is another one.

  Calculated: a causal mask, of whose blocks those are computed that hold a pair of tokens. Its first operand has one
  number for each block, [1, blocks of queries, blocks of keys]; the first of floats are q, k and v, [B, H, T, width], or
  [H, T, width] where a device has one row.
  """
  found = re.match(r"splash_mha_([a-z]+)", kernel)
  layouts = re.search(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}", one.rest)
  if not found or found[1] not in _SPLASH or not layouts:
    return None
  operands = arrays(layouts[1])
  q, k, v = [shape for dtype, shape, _ in operands if dtype in _FLOATS and len(shape) > 2][:3]
  blocks = operands[0][1][-2:]
  rows, columns = q[-2] // blocks[0], k[-2] // blocks[1]
  seen = [min(blocks[1], -(-(block + 1) * rows // columns)) for block in range(blocks[0])]
  pairs = rows * columns * (sum(seen) if q[-2] == k[-2] else math.prod(blocks))  # part of the queries: all keys
  over_k, over_v = _SPLASH[found[1]]
  return 2.0 * math.prod(q[:-2]) * pairs * (over_k * q[-1] + over_v * v[-1])


def _product(one: Instruction, table: Table) -> float:
  if one.opcode not in ("dot", "convolution"):
    return 0.0
  (dtype, left, _), (_, right, _) = (arrays(table[name].shape)[0] for name in one.operands[:2])
  precision = _PRECISION.search(one.rest) if dtype == "f32" else None
  passes = _PASSES[precision[1]] if precision else 1.0
  result = arrays(one.shape)[0][1]
  if one.opcode == "dot":
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    contracted = [int(dim) for dim in found[1].split(",") if dim] if found else []
    return passes * 2.0 * math.prod(result) * math.prod(left[dim] for dim in contracted)
  return passes * _convolution(one.rest, left, right, result)


def _convolution(rest: str, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]) -> float:
  labels = _LABELS.search(rest)
  if labels is None:
    raise ValueError(f"a convolution without dim_labels: {rest[:200]}")
  given, kernel, made = ({label: place for place, label in enumerate(text)} for text in labels.groups())
  window = dict(part.split("=") for part in found[1].split()) if (found := _WINDOW.search(rest)) else {}
  groups = int(count[1]) if (count := re.search(r"batch_group_count=(\d+)", rest)) else 1
  # The kernel's "i" is already that of one feature group.
  total = 2.0 * result[made["b"]] / groups * result[made["f"]] * right[kernel["i"]]
  spatial = sorted(label for label in made if label.isdigit())
  for index, label in enumerate(spatial):
    at = {name: window[name].split("x")[index] for name in window}
    total *= _positions(
      left[given[label]],
      result[made[label]],
      int(at.get("size", 1)),
      int(at.get("stride", 1)),
      int(at.get("pad", "0_0").split("_")[0]),
      (int(at.get("lhs_dilate", 1)), int(at.get("rhs_dilate", 1))),
    )
  return total


@functools.lru_cache(2**12)
def _positions(given: int, made: int, window: int, stride: int, pad: int, dilations: tuple[int, int]) -> int:
  """Pairs of an output and a window position that meet a number of the input, along one dimension."""
  spread, dilation = dilations
  outputs = np.arange(made) * stride - pad
  count = 0
  for position in range(window):
    places = outputs + position * dilation
    count += int(np.count_nonzero((places >= 0) & (places <= (given - 1) * spread) & (places % spread == 0)))
  return count
