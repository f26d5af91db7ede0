"""What the objective is over microbatches, with both values of calculate_per_token_loss; and the router z-loss in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext_ling2.training.objective import Totals, _accumulated
from tiny import Run, batch

SMALL = {"base_num_decoder_layers": 2, "inhomogeneous_layer_cycle_interval": 2}
SMALL |= {"opt_type": "sgd", "gradient_clipping_threshold": 0.0, "learning_rate": 1.0}
SMALL |= {"routed_bias_update_rate": 0.0, "moe_z_loss_weight": 1e-2, "load_balance_loss_weight": 1e-2}


class FakeConfig:
  gradient_accumulation_steps = 2
  mtp_num_layers = 0
  mtp_loss_scaling_factor = 0.1

  def __init__(self, per_token):
    self.calculate_per_token_loss = per_token


@pytest.mark.parametrize(("per_token", "expected"), [(True, 180 / 70), (False, 3.0)])
def test_example_of_the_rfc(per_token, expected):
  """Microbatches of loss sum / tokens 100 / 50 and 80 / 20."""
  total = Totals(jnp.asarray(70), jnp.zeros((0,), jnp.int32), jnp.asarray(70))
  parts = []
  for loss_sum, tokens in ((100.0, 50), (80.0, 20)):
    aux = {"xent_sum": jnp.asarray(loss_sum), "total_weights": jnp.asarray(tokens), "moe_lb_loss": 0.0, "mtp_loss": 0.0}
    parts.append(_accumulated({**aux, "intermediate_outputs": {}}, 0.0, total, FakeConfig(per_token))[0])
  assert float(sum(parts)) / 70 == pytest.approx(expected, rel=1e-6)  # MaxText divides by all tokens


def microbatches(data, steps):
  """The microbatches MaxText makes of a global batch: row r goes to microbatch r % steps."""
  return [{name: value[m::steps] for name, value in data.items()} for m in range(steps)]


def unequal(config, seed=0):
  """A batch whose microbatches have very different numbers of tokens."""
  data = batch(config, seed)
  for name in ("inputs_segmentation", "targets_segmentation"):
    data[name][1::2, 4:] = 0
  return data


def moved(run, before):
  """The gradient, by what a step of sgd with learning rate 1 moved."""
  return {path: before[path] - value for path, value in run.weights().items()}


def gradient(run, data):
  before, state = run.weights(), run.state
  metrics = run.step(data)
  result = moved(run, before)
  run.state = state
  return metrics, result


@pytest.fixture(scope="module")
def whole():
  return Run(per_device_batch_size=4, **SMALL)


@pytest.fixture(scope="module")
def half():
  return Run(per_device_batch_size=2, **SMALL)


@functools.cache
def accumulating(per_token):
  return Run(per_device_batch_size=2, gradient_accumulation_steps=2, calculate_per_token_loss=per_token, **SMALL)


def assert_same(ours, expected):
  assert set(ours) == set(expected)
  for path, value in expected.items():
    np.testing.assert_allclose(ours[path], value, rtol=1e-4, atol=1e-5 * np.abs(value).max() + 1e-6, err_msg=str(path))


LOSSES = ("learning/loss", "learning/lm_loss", "learning/mtp_loss", "learning/moe_z_loss", "learning/moe_lb_loss")


def test_per_token_equals_one_undivided_batch(whole):
  data = unequal(whole.config)
  expected, expected_gradient = gradient(whole, data)
  metrics, ours = gradient(accumulating(True), data)
  for name in LOSSES:
    assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
  assert_same(ours, expected_gradient)


def test_mean_of_means_equals_the_microbatches_alone(half):
  run = accumulating(False)
  data = unequal(run.config)
  parts = [gradient(half, part) for part in microbatches(data, 2)]
  metrics, ours = gradient(run, data)
  for name in LOSSES:
    assert metrics[name] == pytest.approx(np.mean([part[0][name] for part in parts]), rel=1e-5, abs=1e-6), name
  assert_same(ours, {path: np.mean([part[1][path] for part in parts], axis=0) for path in ours})


@pytest.mark.parametrize("per_token", [True, False])
def test_empty_microbatch_and_empty_batch(per_token):
  run = accumulating(per_token)
  data = batch(run.config)
  data["targets_segmentation"][0::2] = 0
  metrics, ours = gradient(run, data)
  assert all(np.all(np.isfinite(value)) for value in (*metrics.values(), *ours.values()))
  assert np.abs(ours["token_embedder", "embedding"]).max() > 0
  data["targets_segmentation"][:] = 0
  metrics, ours = gradient(run, data)
  assert all(np.all(np.isfinite(value)) for value in (*metrics.values(), *ours.values()))


def test_z_loss_gradient_has_closed_form():
  """d/dlogits of mean(logsumexp^2) is 2 logsumexp softmax / positions."""
  logits = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
  value, ours = jax.value_and_grad(lambda x: jnp.mean(jnp.square(jax.nn.logsumexp(x, axis=-1))))(logits)
  log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
  np.testing.assert_allclose(ours, 2 * log_z * np.exp(logits - log_z) / 10, rtol=1e-5)
  assert value == pytest.approx(float((log_z**2).mean()), rel=1e-6)


def test_z_loss_in_the_objective(half):
  without = Run(per_device_batch_size=2, **{**SMALL, "moe_z_loss_weight": 0.0})
  data = batch(half.config)
  with_z, _ = gradient(half, data)
  plain, _ = gradient(without, data)
  layers = 1 + 1  # one expert layer and MTP's
  assert with_z["learning/loss"] - plain["learning/loss"] == pytest.approx(
    1e-2 * layers * with_z["learning/moe_z_loss"], rel=1e-4
  )
  assert "learning/moe_z_loss" not in plain
  each = [value for name, value in with_z.items() if name.startswith("learning/moe/z_loss/")]
  assert len(each) == layers and np.mean(each) == pytest.approx(with_z["learning/moe_z_loss"], rel=1e-6)
  assert half.evaluate(data)["evaluation/moe_z_loss"] > 0
  assert "evaluation/moe_z_loss" not in without.evaluate(data)


def test_no_z_loss_operation_at_weight_zero():
  """The router's jaxpr at weight 0 has no logsumexp: no reduction over experts but those of routing."""
  from flax import nnx

  from maxtext_ling2.model.moe import Router
  from tiny import config

  def primitives(weight):
    router = Router(config(moe_z_loss_weight=weight), nnx.Rngs(0))
    graph, state = nnx.split(router)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state, copy=True)(x))(state, jnp.ones((1, 2, 32)))
    return str(jaxpr)

  assert "log" in primitives(1e-3).replace("logistic", "")
  assert "log" not in primitives(0.0).replace("logistic", "")
  assert "reduce" not in primitives(0.0)


