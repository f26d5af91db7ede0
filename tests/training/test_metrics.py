"""Metrics of a step beyond MaxText's: the gradient's zeros, what is not finite, routers against numpy, MFU.

test_scan.py compares all of them between scanned and unscanned layers.
"""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from router_model import chosen_experts
from test_balancing import biases, name_of

from maxtext_ling2.training import metrics as step_metrics
from maxtext_ling2.training.statistics import RouterStatistics
from tiny import Run, batch, config

NAMES = Path(__file__).parents[2] / "docs" / "names.md"
SETTINGS = {"base_num_decoder_layers": 2, "record_internal_nn_metrics": 2, "log_step_diagnostics": True}
SETTINGS |= {"per_device_batch_size": 2, "gradient_accumulation_steps": 2, "moe_z_loss_weight": 1e-2}
MEANS = ("router_bias_mean", "router_bias_std", "router_topk_weight_mean", "router_probs_std")


def router_inputs(run, data):
  """{layer: input [B, T, C] of its router}, of a forward pass outside of the step."""
  import jax

  from maxtext_ling2.model.moe import Router

  seen = []
  original = Router.logits

  def keep(self, x):
    jax.debug.callback(lambda value: seen.append(np.asarray(value, np.float64)), x, ordered=True)
    return original(self, x)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Router, "logits", keep)
    run.forward(data)
  return dict(zip(sorted(map(name_of, biases(run.weights()))), seen, strict=True))  # decoder layers, then MTP


@pytest.fixture(scope="module")
def stepped():
  """One step on packed rows with padding: run, data, inputs of the routers, weights before, metrics, state before."""
  run = Run(**SETTINGS)
  data = batch(run.config)
  assert 0 < (data["inputs_segmentation"] == 0).sum() < data["inputs"].size / 2
  inputs, before, state = router_inputs(run, data), run.weights(), run.state
  return SimpleNamespace(run=run, data=data, inputs=inputs, before=before, metrics=run.step(data), state=state)


def test_routers_equal_numpy(stepped):
  """Every value from the router's own input and weights; float32 has 24 bits, and each value is a mean of many."""
  c, metrics = stepped.run.config, stepped.metrics
  real = stepped.data["inputs_segmentation"] != 0
  after = stepped.run.weights()
  found = {kind: [] for kind in MEANS}
  for path, bias in biases(stepped.before).items():
    name = name_of(path)
    logits = stepped.inputs[name][real] @ stepped.before[(*path[:-1], "kernel")].astype(np.float64)
    scores = 1 / (1 + np.exp(-logits))
    experts = chosen_experts(logits, bias, c.n_routing_groups, c.topk_routing_group, c.num_experts_per_tok)
    moved = after[path].astype(np.float64)
    expected = {
      "router_bias_mean": moved.mean(),
      "router_bias_std": moved.std(),
      "router_topk_weight_mean": np.take_along_axis(scores, experts, -1).mean(),
      "router_probs_std": scores.std(-1).mean(),
    }
    for kind, value in expected.items():
      assert metrics[f"learning/moe/{kind}/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-7), (kind, name)
      found[kind].append(value)
    counts = np.bincount(experts.ravel(), minlength=c.num_experts)
    for index, number in enumerate(counts):
      assert metrics[f"learning/moe/expert_counts/{name}/expert_{index:03d}"] == number, name
  assert len(found["router_probs_std"]) == 2  # one layer with experts, and MTP's
  for kind, values in found.items():
    assert metrics[f"learning/{kind}"] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-7), kind


def test_zeros_in_the_gradient_are_those_of_adams_mean(stepped):
  """After the first step Adam's mean of a gradient is 0 where that is."""
  slots = {path: value for path, value in stepped.run.flat("optimizer").items() if "mu" in path}
  assert sum(value.size for value in slots.values()) == sum(
    value.size for path, value in stepped.before.items() if path not in biases(stepped.before)
  )
  zeros = sum(int((value == 0).sum()) for value in slots.values())
  unused = stepped.run.config.vocab_size - len(np.unique(stepped.data["inputs"]))
  assert stepped.metrics["learning/num_zeros_in_grad"] == zeros >= unused * stepped.run.config.emb_dim
  assert stepped.metrics["learning/is_nan"] == stepped.metrics["learning/is_inf"] == 0


