from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_ling2.ops.gla import log_decay, slopes

pytestmark = pytest.mark.unit

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "gla_decay.npz")
LAYERS = {"one_cycle": 5, "trailing_mtp": 7}
OFFSETS = {"slope_noshift": 0, "slope": 1}


@pytest.mark.parametrize("key", GOLDEN.files)
def test_log_decay_is_that_of_the_official_code(key):
  # slope.* and slope_noshift.* of oracle/*/io_short.npz: g_h of 4 heads in float32, sign included.
  case, kind, layer = key.split(".")
  found = log_decay(int(layer.removeprefix("layer")), LAYERS[case], 4, OFFSETS[kind])
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, GOLDEN[key], rtol=2**-22, atol=0)


@pytest.mark.parametrize(
  ("heads", "exponents"),
  [
    (1, [8]),
    (2, [4, 8]),
    (3, [4, 8, 2]),
    (4, [2, 4, 6, 8]),
    (6, [2, 4, 6, 8, 1, 3]),
    (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    (16, np.arange(1, 17) / 2),
    (64, np.arange(1, 65) / 8),
  ],
)
def test_slopes_are_powers_of_two_with_the_steps_between_for_other_counts(heads, exponents):
  found = slopes(heads)
  assert (found.dtype, found.shape) == (np.float64, (heads,))
  np.testing.assert_allclose(found, np.exp2(-np.asarray(exponents, np.float64)), rtol=1e-15)


def test_log_decay_of_the_first_and_last_layer():
  # (1 - (i - offset) / (L - 1) + 1e-5) by hand, times the slopes 2^-4 and 2^-8 of two heads.
  slope = np.array([2.0**-4, 2.0**-8])
  np.testing.assert_allclose(log_decay(0, 20, 2, 0), -slope * 1.00001, rtol=1e-7)
  np.testing.assert_allclose(log_decay(19, 20, 2, 0), -slope * 0.00001, rtol=1e-7)
  np.testing.assert_allclose(log_decay(0, 20, 2, 1), -slope * (20 / 19 + 0.00001), rtol=1e-7)
  np.testing.assert_allclose(log_decay(19, 20, 2, 1), -slope * (1 / 19 + 0.00001), rtol=1e-7)


def test_a_traced_layer_index_gives_the_same_bits():
  expected = np.stack([log_decay(i, 20, 6, 1) for i in range(20)])
  _, scanned = jax.jit(lambda: jax.lax.scan(lambda _, i: (None, log_decay(i, 20, 6, 1)), None, jnp.arange(20)))()
  assert scanned.dtype == jnp.float32
  np.testing.assert_array_equal(scanned, expected)
  np.testing.assert_array_equal(log_decay(jnp.asarray(7), 20, 6, 1), expected[7])


def test_a_traced_layer_index_past_the_last_layer_gives_nan():
  assert np.isnan(jax.jit(lambda i: log_decay(i, 20, 6, 1))(20)).all()


def test_a_result_may_be_changed_without_changing_the_next():
  first = log_decay(3, 20, 4, 0)
  expected = first.copy()
  first[:] = 0
  np.testing.assert_array_equal(log_decay(3, 20, 4, 0), expected)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((0, 1, 4, 0), "num_layers is 1, expected at least 2"),
    ((0, 5, 0, 0), "num_heads is 0, expected at least 1"),
    ((0, 5, 4, 2), "offset is 2, expected 0 .* or 1"),
    ((0, 5, 4, -1), "offset is -1, expected 0 .* or 1"),
    ((5, 5, 4, 0), "layer_index is 5, expected 0 to 4"),
    ((-1, 5, 4, 0), "layer_index is -1, expected 0 to 4"),
  ],
)
def test_a_wrong_argument_is_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    log_decay(*arguments)
