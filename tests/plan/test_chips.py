"""Links of a slice: public figures, and what a chip at its edge has of them."""

import pytest

from maxtext_ling2.plan.chips import CHIPS, TopologyError, edge_links, slice_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  ("grid", "wrap", "links"),
  [
    ((2, 4, 4), (False, False, False), 3),
    ((4, 4, 4), (True, True, True), 6),
    ((8, 8), (False, False), 2),
    ((8, 16), (False, True), 3),
    ((16, 16), (True, True), 4),
    ((2, 2, 1), (False, False, False), 2),
    ((1, 1), (False, False), 0),
  ],
)
def test_a_chip_at_the_edge(grid, wrap, links):
  assert edge_links(grid, wrap) == links


@pytest.mark.parametrize(
  ("topology", "gigabytes"),
  [
    ("v5p-64", 300),  # 32 chips of 2 x 4 x 4, not closed: 3 of 6 links
    ("v6e-64", 200),  # 8 x 8, not closed: 2 of 4
    ("tpu7x-64", 150),  # 32 chips of 2 x 4 x 4, two devices each
    ("v5p-256", 600),
    ("v6e-128", 300),  # 8 x 16, closed along the 16
    ("v6e-256", 400),
    ("v4-128", 300),
    ("v5e-4", 100),
  ],
)
def test_rates(topology, gigabytes):
  assert slice_of(topology).edge_bandwidth == pytest.approx(gigabytes * 1e9)


def test_published_links():
  """One direction of all links, in Gbit/s per chip as Google names them; tpu7x: 600 GB/s for a chip's two devices."""
  found = {name: chip.ici_bandwidth for name, chip in CHIPS.items()}
  published = {"v4": 2400, "v5e": 1600, "v5p": 4800, "v6e": 3200}
  assert found == {name: rate / 8 * 1e9 for name, rate in published.items()} | {"tpu7x": 600e9 / 2}


def test_no_such_topology():
  for topology in ("v5p-63", "a3"):
    with pytest.raises(TopologyError, match=f"--topology {topology}"):
      slice_of(topology)
