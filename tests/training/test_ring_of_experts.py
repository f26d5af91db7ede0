"""A ring of experts with a bounded buffer and the dropless fallback computes what one device computes.

Packed rows, MTP, z-loss, loss-free balancing. Megablox runs in Pallas' interpreter.
"""

import functools
import os
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stock_runs import arguments, weights, write_documents
from stock_runs import run as train

from maxtext_ling2.model.moe import Router
from mesh_runs import DEVICES, ROWS, run

LENGTH, EXPERTS, TOP_K, WIDTH = 24, 8, 2, 32  # of tiny.TINY
FACTOR = 1.5  # no layer of the tiny model is even enough for it: all fall back
SOME, NONE = 2.0, 3.9  # where, as drawn, some layers fall back on 4 devices, and none on 8
BUFFER = int(NONE * LENGTH * TOP_K)  # of a device that has one of 8 rows
DRAWN, CROWDED = ROUTINGS = ("drawn", "crowded")

TRAIN = {"opt_type": "sgd", "learning_rate": 1.0, "gradient_clipping_threshold": 0.0, "moe_z_loss_weight": 1e-2}
TRAIN |= {"inhomogeneous_layer_cycle_interval": 2}
LAYERS = {  # a kernel takes seconds to compile for the interpreter, and has a program in each branch and token chunk
  "unscanned": {"base_num_decoder_layers": 2, "first_num_dense_layers": 1, "remat_policy": "none"},
  "scanned": {"base_num_decoder_layers": 6, "first_num_dense_layers": 2, "scan_layers": True},
}
ROUTERS = {"unscanned": 1 + 1, "scanned": 4 + 1}  # all layers but the dense ones, and MTP
RING = {"sparse_matmul": True, "megablox": True, "use_ring_of_experts": True, "use_ragged_sort": True}
TILES = {
  f"{product}_tile_{direction}_{axis}": size
  for product in ("wi", "wo")
  for direction in ("fwd", "dlhs", "drhs")
  for axis, size in (("batch_seq", 8), ("embed_dim", WIDTH), ("mlp_dim", 8))
}  # those of the tiny products: MaxText's are computed whole, 512 x 1024 x 1024
CAPPED = RING | TILES | {"ragged_buffer_factor": FACTOR}
DROPLESS = CAPPED | {"moe_dropless_fallback": "layer"}
LOCAL_TOP_K = {"moe_topk_before_ep_all_gather": True}
EIGHT = DROPLESS | LOCAL_TOP_K | {"ragged_buffer_factor": NONE}
MESHES = {
  "expert 8": {"expert": 8},
  "fsdp 2, expert 4": {"fsdp": 2, "expert": 4},
  "data 2, expert 4": {"data": 2, "expert": 4},
  "fsdp 2, tensor 2, expert 2": {"fsdp": 2, "tensor": 2, "expert": 2},
  "fsdp 2, context 2, expert 2": {"fsdp": 2, "context": 2, "expert": 2},
  "fsdp 2, context 4": {"fsdp": 2, "context": 4},
}

pytestmark = pytest.mark.mesh


def case(mesh, layers, accumulation=1, kind="routed", **settings):
  """A run on the mesh, or on one device where it is None."""
  sizes = {f"ici_{axis}_parallelism": size for axis, size in ({"fsdp": 1} | MESHES[mesh]).items()} if mesh else {}
  experts = {"context_parallel_load_balance": False} if mesh else {"sparse_matmul": False}
  rows = {"per_device_batch_size": ROWS / (DEVICES if mesh else 1), "gradient_accumulation_steps": accumulation}
  return (kind, TRAIN | LAYERS[layers] | sizes | experts | rows | settings)


QUICK = ("expert 8", "unscanned", 1)  # runs with `make test`
FAST = {
  QUICK: EIGHT,
  ("fsdp 2, expert 4", "scanned", 2): DROPLESS | {"ragged_buffer_factor": SOME},
  ("fsdp 2, expert 4", "unscanned", 1): DROPLESS
  | LOCAL_TOP_K
  | {"num_moe_token_chunks": 2},  # as MaxText's path needs it on v6e-64
}
SLOW = {
  ("expert 8", "scanned", 2): DROPLESS | LOCAL_TOP_K,
  ("data 2, expert 4", "scanned", 2): DROPLESS | LOCAL_TOP_K,
  ("fsdp 2, tensor 2, expert 2", "unscanned", 1): DROPLESS | LOCAL_TOP_K,
  ("fsdp 2, context 2, expert 2", "unscanned", 1): DROPLESS | LOCAL_TOP_K,
  ("fsdp 2, expert 4", "unscanned", 1): RING | TILES | {"defer_small_all_reduces": True},
}

