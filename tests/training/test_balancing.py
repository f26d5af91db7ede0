"""Loss-free balancing, against a model of the router in numpy and by its effect."""

import numpy as np
import pytest

from maxtext_ling2.training.balancing import load_metrics, updated_bias
from tiny import Run, batch


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
      names = step_module.layer_names(router.path, config)
      counts = router.counts.reshape(-1, router.counts.shape[-1])
      metrics |= {f"counts/{name}": row for name, row in zip(names, counts, strict=True)}
    return metrics

  step_module._router_metrics = keep
  try:
    run = Run(
      scan_layers=True, gradient_accumulation_steps=2, opt_type="sgd", learning_rate=0.0, routed_bias_update_rate=0.05
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
    assert len(counts) == 8 + 1  # all layers but the dense one, and MTP
    for value in counts.values():
      assert value.sum() == tokens * config.num_experts_per_tok


def test_every_bias_moves_by_its_own_counts(counted):
  config, seen = counted
  for before, metrics, after in seen.values():
    assert len(biases(before)) == 9
    for path, bias in biases(before).items():
      expected = numpy_update(bias, metrics[f"counts/{name_of(path)}"], 0.05, True)
      np.testing.assert_allclose(after[path], expected, rtol=0, atol=2e-7, err_msg=".".join(path))
      assert metrics[f"learning/moe/bias_norm/{name_of(path)}"] == pytest.approx(np.linalg.norm(after[path]), rel=1e-5)


def test_nothing_else_moves_at_learning_rate_zero(counted):
  _, seen = counted
  before, _, after = seen[0]
  for path, value in before.items():
    if path[-2:] != ("gate", "bias"):
      np.testing.assert_array_equal(after[path], value)


SMALL = {"base_num_decoder_layers": 3, "mtp_num_layers": 0}


def test_imbalance_falls():
  run = Run(opt_type="sgd", learning_rate=0.0, routed_bias_update_rate=0.05, **SMALL)
  data = batch(run.config, packed=False)
  loads = [np.mean([v for k, v in run.step(data).items() if "max_over_mean_load" in k]) for _ in range(25)]
  assert loads[-1] < 0.75 * loads[0]


def test_evaluation_leaves_biases_alone():
  run = Run(**SMALL)
  before = run.weights()
  run.evaluate(batch(run.config))
  after = run.weights()
  for path in before:
    np.testing.assert_array_equal(before[path], after[path])


def test_rate_zero_leaves_biases_alone_but_counts():
  run = Run(routed_bias_update_rate=0.0, **SMALL)
  before = biases(run.weights())
  metrics = run.step(batch(run.config))
  assert metrics["learning/moe/max_over_mean_load/layer_001"] > 1.0
  for path, value in biases(run.weights()).items():
    np.testing.assert_array_equal(before[path], value)


@pytest.mark.parametrize("scan", [False, True])
def test_trainable_bias(scan):
  """enable_routed_bias_grad: a parameter with optimizer state; its task gradient is zero, so only balancing moves it."""
  from flax import nnx

  settings = {"base_num_decoder_layers": 6, "mtp_num_layers": 0, "scan_layers": scan, "learning_rate": 0.1}
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


def test_dense_and_sparse_matmul_agree():
  runs = [Run(sparse_matmul=sparse, opt_type="sgd", **SMALL) for sparse in (False, True)]
  dense, sparse = (run.step(batch(run.config)) for run in runs)
  for name, value in dense.items():
    np.testing.assert_allclose(sparse[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
