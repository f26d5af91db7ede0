"""Every row of the matrix is what it says. See matrix.py."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest

import tiny
from settings import matrix
from settings.matrix import PLAIN, ROWS

STEPS = 2
LOSSES = [f"learning/{name}" for name in ("loss", "lm_loss", "mtp_loss", "moe_z_loss", "moe_lb_loss")]
TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.matrix


def run(settings):
  """(metrics of each step, weights after each step with those before the first, evaluation of the first weights)."""
  trained = tiny.Run(**{**PLAIN, **settings})
  data = [tiny.batch(trained.config, seed) for seed in range(STEPS)]
  evaluation, weights, metrics = trained.evaluate(data[0]), [trained.weights()], []
  for batch in data:
    metrics.append(trained.step(batch))
    weights.append(trained.weights())
  return metrics, weights, evaluation


@functools.cache
def plain(on):
  return run(dict(on))


def both(row):
  return run({**row.on, **row.settings}), plain(tuple(row.on.items()))


def rows(outcome):
  return [
    pytest.param(row, id=row.name, marks=[] if row.quick else pytest.mark.slow) for row in ROWS if row.outcome == outcome
  ]


def assert_close(ours, expected, bound):
  """Arrays by path, in units of each array's largest value."""
  assert set(ours) == set(expected)
  for path, value in expected.items():
    np.testing.assert_allclose(ours[path], value, rtol=0, atol=bound * np.abs(value).max() + 1e-9, err_msg=str(path))


@pytest.mark.parametrize("row", rows(matrix.EQUAL))
def test_equal(row):
  """Losses of the first step to 1e-6, weights after it to 1e-5 of the largest: gradients are sums in another order.

  The second step begins with weights that differ so, and makes more of it.
  """
  (metrics, weights, evaluation), (plain_metrics, plain_weights, plain_evaluation) = both(row)
  for bound, ours, expected in zip((1e-6, 1e-5), metrics, plain_metrics, strict=True):
    for name in LOSSES:
      assert ours[name] == pytest.approx(expected[name], rel=bound), name
  assert evaluation["evaluation/loss"] == pytest.approx(plain_evaluation["evaluation/loss"], rel=1e-6)
  assert_close(weights[1], plain_weights[1], 1e-5)


@pytest.mark.parametrize("row", rows(matrix.DIFFERENT))
def test_different_as_expected(row):
  CHECKS[row.note](*both(row))


@pytest.mark.parametrize("row", rows(matrix.REFUSED))
def test_refused(row):
  with pytest.raises(ValueError) as error:
    tiny.config(**{**PLAIN, **row.on, **row.settings})
  assert f"{next(iter(row.settings))}=" in str(error.value) and row.note in str(error.value)


@pytest.mark.parametrize("row", rows(matrix.MAXTEXT))
def test_maxtexts_own_fault(row):
  """It is explained."""
  assert row.note in (TESTS.parent / "docs" / "troubleshooting.md").read_text()


@pytest.mark.parametrize("file", sorted({row.note for row in ROWS if row.outcome == matrix.ELSEWHERE}))
def test_elsewhere(file):
  """That file sets what the rows name."""
  text = (TESTS / file).read_text()
  for row in ROWS:
    if row.note == file:
      (field,) = row.settings
      assert re.search(rf"\b{field}(=[^=]|\": )", text), row.name


# What must differ, and how


def moved(weights, step=0):
  """What the first step took away: the gradient, as the rate is 1."""
  return {path: value - weights[step + 1][path] for path, value in weights[step].items()}


def dropout(ours, expected):
  """Only training has it: the same evaluation, other losses."""
  assert ours[2]["evaluation/loss"] == pytest.approx(expected[2]["evaluation/loss"], rel=1e-6)
  assert abs(ours[0][0]["learning/lm_loss"] / expected[0][0]["learning/lm_loss"] - 1) > 1e-3


def rounded_weights(ours, _):
  """A float32 model whose weights were rounded to bfloat16: the same losses."""
  import jax.numpy as jnp

  config = tiny.config(**PLAIN)
  rounded = {
    path: np.asarray(jnp.asarray(value, jnp.bfloat16), np.float32) for path, value in tiny.weights(config).items()
  }
  reference = tiny.Run(rounded, **PLAIN)
  metrics = reference.step(tiny.batch(config, 0))
  for name in LOSSES:
    assert ours[0][0][name] == pytest.approx(metrics[name], rel=1e-6), name
  assert all(value.dtype == jnp.bfloat16 for path, value in ours[1][1].items() if "bias" not in path)


