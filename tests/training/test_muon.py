"""Which matrices muon orthogonalises, and what its steps are, in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from maxtext_ling2.maxtext_api import session
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


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adam_pax", "sgd"])
def test_optimizers_learn(optimizer):
  rate = 0.3 if optimizer == "sgd" else 1e-2
  small = {"base_num_decoder_layers": 3, "mtp_num_layers": 0, "routed_bias_update_rate": 0.0}
  run = Run(opt_type=optimizer, learning_rate=rate, **small)
  data = batch(run.config)
  losses = [float(run.step(data)["learning/lm_loss"]) for _ in range(8)]
  assert np.all(np.isfinite(losses))
  assert losses[-1] < losses[0] - 0.2


SETTINGS = {"opt_type": "muon", "base_num_decoder_layers": 3, "mtp_num_layers": 0, "learning_rate": 1.0}
SETTINGS |= {"muon_weight_decay": 0.3, "adam_weight_decay": 0.2}
BETA, ADAM = 0.95, (0.9, 0.95)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Five steps multiply a rounding of float32 at most by the slope at zero, 3.4445 each.
ROUNDING = NEWTON_SCHULZ[0] ** 5 * 2.0**-24


@functools.cache
def two_steps(**settings):
  """({path: (weight, gradients of two steps, updates of two steps)}, learning rates) for gradients N(0, 1)."""
  from maxtext.utils import train_utils

  cfg = tiny.config(**SETTINGS, **settings)
  network, mesh = tiny.model(cfg)
  rng = np.random.default_rng(0)
  weights = nnx.state(network, nnx.Param)
  gradients = [jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape), w.dtype), weights) for _ in range(2)]
  with session.model_context(cfg, mesh):
    schedule, optimizer = train_utils.create_training_optimizer(cfg, network, mesh=mesh)
    state, update, updates = optimizer.init(weights), jax.jit(optimizer.update), []
    for gradient in gradients:
      moved, state = update(gradient, state, weights)
      updates.append(moved)
  flat = [dict(nnx.to_flat_state(tree)) for tree in (weights, *gradients, *updates)]
  arrays = {path: [np.asarray(tree[path].get_value(), np.float64) for tree in flat] for path in flat[0]}
  return {path: (a[0], a[1:3], a[3:]) for path, a in arrays.items()}, [float(schedule(step)) for step in range(2)]


def is_adams(path):
  return path[-1] == "scale" or path[0] == "token_embedder" or "logits_dense" in path


def matrices(path, x):
  """A weight as the matrices [n, inputs, outputs] that are orthogonalised."""
  if "query_key_value" in path:
    return np.moveaxis(x, 1, 0).reshape(3, len(x), -1)  # one for q, k and v, each over all heads
  if "self_attention" in path and path[-2] == "out":
    return x.reshape(1, -1, x.shape[-1])
  if "MoeBlock_0" in path and "gate" not in path:
    return x  # one for each expert
  return x.reshape(1, len(x), -1)


def orthogonal(x):
  x = x / np.linalg.norm(x)
  a, b, c = NEWTON_SCHULZ
  for _ in range(5):
    square = x @ x.T
    x = a * x + (b * square + c * square @ square) @ x
  return x


def directions(gradients, beta, corrected=True):
  """Nesterov momentum after each step, with the bias corrections of optax, or of SGD (without; times 1 - beta)."""
  momentum, found = 0.0, []
  for step, gradient in enumerate(gradients, start=1):
    momentum = beta * momentum + (1 - beta) * gradient
    divisors = (1 - beta ** (step + 1), 1 - beta**step) if corrected else (1, 1)
    found.append(beta * momentum / divisors[0] + (1 - beta) * gradient / divisors[1])
  return found


def of_muon(path, weight, gradients, rates, corrected=True, consistent_rms=None):
  """The updates of a weight, as `matrices`."""
  for direction, rate in zip(directions(gradients, BETA, corrected), rates, strict=True):
    inputs, outputs = matrices(path, weight).shape[1:]
    scale = max(1, outputs / inputs) ** 0.5 if consistent_rms is None else consistent_rms * max(inputs, outputs) ** 0.5
    ours = np.stack([orthogonal(matrix) for matrix in matrices(path, direction)])
    yield -rate * (scale * ours + 0.3 * matrices(path, weight)), scale


SLOW = [{"muon_type": "maxtext_muon"}, {"muon_consistent_rms": 0.2}]


@pytest.mark.parametrize("settings", [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids=str)
def test_two_steps_of_every_matrix(settings):
  found, rates = two_steps(**settings)
  paths = [path for path in found if not is_adams(path)]
  assert {len(matrices(path, found[path][0])) for path in paths} == {1, 3, 8}
  for path in paths:
    weight, gradients, updates = found[path]
    expected = of_muon(path, weight, gradients, rates, consistent_rms=settings.get("muon_consistent_rms"))
    for update, (value, scale) in zip(updates, expected, strict=True):
      np.testing.assert_allclose(matrices(path, update), value, rtol=1e-5, atol=scale * ROUNDING, err_msg=".".join(path))


def test_sgd_momentum_differs_from_the_second_step_on():
  """As docs/pretrain.md says: the first step is the same, later ones weigh the newest gradient more."""
  found, rates = two_steps()
  path = ("decoder", "layers_0", "mlp", "wi_0", "kernel")
  weight, gradients, updates = found[path]
  first, second = (value for value, _ in of_muon(path, weight, gradients, rates, corrected=False))
  np.testing.assert_allclose(matrices(path, updates[0]), first, rtol=1e-5, atol=2 * ROUNDING)
  assert np.abs(matrices(path, updates[1]) - second).max() > 0.05


def test_the_others_get_nadam_and_all_decay():
  """Embedding, head and norms; adamw_mask, which would spare norms, is refused with muon."""
  found, rates = two_steps()
  paths = list(filter(is_adams, found))
  assert len(paths) > 10
  for path in paths:
    weight, gradients, updates = found[path]
    square = 0.0
    for step, direction in enumerate(directions(gradients, ADAM[0])):
      square = ADAM[1] * square + (1 - ADAM[1]) * gradients[step] ** 2
      adam = direction / (np.sqrt(square / (1 - ADAM[1] ** (step + 1))) + 1e-8)
      expected = -rates[step] * (adam + 0.2 * weight)
      np.testing.assert_allclose(updates[step], expected, rtol=1e-4, atol=1e-5, err_msg=".".join(path))
