"""Eight devices compute what one computes: train steps on packed data, and decoding with tensor parallelism."""

import functools

import numpy as np
import pytest

from mesh_runs import DEVICES, ROWS, run

MODEL = {
  "base_num_decoder_layers": 5,
  "inhomogeneous_layer_cycle_interval": 2,
  "base_num_query_heads": 8,
  "base_num_kv_heads": 8,
  "sparse_matmul": False,
}  # two layers, one scanned cycle, a trailing layer
TRAIN = MODEL | {"opt_type": "sgd", "gradient_clipping_threshold": 0.0, "moe_z_loss_weight": 1e-2}
DECODE = MODEL | {"max_prefill_predict_length": 16, "max_target_length": 32}
DECODING = ("decode", DECODE | {"per_device_batch_size": 1})
IN_ORDER = {"context_parallel_load_balance": False}
RING = {"sparse_matmul": True, "use_ring_of_experts": True, "megablox": True}
MESHES = {
  "fsdp 8": {"ici_fsdp_parallelism": 8},
  "data 2, fsdp 2, fsdp_transpose 2": {
    "ici_data_parallelism": 2,
    "ici_fsdp_parallelism": 2,
    "ici_fsdp_transpose_parallelism": 2,
  },
  "fsdp 2, tensor 4": {"ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 4},
  "fsdp 2, expert 4": {"ici_fsdp_parallelism": 2, "ici_expert_parallelism": 4},
  "fsdp 2, expert 4, ring": {"ici_fsdp_parallelism": 2, "ici_expert_parallelism": 4, **RING},
  "fsdp 4, context 2": {"ici_fsdp_parallelism": 4, "ici_context_parallelism": 2, **IN_ORDER},
  "context 8": {"ici_fsdp_parallelism": 1, "ici_context_parallelism": 8, **IN_ORDER},
  "context 2, tensor 2, expert 2": {
    "ici_fsdp_parallelism": 1,
    "ici_context_parallelism": 2,
    "ici_tensor_parallelism": 2,
    "ici_expert_parallelism": 2,
    **IN_ORDER,
  },
}
LAYOUTS = {"unscanned": False, "scanned": True}
CASES = [("context 2, tensor 2, expert 2", "scanned")]
OTHER_CASES = [(mesh, layout) for mesh in MESHES for layout in LAYOUTS if (mesh, layout) not in CASES]

pytestmark = pytest.mark.mesh


def training(layout, devices, **mesh):
  return ("train", {**TRAIN, **mesh, "scan_layers": LAYOUTS[layout], "per_device_batch_size": ROWS / devices})


def training_on(cases):
  return [training(layout, DEVICES, **MESHES[mesh]) for mesh, layout in cases]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  """A function: layout, or "decode" -> arrays, computed when first asked for."""

  @functools.cache
  def arrays(kind):
    return run(tmp_path_factory.mktemp("one_device"), 1, [DECODING if kind == "decode" else training(kind, 1)])[0]

  return arrays


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
  """{(mesh, layout): arrays}, and those of the collectives."""
  exchange = ("collectives", MESHES["context 8"] | {"per_device_batch_size": 1})
  found = run(tmp_path_factory.mktemp("eight_devices"), DEVICES, [*training_on(CASES), exchange])
  return dict(zip([*CASES, "collectives"], found, strict=True))


@pytest.fixture(scope="module")
def other_meshes(tmp_path_factory):
  """{(mesh, layout): arrays} of the rest of the table."""
  found = run(tmp_path_factory.mktemp("other_meshes"), DEVICES, training_on(OTHER_CASES))
  return dict(zip(OTHER_CASES, found, strict=True))


def assert_equal(ours, expected):
  assert set(ours) == set(expected)
  assert len([name for name in ours if "max_over_mean_load" in name]) == 2 * (4 + 1)
  for name, value in expected.items():
    counted = "load" in name or "dead" in name or "total_weights" in name
    np.testing.assert_allclose(ours[name], value, rtol=1e-7 if counted else 1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("mesh", "layout"), CASES)
def test_two_steps_equal_one_device(eight_devices, one_device, mesh, layout):
  assert_equal(eight_devices[mesh, layout], one_device(layout))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "layout"), OTHER_CASES)
def test_the_rest_of_the_table(other_meshes, one_device, mesh, layout):
  assert_equal(other_meshes[mesh, layout], one_device(layout))


@pytest.mark.slow
def test_tensor_parallel_decode_equals_one_device(tmp_path, one_device):
  sizes = {"per_device_batch_size": 1 / DEVICES, "ici_fsdp_parallelism": 1, "ici_tensor_parallelism": DEVICES}
  (ours,) = run(tmp_path, DEVICES, [("decode", DECODE | sizes)])
  np.testing.assert_allclose(ours["logits"], one_device("decode")["logits"], rtol=0, atol=1e-4)


def test_context_parallel_gla_exchanges_states_only(eight_devices):
  """For 8192 tokens on 8 ranks: no collective has more elements than a state a rank, [8, 4, 8, 8]; nothing is reduced."""
  found = {kind: tuple(value) for kind, value in eight_devices["collectives"].items()}
  assert set(found) == {"all-gather", "reduce-scatter"}
  assert found["all-gather"][1] == 8 * 4 * 8 * 8
  assert found["reduce-scatter"] == (1, 4 * 8 * 8)
