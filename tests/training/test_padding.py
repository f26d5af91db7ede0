"""Padding takes no part in what is counted or averaged over tokens: loads, router biases, z-loss, load-balance loss."""

import numpy as np
import pytest
from router_model import balanced, chosen_experts
from test_balancing import router_logits

from tiny import Run, batch

ONE_ROUTER = {"base_num_decoder_layers": 2, "mtp_num_layers": 0, "opt_type": "sgd", "learning_rate": 0.0}
ONE_ROUTER |= {"moe_z_loss_weight": 1e-2, "load_balance_loss_weight": 1e-2, "routed_bias_update_rate": 0.05}
BIAS = ("decoder", "layers_1", "moe", "MoeBlock_0", "gate", "bias")


def padded(config, seed=0):
  """Rows of one document each, of 24, 15, 6 and 0 tokens, and padding."""
  data = batch(config, seed, packed=False)
  index = np.arange(config.max_target_length)
  real = index < np.array([24, 15, 6, 0])[:, None]
  for side in ("inputs", "targets"):
    data[f"{side}_segmentation"] = real.astype(np.int32)
    data[f"{side}_position"] = np.where(real, index, 0).astype(np.int32)
    data[side] = np.where(real, data[side], 0)
  return data, real


def softmax(x):
  powers = np.exp(x - x.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def rows_mean(x, real):
  """Mean [B, E] of x [B, T, E] over each row's tokens, 0 for an empty row."""
  return (x * real[..., None]).sum(1) / np.maximum(real.sum(1), 1)[:, None]


@pytest.mark.parametrize(
  ("megatron", "sparse"),
  [(False, True), (True, False), *(pytest.param(both, both, marks=pytest.mark.slow) for both in (False, True))],
)
def test_closed_form(sparse, megatron):
  run = Run(sparse_matmul=sparse, moe_use_megatron_seq_aux_loss=megatron, **ONE_ROUTER)
  c = run.config
  data, real = padded(c)
  bias = run.weights()[BIAS]
  logits = router_logits(run, data).reshape(*real.shape, c.num_experts).astype(np.float64)
  metrics = run.step(data)

  experts = chosen_experts(
    logits.reshape(-1, c.num_experts).astype(np.float32), bias, c.n_routing_groups, c.topk_routing_group,
    c.num_experts_per_tok,
  ).reshape(*real.shape, -1)  # fmt: skip
  counts = np.bincount(experts[real].ravel(), minlength=c.num_experts)
  assert counts.sum() == real.sum() * c.num_experts_per_tok
  np.testing.assert_allclose(
    run.weights()[BIAS], balanced(bias, counts, np.float32(0.05), c.routed_bias_zero_mean_update), rtol=0, atol=5e-7
  )
  assert metrics["learning/moe/max_over_mean_load/layer_001"] == pytest.approx(counts.max() / counts.mean(), rel=1e-6)

  log_z = np.log(np.exp(logits).sum(-1))
  assert metrics["learning/moe_z_loss"] == pytest.approx((log_z[real] ** 2).mean(), rel=1e-5)

  scores = 1 / (1 + np.exp(-logits))
  if megatron:
    experts = np.argsort(-scores, axis=-1, kind="stable")[..., : c.num_experts_per_tok]
    probabilities = scores / scores.sum(-1, keepdims=True)
  else:
    probabilities = softmax(scores)
  choices = np.eye(c.num_experts)[experts].sum(2)
  share, mean = rows_mean(choices, real) / c.num_experts_per_tok, rows_mean(probabilities, real)
  expected = 1e-2 * c.num_experts**2 * (share * mean).mean()
  assert metrics["learning/moe_lb_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  "layers",
  [{"mtp_num_layers": 1}, pytest.param({"base_num_decoder_layers": 6, "scan_layers": True}, marks=pytest.mark.slow)],
  ids=str,
)
def test_what_padding_holds_changes_nothing(layers):
  run = Run(**ONE_ROUTER | {"learning_rate": 1.0, "gradient_clipping_threshold": 0.0} | layers)
  data, real = padded(run.config)
  before = run.state
  expected, weights = run.step(data), run.weights()
  run.state = before
  other = {**data, "inputs": np.where(real, data["inputs"], 7), "targets": np.where(real, data["targets"], 11)}
  metrics = run.step(other)
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
  for path, value in run.weights().items():
    np.testing.assert_allclose(value, weights[path], rtol=1e-6, atol=1e-6 * np.abs(value).max(), err_msg=str(path))


@pytest.mark.slow
def test_rows_of_padding_count_as_nothing():
  """Two full rows beside two empty ones: as the two alone; the load-balance loss is the mean over all four."""
  full, half = Run(**ONE_ROUTER), Run(**ONE_ROUTER, per_device_batch_size=2)
  data = batch(full.config, packed=False)
  for name in ("inputs_segmentation", "targets_segmentation"):
    data[name][2:] = 0
  ours, expected = full.step(data), half.step({name: value[:2] for name, value in data.items()})
  assert expected["learning/moe_lb_loss"] > 0
  for name, value in expected.items():
    if "moe" in name:
      factor = 0.5 if name == "learning/moe_lb_loss" else 1.0
      np.testing.assert_allclose(ours[name], factor * value, rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(full.weights()[BIAS], half.weights()[BIAS], rtol=0, atol=5e-7)
