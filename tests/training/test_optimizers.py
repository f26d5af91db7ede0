"""Optimizer options that have to know LING2's state: what is decayed, clipped, skipped."""

import numpy as np
import pytest
import yaml

from maxtext_ling2.maxtext_api import recipes
from tiny import Run, batch

SMALL = {"base_num_decoder_layers": 2, "inhomogeneous_layer_cycle_interval": 2, "mtp_num_layers": 0}


def is_norm(path):
  return path[-1] == "scale"


def is_bias(path):
  return path[-2:] == ("gate", "bias")


def test_the_recipes_decay_spares_all_vectors():
  """Without a gradient (no target is scored) adamw only decays: w *= 1 - rate * decay."""
  settings = SMALL | {"mtp_num_layers": 1}
  mask = yaml.safe_load(recipes.file_of("pretrain_ling2").read_text())["adamw_mask"]
  run = Run(adam_weight_decay=0.5, learning_rate=0.1, adamw_mask=mask, routed_bias_update_rate=0.0, **settings)
  data = batch(run.config)
  data["targets_segmentation"][:] = 0
  before = run.weights()
  run.step(data)
  after = run.weights()
  assert sum(map(is_norm, before)) > 10 and sum(map(is_bias, before)) == 1 + 1
  for path, value in before.items():
    assert (value.ndim == 1) == (is_norm(path) or is_bias(path))
    factor = 1.0 if value.ndim == 1 else 0.95
    np.testing.assert_allclose(after[path], factor * value, rtol=1e-6, err_msg=".".join(path))


CLIPPED = {"opt_type": "sgd", "learning_rate": 1.0, "routed_bias_update_rate": 0.0, "moe_z_loss_weight": 1e-2, **SMALL}


def test_a_clipped_step_has_the_norm_of_the_threshold():
  """What plain gradient descent with rate 1 moves is the gradient; MaxText clips it by its norm over all weights."""
  run = Run(gradient_clipping_threshold=0.1, gradient_accumulation_steps=2, **CLIPPED)
  before = run.weights()
  metrics = run.step(batch(run.config))
  after = run.weights()
  moved = np.sqrt(sum(np.sum(np.square(after[path] - value, dtype=np.float64)) for path, value in before.items()))
  assert metrics["learning/raw_grad_norm"] > 0.2
  assert metrics["learning/grad_norm"] == pytest.approx(0.1, rel=1e-5)
  assert moved == pytest.approx(0.1, rel=1e-3)  # differences of float32 weights, each to 2^-24 of about 1


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_clipping_scales_all_gradients_alike(accumulation):
  settings = CLIPPED | {"gradient_accumulation_steps": accumulation}
  free = Run(gradient_clipping_threshold=0.0, **settings)
  clipped = Run(gradient_clipping_threshold=0.1, **settings)
  data = batch(free.config)
  before = free.weights()
  norm = free.step(data)["learning/raw_grad_norm"]
  metrics = clipped.step(data)
  assert norm > 0.2
  assert metrics["learning/raw_grad_norm"] == pytest.approx(norm, rel=1e-5)
  assert metrics["learning/grad_norm"] == pytest.approx(0.1, rel=1e-5)
  full, scaled = free.weights(), clipped.weights()
  for path, value in before.items():
    expected = (full[path] - value) * (0.1 / norm)
    np.testing.assert_allclose(scaled[path] - value, expected, rtol=1e-2, atol=2e-7, err_msg=".".join(path))


def test_a_skipped_step_moves_neither_weights_nor_biases():
  spikes = {"skip_step_on_spikes": True, "skip_step_interval": 8, "skip_step_scaling_factor": 50.0}
  run = Run(learning_rate=1e-6, routed_bias_update_rate=1e-4, **spikes, **SMALL)  # a calm loss, but for the spike
  data = batch(run.config)
  for _ in range(6):
    before = run.weights()
    assert run.step(data)["optim/step_skipped"] == 0.0
    assert any(np.any(run.weights()[path] != value) for path, value in before.items() if is_bias(path))
  weights = np.zeros_like(data["targets_segmentation"])
  weights[0, 0] = 1  # one token alone: a loss and a gradient norm far from the mean over many
  spike = dict(data, targets_segmentation=weights)
  before = run.weights()
  metrics = run.step(spike)
  assert metrics["optim/step_skipped"] == 1.0
  after = run.weights()
  for path, value in before.items():
    np.testing.assert_array_equal(after[path], value, err_msg=".".join(path))
