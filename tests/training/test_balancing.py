"""Loss-free balancing, against a model of the router in numpy and by its effect."""

import numpy as np
import pytest
from router_model import balanced, chosen_experts

from maxtext_ling2.model.layer_layout import layer_names
from maxtext_ling2.training.balancing import load_metrics, updated_bias
from tiny import Run, batch, config, weights


def numpy_update(bias, counts, rate, zero_mean):
  bias = bias + np.float32(rate) * np.sign(counts.mean(-1, keepdims=True) - counts).astype(np.float32)
  return bias - bias.mean(-1, keepdims=True, dtype=np.float32) if zero_mean else bias


@pytest.mark.parametrize("zero_mean", [False, True])
def test_update_rule(zero_mean):
  rng = np.random.default_rng(0)
  bias = rng.standard_normal((3, 8)).astype(np.float32)
  for _ in range(20):
    counts = rng.integers(0, 100, (3, 8)).astype(np.int32)
    ours = np.asarray(updated_bias(bias, counts, 0.01, zero_mean))
    # Equal but for the order in which the mean is summed: two roundings of values up to 3.
    np.testing.assert_allclose(ours, numpy_update(bias, counts, 0.01, zero_mean), rtol=0, atol=5e-7)
    bias = ours
  if zero_mean:
    np.testing.assert_allclose(bias.mean(-1), 0, atol=1e-6)


def test_update_is_exact_for_large_counts():
  counts = np.array([10_000_001, 10_000_000, 10_000_000, 9_999_999], np.int32)
  np.testing.assert_array_equal(np.asarray(updated_bias(np.zeros(4, np.float32), counts, 1.0, False)), [-1, 0, 0, 1])