@pytest.mark.parametrize(("shape", "relative"), [((7, 11), 0), ((), 0), ((2**18 + 1, 2**15 - 1), 2**-24)])
def test_zeros_of_more_elements_than_int32_counts(shape, relative):
  """A broadcast number is not made in memory."""
  import jax
  import jax.numpy as jnp

  size = int(np.prod(shape, dtype=object))
  count = jax.jit(lambda x: step_metrics.zeros_in({"a": jnp.broadcast_to(x, shape), "b": jnp.array([0.0, 1.0, -0.0])}))
  assert abs(float(count(jnp.bfloat16(0))) - (size + 2)) <= relative * size
  assert count(jnp.bfloat16(1)) == 2


def scaled(state, factors):
  """The state with each weight of the model at a path of `factors` times its factor."""
  from flax import nnx

  flat = dict(nnx.to_flat_state(state))
  for path, factor in factors.items():
    flat["model", *path] = flat["model", *path].replace(flat["model", *path].get_value() * factor)
  return nnx.from_flat_state(list(flat.items()))


HEAD, NORM = ("decoder", "logits_dense", "kernel"), ("decoder", "decoder_norm", "scale")
MTP_NORM = ("mtp_block", "mtp_layer_1", "mtp_1_final_norm", "scale")


@pytest.mark.parametrize(
  ("factors", "nan", "inf"),
  [
    # Logits stay as they are; gradients of the norms' scales are of some 1e25 and their squares infinite.
    ({HEAD: 1e25, NORM: 1e-25, MTP_NORM: 1e-25}, 0, 1),
    ({NORM: np.nan}, 1, 0),
  ],
  ids=["inf", "nan"],
)
def test_what_is_not_finite(stepped, factors, nan, inf):
  run, after = stepped.run, stepped.run.state
  run.state = scaled(stepped.state, factors)
  try:
    metrics = run.step(stepped.data)
  finally:
    run.state = after
  assert (metrics["learning/is_nan"], metrics["learning/is_inf"]) == (nan, inf)
  assert np.isfinite(metrics["learning/loss"]) == (not nan)


def test_without_the_norm_the_loss_alone_tells():
  for loss, nan, inf in ((1.0, 0, 0), (np.nan, 1, 0), (np.inf, 0, 1), (-np.inf, 0, 1)):
    found = step_metrics.not_finite({"learning/loss": np.float32(loss)})
    assert (found["learning/is_nan"], found["learning/is_inf"]) == (nan, inf)


@pytest.mark.parametrize(("level", "extra"), [(0, set()), (1, set()), (2, {f"expert_{index:03d}" for index in range(4)})])
def test_what_is_not_asked_for_is_not_there(level, extra):
  path = ("model", "decoder", "layers_1", "moe", "MoeBlock_0", "gate")
  router = RouterStatistics(path, np.arange(4, dtype=np.int32), None, None)
  cfg = SimpleNamespace(record_internal_nn_metrics=level)
  found = step_metrics.of_routers([router], [None], cfg)
  load = {f"learning/moe/{kind}/layer_001" for kind in ("max_over_mean_load", "dead_expert_fraction")}
  assert set(found) == load | {f"learning/moe/expert_counts/layer_001/{name}" for name in extra}


