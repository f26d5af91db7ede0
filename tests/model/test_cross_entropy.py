"""The cross entropy of LING2's losses: MaxText's numbers, in values and gradients, and that its step uses it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from maxtext.layers import multi_token_prediction
from maxtext.trainers.pre_train import train
from maxtext.utils import max_utils

from maxtext_ling2.model.cross_entropy import cross_entropy_with_logits
from maxtext_ling2.model.mtp import token_losses
from tiny import Run, batch

B, T, V = 3, 7, 131


def case(scale=4.0):
  """logits [B, T, V] of that size, ids [B, T] with both ends of the vocabulary, weights of tokens [B, T], 0 for some."""
  rng = np.random.default_rng(0)
  logits = (scale * rng.standard_normal((B, T, V))).astype(np.float32)
  ids = rng.integers(0, V, (B, T)).astype(np.int32)
  ids[0, :2] = 0, V - 1
  weights = rng.random((B, T)).astype(np.float32)
  weights[1, 3:] = 0.0
  return logits, ids, weights


def in_float64(logits, ids, weights, z_loss):
  """(sum of weighted losses, its gradient), by the closed form."""
  x = logits.astype(np.float64)
  log_z = np.log(np.exp(x).sum(-1))
  hot = np.eye(V)[ids]
  losses = log_z - (hot * x).sum(-1) + z_loss * log_z**2
  softmax = np.exp(x - log_z[..., None])
  return (losses * weights).sum(), weights[..., None] * ((1 + 2 * z_loss * log_z)[..., None] * softmax - hot)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("function", [cross_entropy_with_logits, max_utils.cross_entropy_with_logits])
def test_values_and_gradients_are_those_of_the_closed_form(function, z_loss):
  """MaxText's function passes the same test."""
  logits, ids, weights = case()

  def total(logits):
    losses, z_losses = function(logits, jax.nn.one_hot(ids, V), z_loss)
    return jnp.sum(losses * weights), jnp.sum(z_losses * weights)

  (value, z_value), gradient = jax.value_and_grad(total, has_aux=True)(logits)
  expected, expected_gradient = in_float64(logits, ids, weights, z_loss)
  plain, _ = in_float64(logits, ids, weights, 0.0)
  assert float(value) == pytest.approx(expected, rel=1e-6)
  assert float(z_value) == pytest.approx(expected - plain, rel=1e-6, abs=1e-12)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


def test_a_row_without_a_target_has_the_z_loss_alone():
  """MaxText's one-hot rows of ids beyond the vocabulary are zeros."""
  logits, ids, _ = case()
  targets = jax.nn.one_hot(np.where(ids > V // 2, V, ids), V)
  for ours, theirs in zip(
    cross_entropy_with_logits(logits, targets, 1e-2),
    max_utils.cross_entropy_with_logits(logits, targets, 1e-2),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


def test_losses_of_mtp_are_maxtexts():
  logits, ids, weights = case()

  def total(losses):
    return lambda logits: jnp.sum(losses(logits, ids) * weights)

  ours, gradient = jax.value_and_grad(total(token_losses))(logits)
  theirs, expected = jax.value_and_grad(total(multi_token_prediction._cross_entropy_with_integer_labels))(logits)
  assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
  np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1, V])
def test_an_mtp_target_outside_of_the_vocabulary_is_not_a_number(wrong):
  logits, ids, _ = case()
  ids[2, 5] = wrong
  losses = np.asarray(token_losses(logits, ids))
  assert np.isnan(losses[2, 5]) and np.isnan(losses).sum() == 1


SMALL = {"base_num_decoder_layers": 2, "inhomogeneous_layer_cycle_interval": 2, "per_device_batch_size": 2}
SMALL |= {"opt_type": "sgd", "gradient_clipping_threshold": 0.0, "learning_rate": 1.0, "routed_bias_update_rate": 0.0}
SMALL |= {"z_loss_multiplier": 1e-2}


def test_a_step_has_the_losses_and_gradients_of_maxtexts_functions(monkeypatch):
  """With the z-loss, MTP, packed documents and padding; MaxText's modules keep their own function."""
  theirs = max_utils.cross_entropy_with_logits
  calls = []

  def counted(*args, **kwargs):
    calls.append(args)
    return theirs(*args, **kwargs)

  def step():
    run = Run(**SMALL)
    data = batch(run.config, seed=4)
    before = run.weights()
    metrics = run.step(data)
    return metrics, {path: before[path] - value for path, value in run.weights().items()}

  monkeypatch.setattr(max_utils, "cross_entropy_with_logits", counted)
  metrics, gradient = step()
  assert not calls and train.max_utils is max_utils and train.max_utils.cross_entropy_with_logits is counted
  monkeypatch.setattr("maxtext_ling2.training.step.cross_entropy_with_logits", counted)
  monkeypatch.setattr("maxtext_ling2.model.mtp.token_losses", multi_token_prediction._cross_entropy_with_integer_labels)
  expected, expected_gradient = step()
  assert len(calls) == 1
  assert expected["learning/z_loss"] > 0 and expected["learning/mtp_loss"] > 0
  for name in ("learning/loss", "learning/lm_loss", "learning/mtp_loss", "learning/z_loss", "learning/total_weights"):
    assert metrics[name] == pytest.approx(expected[name], rel=1e-6), name
  for path, value in expected_gradient.items():
    np.testing.assert_allclose(
      gradient[path], value, rtol=0, atol=1e-6 * max(np.abs(value).max(), 1.0), err_msg=str(path)
    )