@pytest.mark.parametrize("experts", [8, 256])
@pytest.mark.parametrize("tokens", [2**20, 70_000_000, 2**30])
def test_update_is_exact_for_any_batch(tokens, experts):
  """Against numpy's int64; 8 experts per token, also all tokens on the same ones, and loads that differ by one."""
  rng = np.random.default_rng(0)
  mean = tokens * 8 // experts
  crowded = np.zeros(experts, np.int64)
  crowded[:8] = tokens
  uneven = np.full(experts, mean)
  uneven[:2] += [1, -1]
  five = np.full(experts, (tokens * 8 - min(5 * mean, tokens)) // (experts - 1))
  five[0] = min(5 * mean, tokens)
  for counts in (crowded, uneven, five, rng.multinomial(min(tokens * 8, 2**31 - 1), np.ones(experts) / experts)):
    expected = np.sign(counts.sum() - counts * experts)
    found = updated_bias(np.zeros(experts, np.float32), counts.astype(np.int32), 1.0, False)
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_load_metrics():
  metrics = load_metrics(np.array([[4, 0, 0, 4], [2, 2, 2, 2]], np.int32))
  np.testing.assert_allclose(metrics["max_over_mean_load"], [2.0, 1.0])
  np.testing.assert_allclose(metrics["dead_expert_fraction"], [0.5, 0.0])


@pytest.fixture(scope="module")
def counted():
  """A run of 2 microbatches whose step also returns the counts, by layer."""
  from maxtext_ling2.training import step as step_module

  seen = {}
  original = step_module._router_metrics

  def keep(state, routers, config):
    metrics = original(state, routers, config)
    for router in routers:
      names = layer_names(router.path, config)
      counts = router.counts.reshape(-1, router.counts.shape[-1])
      metrics |= {f"counts/{name}": row for name, row in zip(names, counts, strict=True)}
    return metrics

  step_module._router_metrics = keep
  try:
    run = Run(
      base_num_decoder_layers=6,
      inhomogeneous_layer_cycle_interval=2,
      scan_layers=True,
      gradient_accumulation_steps=2,
      opt_type="sgd",
      learning_rate=0.0,
      routed_bias_update_rate=0.05,
      log_step_diagnostics=True,
    )
    before = run.weights()
    for seed in range(3):
      metrics = run.step(batch(run.config, seed, packed=False))
      after = run.weights()
      seen[seed] = (before, metrics, after)
      before = after
  finally:
    step_module._router_metrics = original
  return run.config, seen


def biases(weights):
  return {path: value for path, value in weights.items() if path[-2:] == ("gate", "bias")}


def name_of(path):
  return path[1] if path[0] == "mtp_block" else f"layer_{int(path[1].removeprefix('layers_')):03d}"


def test_counts_are_those_of_the_whole_global_batch(counted):
  config, seen = counted
  tokens = config.global_batch_size_to_train_on * config.max_target_length
  for _, metrics, _ in seen.values():
    counts = {name: value for name, value in metrics.items() if name.startswith("counts/")}
    assert len(counts) == 5 + 1  # all layers but the dense one, and MTP
    for value in counts.values():
      assert value.sum() == tokens * config.num_experts_per_tok


def test_every_bias_moves_by_its_own_counts(counted):
  config, seen = counted
  for before, metrics, after in seen.values():
    assert len(biases(before)) == 5 + 1
    for path, bias in biases(before).items():
      expected = numpy_update(bias, metrics[f"counts/{name_of(path)}"], 0.05, True)
      np.testing.assert_allclose(after[path], expected, rtol=0, atol=2e-7, err_msg=".".join(path))
      assert metrics[f"learning/moe/bias_norm/{name_of(path)}"] == pytest.approx(np.linalg.norm(after[path]), rel=1e-5)


def test_step_diagnostics_tell_of_the_biases(counted):
  """MaxText's log_step_diagnostics: the sum of all biases after the step, and how many of them moved."""
  _, seen = counted
  for before, metrics, after in seen.values():
    old, new = biases(before), biases(after)
    checksum = sum(value.sum(dtype=np.float64) for value in new.values())
    assert metrics["diag/moe_bias_checksum"] == pytest.approx(checksum, abs=1e-4)
    moved = sum((old[path] != new[path]).sum() for path in new)
    assert metrics["diag/moe_bias_update_nonzero"] == moved > 0
    assert metrics["diag/max_abs_grad"] > 0


def test_nothing_else_moves_at_learning_rate_zero(counted):
  _, seen = counted
  before, _, after = seen[0]
  for path, value in before.items():
    if path[-2:] != ("gate", "bias"):
      np.testing.assert_array_equal(after[path], value)


SMALL = {"base_num_decoder_layers": 2, "mtp_num_layers": 0}

# The first of two layers has experts, and attention and embedding stand still: its router sees the same tokens each step.
STEPS, RATE = 20, 2.0**-6
ALONE = {"base_num_decoder_layers": 2, "mtp_num_layers": 0, "first_num_dense_layers": 0, "learning_rate": 0.0}


@pytest.mark.parametrize("sparse", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("zero_mean", [pytest.param(False, marks=pytest.mark.slow), True])
def test_twenty_steps_equal_a_router_in_numpy(sparse, zero_mean):
  """Biases start at 0 and move by powers of two, so float32 adds them exactly; router logits are the model's."""
  settings = {
    "routed_bias_update_rate": RATE,
    "routed_bias_zero_mean_update": zero_mean,
    "sparse_matmul": sparse,
    **ALONE,
  }
  start = with_biases(config(**ALONE), lambda bias: np.zeros_like(bias))
  run = Run(start, opt_type="sgd", gradient_accumulation_steps=2, per_device_batch_size=2, **settings)
  data = batch(run.config, packed=False)
  logits = router_logits(run, data)
  path = ("decoder", "layers_0", "moe", "MoeBlock_0", "gate", "bias")
  c = run.config
  expected = run.weights()[path]
  for step in range(STEPS):
    experts = chosen_experts(logits, expected, c.n_routing_groups, c.topk_routing_group, c.num_experts_per_tok)
    expected = balanced(expected, np.bincount(experts.ravel(), minlength=c.num_experts), RATE, zero_mean)
    run.step(data)
    np.testing.assert_array_equal(run.weights()[path], expected, err_msg=f"step {step}")


def with_biases(cfg, change):
  """The tiny weights, with `change(bias)` in place of every router bias."""
  return {path: change(value) if path[-2:] == ("gate", "bias") else value for path, value in weights(cfg).items()}


def router_logits(run, data):
  """Logits [B * T, E] of the first layer's router, float32."""
  import jax

  from maxtext_ling2.model.moe import Router

  seen = []
  original = Router.logits

  def keep(self, x):
    logits = original(self, x)
    jax.debug.callback(lambda value: seen.append(np.array(value)), logits, ordered=True)
    return logits

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Router, "logits", keep)
    run.forward(data)
  return seen[0].reshape(-1, run.config.num_experts)


@pytest.mark.slow
def test_imbalance_falls():
  run = Run(opt_type="sgd", learning_rate=0.0, routed_bias_update_rate=0.05, **SMALL)
  data = batch(run.config, packed=False)
  loads = [np.mean([v for k, v in run.step(data).items() if "max_over_mean_load" in k]) for _ in range(25)]
  assert loads[-1] < 0.75 * loads[0]


@pytest.mark.slow
def test_imbalance_of_a_skewed_router_falls():
  """All routers start with one expert far ahead of the others."""
  skewed = with_biases(config(**SMALL), lambda bias: np.arange(bias.size, dtype=np.float32) * 0.2)
  run = Run(skewed, opt_type="sgd", learning_rate=0.0, routed_bias_update_rate=0.05, **SMALL)
  data = batch(run.config, packed=False)
  loads = [run.step(data)["learning/moe/max_over_mean_load/layer_001"] for _ in range(60)]
  assert loads[0] > 3.0  # of 4 at most: 8 experts, 2 a token
  assert loads[-1] < 1.6


def test_evaluation_leaves_biases_alone():
  run = Run(**SMALL)
  before = run.weights()
  run.evaluate(batch(run.config))
  after = run.weights()
  for path in before:
    np.testing.assert_array_equal(before[path], after[path])


@pytest.mark.slow
def test_rate_zero_leaves_biases_alone_but_counts():
  run = Run(routed_bias_update_rate=0.0, **SMALL)
  before = biases(run.weights())
  metrics = run.step(batch(run.config))
  assert metrics["learning/moe/max_over_mean_load/layer_001"] > 1.0
  for path, value in biases(run.weights()).items():
    np.testing.assert_array_equal(before[path], value)


def test_task_gradient_of_a_trainable_bias_is_zero():
  """The bias only selects experts, so nothing flows back to it, with a z-loss too."""
  from flax import nnx

  run = Run(
    enable_routed_bias_grad=True, opt_type="sgd", learning_rate=1e3, routed_bias_update_rate=0.0, moe_z_loss_weight=1.0,
    gradient_clipping_threshold=0.0, **SMALL,
  )  # fmt: skip
  assert isinstance(nnx.merge(run.graph, run.state).model.decoder.layers_1.moe.MoeBlock_0.gate.bias, nnx.Param)
  before = run.weights()
  run.step(batch(run.config))
  after = run.weights()
  for path, value in before.items():
    if path[-2:] == ("gate", "bias"):
      np.testing.assert_array_equal(after[path], value)
    elif path[-2:] == ("gate", "kernel"):
      assert np.abs(after[path] - value).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_trainable_bias(scan):
  """enable_routed_bias_grad: a parameter with optimizer state; its task gradient is zero, so only balancing moves it."""
  from flax import nnx

  layers = 6 if scan else 3  # the first cycle has the dense layer and is not scanned
  settings = {"base_num_decoder_layers": layers, "mtp_num_layers": 0, "scan_layers": scan, "learning_rate": 0.1}
  fixed, trained = (Run(enable_routed_bias_grad=grad, adam_weight_decay=0.0, **settings) for grad in (False, True))
  slots = {path for path in fixed.flat("optimizer") if "bias" in path}
  assert not slots
  assert any("bias" in path for path in trained.flat("optimizer"))
  assert isinstance(nnx.merge(trained.graph, trained.state).model.decoder.layers_1.moe.MoeBlock_0.gate.bias, nnx.Param)
  data = batch(fixed.config)
  fixed.step(data), trained.step(data)
  ours, theirs = biases(fixed.weights()), biases(trained.weights())
  assert ours
  for path, value in ours.items():
    np.testing.assert_allclose(theirs[path], value, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_dense_and_sparse_matmul_agree():
  runs = [Run(sparse_matmul=sparse, opt_type="sgd", **SMALL) for sparse in (False, True)]
  dense, sparse = (run.step(batch(run.config)) for run in runs)
  for name, value in dense.items():
    np.testing.assert_allclose(sparse[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