# The same layers by ops.experts.
FUSED_RING = RING | {"experts_backend": "xla"}
FUSED = FUSED_RING | {"ragged_buffer_factor": FACTOR, "moe_dropless_fallback": "layer"}
FUSED_QUICK = ("fsdp 2, expert 4", "unscanned", 1)
FUSED_CASES = {
  FUSED_QUICK: FUSED | {"num_moe_token_chunks": 2, "ragged_buffer_factor": SOME},
  ("expert 8", "unscanned", 1): FUSED | {"ragged_buffer_factor": NONE, "moe_chunk_barrier": True},
  ("fsdp 2, expert 4", "scanned", 2): FUSED | {"ragged_buffer_factor": SOME},
  ("data 2, expert 4", "scanned", 2): FUSED_RING,
  ("fsdp 2, context 2, expert 2", "unscanned", 1): FUSED,
  ("fsdp 2, context 4", "unscanned", 1): {"sparse_matmul": True, "experts_backend": "xla"},  # no ring
}

SWITCHES = {
  "moe_chunk_barrier": {"num_moe_token_chunks": 2, "moe_chunk_barrier": True},
  "moe_log_max_load_ratio": {"moe_log_max_load_ratio": True},
  "log_required_ragged_buffer_factor": {"log_required_ragged_buffer_factor": True},
}


def runs(folder, devices, cases):
  """{key: arrays} for {key: case}."""
  return dict(zip(cases, run(folder, devices, list(cases.values())), strict=True))


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  """A function: (layers, accumulation) -> arrays, computed when first asked for."""

  @functools.cache
  def arrays(layers, accumulation):
    key = (layers, accumulation)
    return runs(tmp_path_factory.mktemp("one_device"), 1, {key: case(None, *key)})[key]

  return arrays


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
  """A function: (mesh, layers, accumulation) or "drops" -> arrays; the slow ones are computed when first asked for."""
  quick = {QUICK: case(*QUICK, **FAST[QUICK])}
  slow = {key: case(*key, **settings) for key, settings in FAST.items() if key != QUICK}
  slow["drops"] = case("expert 8", "unscanned", kind="scored", **CAPPED)

  @functools.cache
  def arrays(quickly):
    return runs(tmp_path_factory.mktemp("meshes"), DEVICES, quick if quickly else slow)

  return lambda key: arrays(key in quick)[key]


@pytest.fixture(scope="module")
def other_meshes(tmp_path_factory):
  cases = {key: case(*key, **settings) for key, settings in SLOW.items()}
  return runs(tmp_path_factory.mktemp("other_meshes"), DEVICES, cases)


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
  """A function: (mesh, layers, accumulation) -> arrays of ops.experts."""

  @functools.cache
  def arrays(quickly):
    keys = [key for key in FUSED_CASES if (key == FUSED_QUICK) == quickly]
    folder = tmp_path_factory.mktemp("fused")
    return runs(folder, DEVICES, {key: case(*key, **FUSED_CASES[key]) for key in keys})

  return lambda key: arrays(key == FUSED_QUICK)[key]


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
  cases = {name: case("expert 8", "unscanned", **EIGHT | settings) for name, settings in SWITCHES.items()}
  cases["use_random_routing"] = case("expert 8", "unscanned", **RING | TILES, use_random_routing=True)
  return runs(tmp_path_factory.mktemp("switched"), DEVICES, cases)


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
  """Arrays of one device and of the ring."""
  key = ("unscanned", 1)
  half = {"dtype": "bfloat16", "matmul_precision": "default"}
  folders = [tmp_path_factory.mktemp(name) for name in ("one_device_bfloat16", "ring_bfloat16")]
  (one,) = run(folders[0], 1, [case(None, *key, **half)])
  (ring,) = run(folders[1], DEVICES, [case("expert 8", *key, **EIGHT, **half)])
  return one, ring


