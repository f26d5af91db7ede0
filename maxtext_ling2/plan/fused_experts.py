"""The kernels of `ops.experts` in a compiled program: operations and time."""

import re
from typing import Final

from maxtext_ling2.plan.chips import Chip
from maxtext_ling2.plan.hlo import Instruction, arrays

_PRODUCTS: Final = {"experts_forward": 3, "experts_backward": 8}
"""Kernel -> products of each row with a matrix of C x F elements; the backward one computes gate and up again."""

_LAYOUTS = re.compile(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}")


def experts_flops(kernel: str, one: Instruction, routed_rows: float | None) -> float | None:
  """Operations of a kernel; None: it is another one.

  Args:
    kernel: its name.
    one: the instruction. Operands of three dimensions are the rows [tiles, rows of a tile, C], those of dy in the
      backward pass, and the matrices, gate's [E, C, F] the first of three.
    routed_rows: rows that a device's experts are given, where that is known; buffers may be larger.
  """
  if kernel not in _PRODUCTS or (layouts := _LAYOUTS.search(one.rest)) is None:
    return None
  operands = [shape for _, shape, _ in arrays(layouts[1]) if len(shape) == 3]
  tiles, rows_of_tile, width = operands[0]
  buffer = tiles * rows_of_tile
  rows = buffer if routed_rows is None else min(buffer, routed_rows)
  return 2.0 * _PRODUCTS[kernel] * rows * width * operands[-3][2]


def experts_seconds(flops: float, memory: float, chip: Chip) -> float:
  """Time of one run of a kernel with these operations and bytes."""
  return chip.experts_time_ratio * max(flops / chip.flops, memory / chip.memory_bandwidth)


def is_experts(kernel: str) -> bool:
  """Whether a kernel is one of `ops.experts`, whose cycles are counted (docs/kernels.md)."""
  return kernel in _PRODUCTS
