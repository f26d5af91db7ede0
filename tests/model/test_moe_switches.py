"""MaxText's switches for experts that LING2 turns on by itself: they change no bit of a step."""

import numpy as np
import pytest

import tiny

SMALL = {
  "base_num_decoder_layers": 3,
  "inhomogeneous_layer_cycle_interval": 3,
  "opt_type": "sgd",
  "sparse_matmul": True,
}
OFF = {"moe_use_direct_token_gather": False, "router_topk_matmul_vjp": False}


@pytest.mark.parametrize(("scan", "dtype"), [(True, "bfloat16"), pytest.param(False, "float32", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_equal_to_the_bit_with_and_without_them(scan, dtype):
  """Packed sequences. Each weight's gradient is in the weights after a step of plain gradient descent."""
  on, off = (tiny.Run(scan_layers=scan, dtype=dtype, **SMALL, **settings) for settings in ({}, OFF))
  assert on.config.moe_use_direct_token_gather and on.config.router_topk_matmul_vjp
  before, data = on.weights(), tiny.batch(on.config)
  with_switches, without = on.step(data), off.step(data)
  for name in ("learning/loss", "learning/raw_grad_norm"):
    assert with_switches[name] == without[name]
  weights, expected = on.weights(), off.weights()
  for path, value in expected.items():
    np.testing.assert_array_equal(weights[path], value, err_msg="/".join(map(str, path)))
  moved = [path for path in expected if not np.array_equal(before[path], expected[path])]
  assert any("gate" in path for path in moved) and any("wi_0" in path for path in moved)
