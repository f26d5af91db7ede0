"""Rows of a block, by TPU generation, and whether a chip takes the kernels."""

from typing import Final, NamedTuple


class Block(NamedTuple):
  """The work of one grid step."""

  rows: int  # at most: 16 times a power of two
  tiers: tuple[int, ...]  # numbers of rows that the kernel has a program for; the last one is `rows`
  vmem_limit: int = 60 * 2**20  # bytes
  experts: str = "any"  # to count cycles: "one block" or "several" of each expert, the other is then left out
