"""Scanned layers compute what unscanned layers compute, with the same weights: through MaxText's own train step."""

import itertools

import numpy as np
import pytest

from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model.layer_layout import ScanLayout, is_dense, is_mla
from tiny import Run, batch, config, model

SETTINGS = {"opt_type": "sgd", "gradient_clipping_threshold": 0.0, "moe_z_loss_weight": 1e-2}
SETTINGS |= {"load_balance_loss_weight": 1e-2, "record_internal_nn_metrics": 1}


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_three_steps_scanned_equal_unscanned(steps):
  """Two layers before the loop, two cycles in it, and MTP's layer."""
  layers = {"base_num_decoder_layers": 6, "inhomogeneous_layer_cycle_interval": 2}
  settings = {"gradient_accumulation_steps": steps, **layers, **SETTINGS}
  runs = [Run(scan_layers=scan, **settings) for scan in (False, True)]
  for seed in range(3):
    unscanned, scanned = (run.step(batch(run.config, seed)) for run in runs)
    assert set(unscanned) == set(scanned)
    for name, value in unscanned.items():
      exact = "load" in name or "dead" in name or name.endswith("total_weights")
      np.testing.assert_allclose(scanned[name], value, rtol=1e-7 if exact else 1e-4, atol=1e-6, err_msg=name)
  unscanned, scanned = (run.weights() for run in runs)
  assert set(unscanned) == set(scanned)
  for path, value in unscanned.items():
    np.testing.assert_allclose(scanned[path], value, rtol=1e-5, atol=1e-5, err_msg=".".join(path))


def logits_of(settings, data):
  import jax
  from flax import nnx

  cfg = config(**settings)
  network, mesh = model(cfg)
  graph, state = nnx.split(network)

  def run(state):
    return nnx.merge(graph, state, copy=True)(
      data["inputs"], data["inputs_position"], data["inputs_segmentation"], enable_dropout=False
    )

  with session.model_context(cfg, mesh):
    return np.asarray(jax.jit(run)(state))


@pytest.mark.parametrize(
  ("layers", "cycle", "dense"),
  [
    pytest.param(8, 3, 4, id="dense layers in two cycles", marks=pytest.mark.slow),
    pytest.param(7, 2, 0, id="trailing layer", marks=pytest.mark.slow),
    pytest.param(4, 1, 1, id="cycle of one", marks=pytest.mark.slow),
    pytest.param(3, 5, 1, id="fewer layers than a cycle", marks=pytest.mark.slow),
    pytest.param(2, 2, 2, id="all dense", marks=pytest.mark.slow),
  ],
)
def test_layouts(layers, cycle, dense):
  settings = {
    "base_num_decoder_layers": layers,
    "inhomogeneous_layer_cycle_interval": cycle,
    "first_num_dense_layers": dense,
    "mtp_num_layers": 0,
  }
  data = batch(config(**settings))
  unscanned, scanned = (logits_of({**settings, "scan_layers": scan}, data) for scan in (False, True))
  real = data["inputs_segmentation"] > 0
  np.testing.assert_allclose(scanned[real], unscanned[real], rtol=1e-5, atol=1e-4)


def test_layout_covers_every_layer_once():
  for cycle, dense in itertools.product((1, 2, 3, 5, 8), (0, 1, 2, 6)):
    for num_layers in range(max(2, dense), 22):
      case = f"{num_layers=} {cycle=} {dense=}"
      layout = ScanLayout.of(num_layers, cycle, dense)
      before, after = layout.unscanned
      scanned = [i for i in range(num_layers) if layout.locate(i) is not None]
      assert sorted([*before, *scanned, *after]) == list(range(num_layers)), case
      for layer in scanned:
        assert not is_dense(layer, dense), case
        assert is_mla(layer, num_layers, cycle) == (layout.locate(layer)[1] == cycle - 1), case
      assert all(is_mla(layer, num_layers, cycle) for layer in after), case


REMAT = {"base_num_decoder_layers": 6, "mtp_num_layers": 0, "scan_layers": True, **SETTINGS}


@pytest.fixture(scope="module")
def without_remat():
  run = Run(remat_policy="none", **REMAT)
  return run.step(batch(run.config))


POLICIES = (
  "full", "custom", "minimal", "minimal_offloaded", "minimal_with_context", "minimal_with_quantization",
  "minimal_with_context_and_quantization",
  "save_dot_except_mlp", "save_dot_with_context_except_mlp",
  "save_dot_except_mlpwi", "save_qkv_proj", "save_out_proj", "qkv_proj_offloaded",
)  # fmt: skip


@pytest.mark.slow  # tests/model/oracle_suite.py has recorded gradients of rematerialised layers
@pytest.mark.parametrize("policy", POLICIES)
def test_remat_changes_no_number(policy, without_remat):
  saved = {"query_proj": "device", "out_proj": "device"} if policy == "custom" else {}
  run = Run(remat_policy=policy, **REMAT, **saved)
  metrics = run.step(batch(run.config))
  for name, value in without_remat.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  ("policy", "names"),
  [
    ("save_qkv_proj", {"query_proj", "key_proj", "value_proj"}),
    ("save_out_proj", {"out_proj"}),
    ("minimal_with_context", {"query_proj", "key_proj", "value_proj", "context", "out_proj"}),
  ],
)
def test_policies_know_the_tensors_of_linear_attention(policy, names):
  """What a GLA layer names is saved by MaxText's policy, and `full` saves none of it."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from jax.ad_checkpoint import checkpoint_name

  cfg = config(remat_policy=policy, **{key: value for key, value in REMAT.items() if key != "scan_layers"})
  network, mesh = model(cfg)
  layer, positions = network.decoder.layers_1.self_attention, jnp.arange(8)[None]
  graph, state = nnx.split(layer)

  def apply(state, x):
    return nnx.merge(graph, state, copy=True)(x, None, positions, 1)

  with session.model_context(cfg, mesh):
    jaxpr = str(jax.make_jaxpr(apply)(state, jnp.ones((1, 8, 32))))
  assert all(f"name={name}" in jaxpr for name in names)
  policy = network.decoder.get_remat_policy()

  def saved(name):
    (equation,) = jax.make_jaxpr(lambda x: checkpoint_name(x, name))(1.0).eqns
    return bool(policy(equation.primitive, *(v.aval for v in equation.invars), **equation.params))

  assert all(saved(name) for name in names) and not saved("some_other_name")


def test_unscanned_layers_of_a_scanned_model_stay_rematerialised():
  """XLA may not merge their second forward pass with the first; in the bodies of the two loops it cannot anyway."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  cfg = config(remat_policy="full", **REMAT | {"base_num_decoder_layers": 11})
  network, mesh = model(cfg)
  graph, state = nnx.split(network)
  ids = jnp.ones((4, 24), jnp.int32)

  def loss(state):
    return nnx.merge(graph, state, copy=True)(ids, ids, ids, enable_dropout=False).sum()

  def found(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name in ("checkpoint", "remat2", "remat"):
        yield equation.params["prevent_cse"]
      for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
          yield from found(inner)

  with session.model_context(cfg, mesh):
    prevented = list(found(jax.make_jaxpr(loss)(state).jaxpr))
  unscanned = sum(map(len, network.decoder.scan_layout.unscanned))
  assert unscanned == 5  # the dense one's cycle before the loop, two MLA layers behind it
  assert sorted(prevented) == [False, False] + [True] * unscanned
