"""What a run through MaxText's own trainer writes: every metric that LING2 adds, in the metrics file and TensorBoard."""

import math

import pytest
from stock_runs import arguments, metrics, run, tensorboard, write_documents

STEPS = 4
LAYERS = [*(f"layer_{index:03d}" for index in range(1, 7)), "mtp_layer_1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("metrics")
  documents = write_documents(folder)
  settings = documents | {
    "base_num_decoder_layers": 7,
    "inhomogeneous_layer_cycle_interval": 2,
    "scan_layers": True,
    "gradient_accumulation_steps": 2,
    "moe_z_loss_weight": 1e-3,
    "enable_checkpointing": False,
    "enable_tensorboard": True,
    "eval_interval": 2,
    "eval_steps": 3,
    "grain_eval_files": documents["grain_train_files"],
    "grain_worker_count_eval": 0,
    "mtp_eval_target_module": 1,
  }
  run(folder, arguments(folder, "metrics", "metrics", STEPS, **settings), DECOUPLE_GCLOUD="FALSE")
  return folder


def expected_keys():
  moe = {f"learning/moe/{kind}/{layer}" for kind in ("bias_norm", "max_over_mean_load", "z_loss") for layer in LAYERS}
  return moe | {"learning/moe_z_loss", "learning/mtp_loss", "learning/raw_mtp_loss", "learning/loss", "learning/lm_loss"}


@pytest.fixture(scope="module")
def written(folder):
  (file,) = folder.glob("metrics/tensorboard/**/events.*")
  return tensorboard(file)


def test_tensorboard(written):
  for key in expected_keys():
    assert len(written[key]) == STEPS, key
    assert all(math.isfinite(value) and value > 0 for value in written[key]), key
  for layer in LAYERS:
    assert all(0 <= value < 1 for value in written[f"learning/moe/dead_expert_fraction/{layer}"])
    assert all(value >= 1 for value in written[f"learning/moe/max_over_mean_load/{layer}"])


def test_metrics_file_has_the_same(folder, written):
  lines = metrics(folder, "metrics")
  assert sorted(lines) == list(range(STEPS))
  for step, line in lines.items():
    for key in expected_keys():
      assert written[key][step] == pytest.approx(line[key], rel=1e-6), key


def test_evaluation(written):
  assert len(written["evaluation/moe_z_loss"]) >= 1
  # The mean over batches: of the size of the training batches' own, which counts nothing twice.
  assert written["evaluation/moe_z_loss"][0] == pytest.approx(written["learning/moe_z_loss"][0], rel=0.05)
  raw = [written[f"{kind}/raw_mtp_loss"][0] for kind in ("evaluation", "learning")]
  assert raw[0] == pytest.approx(raw[1], rel=0.05)
  assert raw[1] == pytest.approx(written["learning/mtp_loss"][0] / 0.1, rel=1e-6)  # MaxText's mtp_loss_scaling_factor
  assert 0 <= written["eval/avg_mtp_acceptance_rate_percent"][0] <= 100