def rounded_gradients(ours, expected):
  """Gradients in bfloat16: off by at most half a unit of its 8 bits, beside float32's own rounding of the weights."""
  assert ours[0][0]["learning/loss"] == pytest.approx(expected[0][0]["learning/loss"], rel=1e-6)
  gradients, others = moved(expected[1]), moved(ours[1])
  differ = 0
  for path, value in gradients.items():
    if path[-1] != "bias":
      bound = 2.0**-8 * np.abs(value) + 2.0**-22 * np.abs(expected[1][0][path])
      assert np.all(np.abs(others[path] - value) <= bound), path
      differ += np.sum(others[path] != value)
  assert differ > 1000


def soft_cap(ours, expected):
  """cap * tanh(x / cap) of MLA's logits: nothing of it where the cap is far above them."""
  assert abs(ours[0][0]["learning/lm_loss"] / expected[0][0]["learning/lm_loss"] - 1) > 1e-5
  high = run({"attn_logits_soft_cap": 1e4})
  assert high[0][0]["learning/lm_loss"] == pytest.approx(expected[0][0]["learning/lm_loss"], rel=1e-6)


def dropped_tokens(ours, expected):
  """Experts take no more than their share: other losses; all tokens are counted still, so biases move as before."""
  assert abs(ours[0][0]["learning/lm_loss"] / expected[0][0]["learning/lm_loss"] - 1) > 1e-3
  biases = [path for path in expected[1][1] if path[-2:] == ("gate", "bias")]
  assert len(biases) == 3
  for path in biases[:1]:  # the first expert layer has the same input
    np.testing.assert_array_equal(ours[1][1][path], expected[1][1][path], err_msg=str(path))


def only_mtp(ours, expected):
  """The decoder's loss stays to the bit, MTP's is that of fp8."""
  assert ours[0][0]["learning/lm_loss"] == expected[0][0]["learning/lm_loss"]
  difference = abs(ours[0][0]["learning/mtp_loss"] / expected[0][0]["learning/mtp_loss"] - 1)
  assert 1e-5 < difference < 0.05


def frozen(ours, expected):
  """Only the experts are in the mask: all other weights stay, and the first step of theirs is the plain one."""
  for path, value in expected[1][1].items():
    before, after = ours[1][0][path], ours[1][1][path]
    if "moe" in path:
      np.testing.assert_allclose(after, value, rtol=0, atol=1e-6 * np.abs(value).max(), err_msg=str(path))
    else:
      np.testing.assert_array_equal(after, before, err_msg=str(path))
      assert np.any(value != before), path


def z_loss(ours, expected):
  """MaxText's z-loss of the output logits, beside the cross entropy."""
  with_z, without = ours[0][0], expected[0][0]
  assert with_z["learning/loss"] - without["learning/loss"] == pytest.approx(with_z["learning/z_loss"], rel=1e-3)
  assert with_z["learning/z_loss"] > 1e-3


def only_routers(ours, expected):
  """The first step of all other weights stays; a router's update is orthogonal with muon, and is not without."""
  routers = [path for path in expected[1][1] if path[-2:] == ("gate", "kernel")]
  assert len(routers) == 3
  for path, value in expected[1][1].items():
    if path not in routers:
      np.testing.assert_allclose(ours[1][1][path], value, rtol=0, atol=1e-6 * np.abs(value).max(), err_msg=str(path))
  for path in routers:
    with_muon, without = (np.linalg.svd(moved(run[1])[path], compute_uv=False) for run in (expected, ours))
    assert with_muon.max() / with_muon.min() < 2, path  # five Newton-Schulz steps leave singular values of 0.7 to 1.2
    assert without.max() / without.min() > 2.5, path


CHECKS = {
  check.__name__: check
  for check in (
    *(dropout, rounded_weights, rounded_gradients, soft_cap, dropped_tokens, only_mtp, frozen, z_loss, only_routers),
  )
}
