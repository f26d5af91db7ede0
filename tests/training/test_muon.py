"""Which matrices muon orthogonalises."""

import numpy as np
import pytest

from tiny import Run, batch


@pytest.mark.parametrize(
  ("name", "shape"),
  [("query_key_value", (32, 3, 4, 8)), ("output_gate", (32, 4, 8)), ("query_key_value", (32, 2, 2, 3, 4, 8))],
)
def test_projections_are_whole_over_heads(name, shape):
  from maxtext.utils import muon_utils

  numbers = muon_utils.transform_logic(("decoder", "layers_0", "self_attention", name, "kernel"), shape)
  assert numbers.reduction_axis == (0,) and numbers.output_axis == (-2, -1)


def test_output_projection_and_experts():
  from maxtext.utils import muon_utils

  out = muon_utils.transform_logic(("decoder", "layers_0", "self_attention", "out", "kernel"), (4, 8, 32))
  assert out.reduction_axis == (0, -2) and out.output_axis == (-1,)
  expert = muon_utils.transform_logic(("decoder", "layers_1", "moe", "MoeBlock_0", "wi_0"), (8, 32, 16))
  assert expert.reduction_axis == (-2,) and expert.output_axis == (-1,)


@pytest.mark.parametrize(
  "optimizer", ["adamw", "muon", *(pytest.param(other, marks=pytest.mark.slow) for other in ("adam_pax", "sgd"))]
)
def test_optimizers_learn(optimizer):
  rate = 0.3 if optimizer == "sgd" else 1e-2
  small = {"base_num_decoder_layers": 3, "mtp_num_layers": 0, "routed_bias_update_rate": 0.0}
  run = Run(opt_type=optimizer, learning_rate=rate, **small)
  data = batch(run.config)
  losses = [float(run.step(data)["learning/lm_loss"]) for _ in range(8)]
  assert np.all(np.isfinite(losses))
  assert losses[-1] < losses[0] - 0.2