@pytest.mark.slow
def test_logits_in_pieces_change_nothing():
  """num_vocab_tiling: the same losses and gradients, with MTP, both z-losses, packed rows, and over microbatches."""
  settings = SMALL | {"z_loss_multiplier": 1e-2, "calculate_per_token_loss": True}
  plain = Run(per_device_batch_size=4, **settings)
  tiled = Run(per_device_batch_size=2, gradient_accumulation_steps=2, num_vocab_tiling=4, **settings)
  data = unequal(plain.config)
  expected, expected_gradient = gradient(plain, data)
  metrics, ours = gradient(tiled, data)
  assert expected["learning/mtp_loss"] > 0 and expected["learning/z_loss"] > 0 and expected["learning/moe_z_loss"] > 0
  for name in LOSSES:  # not z_loss: MaxText reports the sum of the microbatches' means
    assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
  assert_same(ours, expected_gradient)


# The acceptance test of the RFC on accumulation: so many scored tokens in each of four microbatches of one row.
SCORED = (50, 20, 35, 15)
FOUR = SMALL | {"mtp_num_layers": 0}
FOUR |= {"max_target_length": 64, "load_balance_loss_weight": 1.0}


@functools.cache
def four_rows(steps, per_token):
  """(metrics, gradient) of the same four rows in so many microbatches."""
  run = Run(
    per_device_batch_size=4 // steps, gradient_accumulation_steps=steps, calculate_per_token_loss=per_token, **FOUR
  )
  data = batch(run.config, packed=False)
  for row, tokens in enumerate(SCORED):
    for name in ("inputs_segmentation", "targets_segmentation"):
      data[name][row, tokens:] = 0
  return gradient(run, data)


@pytest.mark.slow
def test_four_unequal_microbatches_equal_one_undivided_batch():
  (metrics, ours), (expected, expected_gradient) = four_rows(4, True), four_rows(1, True)
  assert metrics["learning/total_weights"] == expected["learning/total_weights"] == sum(SCORED)
  for name in LOSSES:
    assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
  assert expected["learning/moe_lb_loss"] > 0.1
  assert_same(ours, expected_gradient)


@pytest.mark.slow
def test_the_two_modes_differ_for_unequal_microbatches():
  (whole, whole_gradient), (means, means_gradient) = four_rows(4, True), four_rows(4, False)
  assert abs(whole["learning/loss"] - means["learning/loss"]) > 1e-3
  assert means["learning/moe_lb_loss"] == pytest.approx(whole["learning/moe_lb_loss"], rel=1e-5)
  name = ("token_embedder", "embedding")
  assert np.abs(whole_gradient[name] - means_gradient[name]).max() > 1e-3