@pytest.fixture(scope="module")
def moved_checkpoints(tmp_path_factory):
  """A run of two steps on the ring, and one step of learning rate 0 on other meshes from copies of its checkpoint.

  In bfloat16: MaxText's CPU reference of the ragged kernels returns nothing else (`routed_runs._round_as_the_kernel`).
  """
  folder = tmp_path_factory.mktemp("moved_checkpoints")
  common = write_documents(folder) | LAYERS["unscanned"] | {"scan_layers": False, "dtype": "bfloat16"}
  common |= {"per_device_batch_size": 1, "ici_fsdp_parallelism": 1, "context_parallel_load_balance": False}
  ring = common | DROPLESS | LOCAL_TOP_K
  devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
  train(folder, arguments(folder, "ring", "ring", 2, **ring, ici_expert_parallelism=8), XLA_FLAGS=devices)
  still = {"learning_rate": 0.0, "routed_bias_update_rate": 0.0}
  meshes = {
    "fsdp_8": common | {"ici_fsdp_parallelism": 8},
    "fsdp_2_expert_4": ring | {"ici_fsdp_parallelism": 2, "ici_expert_parallelism": 4},
  }
  for name in meshes:
    shutil.copytree(folder / "ring", folder / name)
  train(folder, *(arguments(folder, name, name, 3, **mesh, **still) for name, mesh in meshes.items()), XLA_FLAGS=devices)
  return folder


def assert_equal(ours, expected, routing):
  """Counts to the bit, metrics and gradients up to the order of float32 sums.

  That is 1e-4 of the largest element, as in test_meshes.py, and 8 roundings of the gradient's norm for gradients that are
  differences of larger ones. One token of the 192 of a batch is about 5e-3 of an expert's gradient.
  """
  names = [name for name in expected if name.startswith(f"{routing}/")]
  more = {name for name in ours if name.startswith(f"{routing}/")} - set(names)
  assert more <= {fallbacks(routing), fallbacks(routing, "evaluation")}
  assert sum("/counts/" in name for name in names) == sum(name.endswith("gate.bias") for name in names) > 0
  rounding = 8 * 2.0**-24 * float(expected[f"{routing}/learning/grad_norm"])
  for name in names:
    value = expected[name]
    if "/counts/" in name:
      np.testing.assert_array_equal(ours[name], value, err_msg=name)
    else:
      np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-4 * np.abs(value).max() + rounding, err_msg=name)


def fallbacks(routing, kind="learning"):
  return f"{routing}/{kind}/moe_dropless_fallback_layers"


def counts(arrays, routing):
  """Tokens of each expert, [routers, E]."""
  return np.stack([value for name, value in arrays.items() if name.startswith(f"{routing}/counts/")])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
  "key", [pytest.param(key, id=str(key), marks=() if key == QUICK else pytest.mark.slow) for key in FAST]
)
def test_equal_to_one_device(meshes, one_device, key, routing):
  assert_equal(meshes(key), one_device(*key[1:]), routing)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
  "key",
  [pytest.param(key, id=str(key), marks=() if key == FUSED_QUICK else pytest.mark.slow) for key in FUSED_CASES],
)
def test_fused_experts_equal_one_device(fused, one_device, key, routing):
  """Routings that overflow a device's buffer included."""
  _, layers, accumulation = key
  arrays = fused(key)
  assert_equal(arrays, one_device(layers, accumulation), routing)
  if routing == CROWDED and "moe_dropless_fallback" in FUSED_CASES[key]:
    assert arrays[fallbacks(routing)] == ROUTERS[layers] * accumulation


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("key", SLOW, ids=str)
def test_other_meshes_equal_one_device(other_meshes, one_device, key, routing):
  assert_equal(other_meshes[key], one_device(*key[1:]), routing)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_the_ring_change_nothing(switched, one_device, switch, routing):
  """Beside metrics of their own."""
  expected = one_device("unscanned", 1)
  assert_equal({name: value for name, value in switched[switch].items() if name in expected}, expected, routing)


@pytest.mark.slow
def test_random_routing_spreads_tokens_evenly(switched):
  """For whatever biases. Padding is counted, as a random choice cannot be had a second time to take it off."""
  positions = ROWS * LENGTH * TOP_K
  for routing in ROUTINGS:
    found = counts(switched["use_random_routing"], routing)
    np.testing.assert_array_equal(found.sum(axis=1), positions)
    mean = positions / EXPERTS
    assert np.abs(found - mean).max() < 5 * np.sqrt(mean)  # 5 deviations of a binomial count


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
def test_bfloat16_errs_as_much_as_on_one_device(bfloat16, one_device, routing):
  """Gradients against those in float32.

  One device rounds the sum over a token's experts once, the ring up to TOP_K parts of it: at most TOP_K times the error.
  """

  def error(arrays):
    expected = one_device("unscanned", 1)
    names = [name for name in expected if name.startswith(f"{routing}/moved/") and not name.endswith("gate.bias")]
    return np.sqrt(sum(np.sum((arrays[name] - expected[name]) ** 2) for name in names))

  one, ring = map(error, bfloat16)
  assert 0 < ring <= TOP_K * one
  name = f"{routing}/evaluation/total_loss"
  losses = [arrays[name] for arrays in bfloat16]
  assert abs(losses[1] / losses[0] - 1) <= TOP_K * 2.0**-8


