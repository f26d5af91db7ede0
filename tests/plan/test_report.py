"""What `plan` draws."""

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from made_estimates import option

from maxtext_ling2.plan import report


def test_the_plot_is_a_picture(tmp_path):
  """A PNG of 120 dots per inch, 4 inches and 1.6 per option wide, with the colours of bars that fit and that do not."""
  report.draw([option("v6e-8"), option("v5e-8", fits=False)], "ling2", tmp_path / "plan.png")
  pixels = matplotlib.image.imread(tmp_path / "plan.png")
  assert pixels.shape == (11 * 120, round((4 + 2 * 1.6) * 120), 4)
  for colour in ("white", "C0", "C3"):
    distance = np.abs(pixels[..., :3] - matplotlib.colors.to_rgb(colour)).max(axis=-1)
    assert np.count_nonzero(distance < 0.01) > 1000


def test_what_is_plotted():
  """Memory in GiB with what is there, seconds by resource, seconds by part; none for an option that does not fit."""
  one, other = option("v6e-8"), option("v5e-8", "expert=8", fits=False)
  memory, seconds, parts = report.figure([one, other], "ling2").axes

  def bars(axes):
    return {group.get_label(): [bar.get_height() for bar in group] for group in axes.containers}

  assert (memory.get_title(), memory.get_ylabel()) == ("ling2", "GiB per device")
  assert [label.get_text() for label in memory.get_xticklabels()] == ["v6e-8\nfsdp", "v5e-8\nexpert=8"]
  assert list(bars(memory).values()) == [[20, 40]]
  assert [list(line.get_ydata()) for line in memory.lines] == [[31, 31]]
  assert list(bars(seconds)) == ["compute", "memory", "ici"]
  assert np.array(list(bars(seconds).values())) == pytest.approx(np.array([[0.2, 0], [0.1, 0], [0.1, 0]]))
  assert [bar.get_y() for group in seconds.containers for bar in group][::2] == pytest.approx([0, 0.2, 0.3])
  assert list(bars(parts)) == ["experts", "collectives"]
  assert np.array(list(bars(parts).values())) == pytest.approx(np.array([[0.25, 0], [0.25, 0]]))
