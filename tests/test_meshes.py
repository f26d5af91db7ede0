"""Eight devices compute what one computes: a train step on packed data, and decoding with tensor parallelism."""

import numpy as np
import pytest

from mesh_runs import DEVICES, ROWS, run

MODEL = {"base_num_decoder_layers": 5, "base_num_query_heads": 8, "base_num_kv_heads": 8, "sparse_matmul": False}
TRAIN = MODEL | {"opt_type": "sgd", "gradient_clipping_threshold": 0.0, "moe_z_loss_weight": 1e-2}
DECODE = MODEL | {"max_prefill_predict_length": 16, "max_target_length": 32}
MESHES = {
  "fsdp 8": {"ici_fsdp_parallelism": 8},
  "fsdp 2, tensor 4": {"ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 4},
  "fsdp 2, expert 4": {"ici_fsdp_parallelism": 2, "ici_expert_parallelism": 4},
  "fsdp 4, context 2": {"ici_fsdp_parallelism": 4, "ici_context_parallelism": 2, "context_parallel_load_balance": False},
}
LAYOUTS = {"unrolled": False, "scanned": True}
CASES = [(mesh, layout) for mesh in MESHES for layout in LAYOUTS]

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
  many = run(folder, DEVICES, [*(training(layout, DEVICES, **MESHES[mesh]) for mesh, layout in CASES), tensor])
  names = [*((None, layout) for layout in LAYOUTS), (None, "decode"), *CASES, ("tensor 8", "decode")]
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