def test_the_page_lists_every_metric_of_a_step(stepped):
  rows = re.findall(r"^\| `([^`]+)` \|", NAMES.read_text().partition("## Metrics")[2], re.MULTILINE)
  forms = [re.escape(row).replace("NNN", r"\d{3}").replace("EEE", r"\d{3}").replace("LAYER", r"\w+") for row in rows]
  ours = [name for name in stepped.metrics if not name.startswith(("activ_", "diag/"))]
  stock = {"learning/z_loss", "learning/indexer_loss", "learning/perplexity", "learning/total_weights"}
  missing = [name for name in ours if name not in stock and not any(re.fullmatch(form, name) for form in forms)]
  assert not missing


@functools.cache
def quiet():
  return config(enable_tensorboard=False)


def logged(monkeypatch, kind, decoder_block="ling2", rampup_end_step=0):
  """What MaxText's logger says at the start, and the scalars it records of a step of 0.5 s, on a device of that kind."""
  import jax
  from maxtext.common import metric_logger
  from maxtext.utils import max_logging

  said, scalars = [], {}
  monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(device_kind=kind)])
  monkeypatch.setattr(max_logging, "log", said.append)
  logger = object.__new__(metric_logger.MetricLogger)
  logger.config = quiet()
  logger.metadata, logger.performance_metric_queue = {}, None
  logger.learning_rate_schedule = lambda step: 0.1
  logger.write_setup_info_to_tensorboard({"weight": np.zeros(3)})
  logger.config = SimpleNamespace(decoder_block=decoder_block, rampup_end_step=rampup_end_step)
  logger.record_train_metrics({"scalar": scalars}, 0, 0.5)
  return said, scalars


@pytest.mark.parametrize(("kind", "peak"), [("TPU v5p", 459), ("TPU v5", 459), ("TPU v5 lite", 197), ("TPU7x", 1153.5)])
def test_share_of_the_peak(monkeypatch, kind, peak):
  said, scalars = logged(monkeypatch, kind)
  share = scalars["perf/per_device_tflops"] / 0.5 / peak
  assert share > 0
  assert scalars["perf/mfu"] == pytest.approx(share, rel=1e-12)
  assert said[-1] == f"LING2: perf/mfu is the share of {peak:g} TFLOP/s, a device's bfloat16 peak"


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3"])
def test_no_share_of_a_peak_that_is_not_known(monkeypatch, kind):
  said, scalars = logged(monkeypatch, kind)
  assert scalars["perf/per_device_tflops_per_sec"] > 0
  assert "perf/mfu" not in scalars and "perf/mfu" not in "".join(said)


@pytest.mark.parametrize("other", [{"decoder_block": "llama2"}, {"rampup_end_step": 1}], ids=str)
def test_no_share_of_another_model_or_while_the_batch_grows(monkeypatch, other):
  assert "perf/mfu" not in logged(monkeypatch, "TPU v5p", **other)[1]


@pytest.mark.slow
@pytest.mark.mesh
def test_eight_devices_tell_what_one_tells(tmp_path):
  from mesh_runs import DEVICES, ROWS, run

  common = {"base_num_decoder_layers": 5, "base_num_query_heads": 8, "base_num_kv_heads": 8, "opt_type": "sgd"}
  common |= {"record_internal_nn_metrics": 2, "log_step_diagnostics": True, "gradient_clipping_threshold": 0.0}
  common |= {"sparse_matmul": False, "scan_layers": True, "inhomogeneous_layer_cycle_interval": 2}
  axes = {"ici_context_parallelism": 2, "ici_tensor_parallelism": 2, "ici_expert_parallelism": 2}
  many = {**common, **axes, "ici_fsdp_parallelism": 1, "context_parallel_load_balance": False}
  (expected,) = run(tmp_path, 1, [("train", common | {"per_device_batch_size": ROWS})])
  (ours,) = run(tmp_path, DEVICES, [("train", many | {"per_device_batch_size": ROWS / DEVICES})])
  assert set(ours) == set(expected)
  names = [name for name in expected if any(word in name for word in (*MEANS, "expert_counts"))]
  assert len(names) == 2 * (5 * 4 + 4 + 5 * 8)
  for name in names:
    np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4, atol=1e-7, err_msg=name)