@pytest.mark.slow
@pytest.mark.parametrize("target", ["fsdp_8", "fsdp_2_expert_4"])
def test_a_checkpoint_goes_on_on_another_mesh(moved_checkpoints, target):
  """Weights and biases come over to the bit: a step of learning rate 0 there leaves them as they were."""
  stored = weights(moved_checkpoints / "ring", 1)
  there = weights(moved_checkpoints / target, 2)
  assert set(there) == set(stored)
  assert sum(path.endswith("['gate']['bias']") for path in stored) == ROUTERS["unscanned"]
  for path, value in stored.items():
    np.testing.assert_array_equal(there[path], value, err_msg=path)


@pytest.mark.parametrize(
  "key", [pytest.param(key, id=str(key), marks=() if key == QUICK else pytest.mark.slow) for key in FAST]
)
def test_crowded_routing_overflows_every_layer(meshes, key):
  """All positions of all microbatches go to the first two experts, and every router's layer falls back.

  Padding takes room in the buffers, too, but is not counted.
  """
  _, layers, accumulation = key
  tokens = meshes(key)["tokens"]
  assert 0.5 < tokens / (ROWS * accumulation * LENGTH) < 1
  expected = np.tile([tokens] * TOP_K + [0] * (EXPERTS - TOP_K), (ROUTERS[layers], 1))
  np.testing.assert_array_equal(counts(meshes(key), CROWDED), expected)
  assert meshes(key)[fallbacks(CROWDED)] == ROUTERS[layers] * accumulation
  assert meshes(key)[fallbacks(CROWDED, "evaluation")] == ROUTERS[layers]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_layer_falls_back_where_a_device_gets_more_than_its_buffer(meshes, routing):
  """With expert=8, device e has expert e, and crowded, two of them all positions."""
  arrays = meshes(QUICK)
  assert counts(arrays, DRAWN).max() <= BUFFER < ROWS * LENGTH
  overflowing = {DRAWN: 0, CROWDED: ROUTERS["unscanned"]}[routing]
  assert arrays[fallbacks(routing)] == arrays[fallbacks(routing, "evaluation")] == overflowing


@pytest.mark.slow
def test_each_layer_decides_for_itself(meshes):
  """Both branches run in one step, as drawn."""
  assert 0 < meshes(("fsdp 2, expert 4", "scanned", 2))[fallbacks(DRAWN)] < 2 * ROUTERS["scanned"]


@pytest.mark.slow
def test_without_the_fallback_tokens_are_dropped(meshes, one_device):
  dropped, right = meshes("drops"), one_device("unscanned", 1)
  name = f"{CROWDED}/evaluation/total_loss"
  assert abs(dropped[name] / right[name] - 1) > 1e-3  # equal ones are within 1e-4
  assert fallbacks(CROWDED, "evaluation") not in dropped


@pytest.mark.slow
def test_choosing_before_the_gather_sends_no_scores(meshes):
  """The experts' devices get tokens and, for each, TOP_K weights and experts; else the scores of all experts."""
  assert set(meshes(QUICK)["gathered"]) == {WIDTH, TOP_K}
  assert set(meshes(("fsdp 2, expert 4", "scanned", 2))["gathered"]) == {WIDTH, EXPERTS}


def test_counts_of_parts_of_a_batch_are_summed():
  """[devices, token chunks, E], which defer_small_all_reduces leaves to the receiver."""
  router = SimpleNamespace(expert_counts=nnx.Variable(jnp.ones(3, jnp.int32)))
  Router.count(router, jnp.arange(12).reshape(2, 2, 3))
  Router.count(router, jnp.array([0, 0, 1]))
  np.testing.assert_array_equal(router.expert_counts[...], [1 + 18, 1 + 22, 1 + 26 + 1])
