"""The base case: five layers, GLA x4 and MLA, the first with a dense MLP."""

from oracle_suite import OracleSuite, recorded


class TestOneCycle(OracleSuite):
  case = "one_cycle"
  with_mtp = False

  def test_gradients_first_row(self):
    self.check_gradients("b1", 1, 1, self.with_mtp, recorded(self.case, "io_short")["b1.train.loss"])

  def test_gradients_offset_0(self):
    self.check_gradients("noshift", 0, 2, False, recorded(self.case, "io_short")["slope_noshift.loss"])
