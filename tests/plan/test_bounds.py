"""Both bounds, from a list of operations made by hand, on a chip of round numbers."""

import math

import pytest

from maxtext_ling2.plan.bounds import bounds
from maxtext_ling2.plan.chips import Chip
from maxtext_ling2.plan.collectives import Collective
from maxtext_ling2.plan.grouped import GroupedProduct
from maxtext_ling2.plan.operations import Operation

pytestmark = pytest.mark.unit

CHIP = Chip(
  "none", flops=100.0, memory=1e9, memory_bandwidth=10.0, ici_bandwidth=6.0, links=6, clock=1.0, gla_time_ratio=1.5
)
GLA, EXPERTS = ("model/gla.py:f",), ("layers/moe.py:f",)
PRODUCT = Operation("dot", GLA, run_count=3, memory=10.0, flops=400.0)  # 4 s computing, 1 s bytes
KERNEL = Operation("k", GLA, run_count=2, memory=40.0, kernel="gla_forward")  # 6 s by its schedule, 4 s bytes
MOVES = Operation("add", EXPERTS, run_count=1, memory=30.0)  # 3 s bytes
TILES = GroupedProduct("gmm", 2, 4.0, 1, 1, "bfloat16", (2, 1, 50))  # 3 visits of 2 * 2 * 50 operations: 6 s
GROUPED = Operation("gmm.1", EXPERTS, run_count=1, memory=20.0, flops=8.0, kernel="gmm", grouped=TILES)  # 2 s bytes
SENT = Operation(
  "ag", GLA, run_count=2, memory=10.0, collectives=(Collective("all-gather", 12.0, 10.0, synchronous=False),)
)  # 1 s bytes, 2 s over all links, 4 s over three


def test_both_bounds():
  found = bounds([PRODUCT, KERNEL, MOVES, GROUPED, SENT], CHIP, edge_bandwidth=3.0)
  assert found.compute_seconds == pytest.approx(3 * 4 + 2 * 6 + 6)
  assert found.memory_seconds == pytest.approx(3 * 1 + 2 * 4 + 3 + 2 + 2 * 1)
  assert found.ici_seconds == pytest.approx(2 * 2)
  assert found.optimistic_seconds == pytest.approx(30)
  assert found.pessimistic_seconds == pytest.approx(3 * 4 + 2 * 6 + 3 + 6 + 2 * (1 + 4))


def test_parts():
  found = bounds([PRODUCT, KERNEL, MOVES, GROUPED, SENT], CHIP, 3.0, {"GLA": 7.0})
  assert [(part.name, part.bound, part.floor_seconds) for part in found.parts] == [
    ("GLA", "compute", 7.0),
    ("collectives", "ICI", 0.0),
    ("experts", "compute", 0.0),
  ]
  assert [part.seconds for part in found.parts] == pytest.approx([24, 10, 9])
  assert [part.bytes_accessed for part in found.parts] == pytest.approx([110, 20, 50])
  assert bounds([MOVES], CHIP, 0.0).parts[0].bound == "HBM"
  assert math.isnan(bounds([MOVES], CHIP, 0.0).parts[0].floor_seconds)


def test_one_device_sends_nothing():
  found = bounds([PRODUCT], CHIP, edge_bandwidth=0.0)
  assert (found.ici_seconds, found.pessimistic_seconds) == (0.0, pytest.approx(12))
