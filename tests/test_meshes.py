"""Eight devices compute what one computes: train steps on packed data, and decoding with tensor parallelism."""

import numpy as np
import pytest

from mesh_runs import DEVICES, ROWS, run

MODEL = {"base_num_decoder_layers": 5, "base_num_query_heads": 8, "base_num_kv_heads": 8, "sparse_matmul": False}
TRAIN = MODEL | {"opt_type": "sgd", "gradient_clipping_threshold": 0.0, "moe_z_loss_weight": 1e-2}
DECODE = MODEL | {"max_prefill_predict_length": 16, "max_target_length": 32}
IN_ORDER = {"context_parallel_load_balance": False}
MESHES = {
  "fsdp 8": {"ici_fsdp_parallelism": 8},
  "data 2, fsdp 2, fsdp_transpose 2": {
    "ici_data_parallelism": 2,
    "ici_fsdp_parallelism": 2,
    "ici_fsdp_transpose_parallelism": 2,
  },
  "fsdp 2, tensor 4": {"ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 4},
  "fsdp 2, expert 4": {"ici_fsdp_parallelism": 2, "ici_expert_parallelism": 4},
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
LAYOUTS = {"unrolled": False, "scanned": True}
CASES = [
  ("fsdp 8", "scanned"),
  ("data 2, fsdp 2, fsdp_transpose 2", "unrolled"),
  ("fsdp 2, tensor 4", "unrolled"),
  ("fsdp 2, expert 4", "scanned"),
  *(("fsdp 4, context 2", layout) for layout in LAYOUTS),
  ("context 8", "unrolled"),
  ("context 2, tensor 2, expert 2", "scanned"),
]

pytestmark = pytest.mark.mesh


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """{(mesh or None, layout): arrays}, and those of decoding."""
  folder = tmp_path_factory.mktemp("meshes")

  def training(layout, devices, **mesh):
    return ("train", TRAIN | mesh | {"scan_layers": LAYOUTS[layout], "per_device_batch_size": ROWS / devices})

  def decoding(devices, **mesh):
    return ("decode", DECODE | mesh | {"per_device_batch_size": 1.0 / devices if devices > 1 else 1})

  one = run(folder, 1, [*(training(layout, 1) for layout in LAYOUTS), decoding(1)])
  tensor = decoding(DEVICES, ici_fsdp_parallelism=1, ici_tensor_parallelism=DEVICES)
  exchange = ("collectives", MESHES["context 8"] | {"per_device_batch_size": 1})
  many = run(folder, DEVICES, [*(training(layout, DEVICES, **MESHES[mesh]) for mesh, layout in CASES), tensor, exchange])
  names = [*((None, layout) for layout in LAYOUTS), (None, "decode"), *CASES]
  names += [("tensor 8", "decode"), ("context 8", "collectives")]
  return dict(zip(names, [*one, *many], strict=True))


@pytest.mark.parametrize(("mesh", "layout"), CASES)
def test_two_steps_equal_one_device(results, mesh, layout):
  ours, expected = results[mesh, layout], results[None, layout]
  assert set(ours) == set(expected)
  assert len([name for name in ours if "max_over_mean_load" in name]) == 2 * (4 + 1)
  for name, value in expected.items():
    counted = "load" in name or "dead" in name or "total_weights" in name
    np.testing.assert_allclose(ours[name], value, rtol=1e-7 if counted else 1e-4, atol=1e-5, err_msg=name)


def test_tensor_parallel_decode_equals_one_device(results):
  ours, expected = results["tensor 8", "decode"]["logits"], results[None, "decode"]["logits"]
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_context_parallel_gla_exchanges_states_only(results):
  """For 8192 tokens on 8 ranks: no collective has more elements than a state a rank, [8, 4, 8, 8]; nothing is reduced."""
  found = {kind: tuple(value) for kind, value in results["context 8", "collectives"].items()}
  assert set(found) == {"all-gather", "reduce-scatter"}
  assert found["all-gather"][1] == 8 * 4 * 8 * 8
  assert found["reduce-scatter"] == (1, 4 * 8 * 8)
