"""Switches that act in MaxText's trainer, not in its step: runs of `train.main` beside a plain one."""

import numpy as np
import pytest

from training.stock_runs import arguments, checkpoint, metrics, run, weights, write_documents

pytestmark = [pytest.mark.matrix, pytest.mark.slow]

EIGHT = "--xla_force_host_platform_device_count=8"
ONE_CYCLE = {"base_num_decoder_layers": 3, "scan_layers": False}
SCANNED = {"scan_layers": True, "base_num_decoder_layers": 6, "param_scan_axis": 0}
RAMPUP = {
  "enable_rampup_batch_size": True,
  "per_device_batch_size_start": 2,
  "per_device_batch_size_increment": 1,
  "global_rampup_samples": 4,
}
MUON = {"opt_type": "muon", "muon_type": "maxtext"}
ON_ONE = {
  "plain": {},
  "optimizer_memory_host_offload": {"optimizer_memory_host_offload": True},
  "enable_continuous_checkpointing": {"enable_continuous_checkpointing": True},
  "two rows": {"per_device_batch_size": 2},
  "rampup": RAMPUP,
  "scanned": SCANNED,
  "parameter_memory_host_offload": SCANNED | {"parameter_memory_host_offload": True},
}
ON_EIGHT = {
  "data": {"ici_data_parallelism": 8, "ici_fsdp_parallelism": 1},
  "shard_optimizer_over_data": {"ici_data_parallelism": 8, "ici_fsdp_parallelism": 1, "shard_optimizer_over_data": True},
  "muon": MUON | {"ici_fsdp_parallelism": 8},
  "muon_use_all_to_all": MUON | {"ici_fsdp_parallelism": 8, "muon_use_all_to_all": True},
}
SAME = {
  "optimizer_memory_host_offload": "plain",
  "enable_continuous_checkpointing": "plain",
  "parameter_memory_host_offload": "scanned",
  "shard_optimizer_over_data": "data",
  "muon_use_all_to_all": "muon",
}
"""Run -> the run that it must equal."""

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("switches")
  common = ONE_CYCLE | write_documents(folder)
  run(folder, *(arguments(folder, name, name, STEPS, **common | settings) for name, settings in ON_ONE.items()))
  whole = {"load_full_state_path": folder / "plain" / "checkpoints" / str(STEPS - 1) / "items"}
  still = {"learning_rate": 0.0, "routed_bias_update_rate": 0.0}
  run(folder, arguments(folder, "full_state", "full_state", STEPS + 1, **common | whole | still))
  rows = {"per_device_batch_size": 1}
  cases = (arguments(folder, name, name, STEPS, **common | rows | settings) for name, settings in ON_EIGHT.items())
  run(folder, *cases, XLA_FLAGS=EIGHT)
  return folder


@pytest.mark.parametrize("name", SAME)
def test_equal(folder, name):
  """Losses of all steps and all weights and biases, up to the order of float32 sums on a mesh."""
  ours, expected = metrics(folder, name), metrics(folder, SAME[name])
  assert sorted(ours) == list(range(STEPS))
  for step, values in expected.items():
    for loss in ("learning/loss", "learning/raw_mtp_loss", "learning/moe_z_loss"):
      assert ours[step][loss] == pytest.approx(values[loss], rel=1e-6), (step, loss)
  stored = weights(folder / SAME[name], STEPS - 1)
  for path, value in weights(folder / name, STEPS - 1).items():
    np.testing.assert_allclose(value, stored[path], rtol=0, atol=1e-5 * np.abs(value).max() + 1e-9, err_msg=path)


def test_a_ramp_begins_with_a_smaller_batch(folder):
  """Two rows in the first step: the loss of a run with two rows; then three and four, and other losses."""
  ramp, two = metrics(folder, "rampup"), metrics(folder, "two rows")
  assert ramp[0]["learning/loss"] == pytest.approx(two[0]["learning/loss"], rel=1e-6)
  assert all(ramp[step]["learning/loss"] != two[step]["learning/loss"] for step in (1, 2))


def test_a_whole_state_is_loaded(folder):
  """load_full_state_path: a step of rate 0 leaves weights and biases as they were; the optimizer's count goes on."""
  assert list(metrics(folder, "full_state")) == [STEPS]
  before, after = (checkpoint(folder, *at) for at in (("plain", STEPS - 1), ("full_state", STEPS)))
  assert any(np.abs(value).max() > 0 for path, value in before.items() if path.endswith("['gate']['bias']"))
  for path, value in before.items():
    if path.startswith("['params']"):
      np.testing.assert_array_equal(after[path], value, err_msg=path)
  counts = [path for path in before if path.startswith("['opt_state']") and path.endswith("['count']")]
  assert counts and all(before[path] == STEPS and after[path] == STEPS + 1 for path in counts)
