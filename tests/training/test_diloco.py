"""DiLoCo with two replicas, through MaxText's trainer: LING2's step on each of them, and equal biases after a sync."""

import os

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from rich.console import Console
from stock_runs import SMALL, arguments, metrics, run, write_documents

from maxtext_ling2.checkpoint.export_hf import Export
from maxtext_ling2.checkpoint.hf_checkpoint import HfCheckpoint
from maxtext_ling2.maxtext_api import session
from tiny import TINY

LAYERS = {"base_num_decoder_layers": 3, "mtp_num_layers": 0, "scan_layers": False, "moe_shared_expert_dim": 32}
# All but the last position of a row are scored, so that the mean of the replicas' gradients is that of the whole batch.
COMMON = LAYERS | {"eod_mask_loss": False, "gradient_clipping_threshold": 0.0}
TWO = {"enable_diloco": True, "ici_diloco_parallelism": 2, "ici_fsdp_parallelism": 1, "per_device_batch_size": 2}
ALIKE = {"opt_type": "sgd", "learning_rate": 0.1, "routed_bias_update_rate": 0.0}
PLAIN = {"diloco_sync_period": 1, "diloco_outer_lr": 1.0, "diloco_outer_momentum": 0.0}
BALANCED = {"routed_bias_update_rate": 0.05, "diloco_sync_period": 2}
STEPS = 4


DEVICES = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"


@pytest.fixture(scope="module")
def common(tmp_path_factory):
  """(folder, settings of all runs)."""
  folder = tmp_path_factory.mktemp("diloco")
  return folder, write_documents(folder) | COMMON


@pytest.fixture(scope="module")
def folder(common):
  """Runs that end with a synchronisation, and between two."""
  folder, settings = common
  names = {"synchronised": STEPS, "between": STEPS - 1}
  words = (arguments(folder, name, name, steps, **settings | TWO | BALANCED) for name, steps in names.items())
  run(folder, *words, XLA_FLAGS=DEVICES)
  return folder


@pytest.fixture(scope="module")
def two_and_one(common):
  """Two replicas, and one that gets the batches of both."""
  folder, settings = common
  run(folder, arguments(folder, "two", "two", STEPS, **settings | TWO | ALIKE | PLAIN), XLA_FLAGS=DEVICES)
  run(folder, arguments(folder, "one", "one", STEPS, **settings | ALIKE | {"per_device_batch_size": 4}))
  return folder


@pytest.mark.slow
def test_two_replicas_synchronised_each_step_are_one_with_both_batches(two_and_one):
  """Inner SGD, outer rate 1, no momentum; with LING2's z-loss in the loss and its metrics of replica 0."""
  two, one = metrics(two_and_one, "two"), metrics(two_and_one, "one")
  assert sorted(two) == sorted(one) == list(range(STEPS))
  for step, line in two.items():
    loss = np.mean([line[f"learning/loss_island_{replica}"] for replica in range(2)])
    np.testing.assert_allclose(loss, one[step]["learning/loss"], rtol=1e-6)
    assert line["learning/moe_z_loss"] > 1 and line["learning/moe/max_over_mean_load/layer_001"] > 1
    expected = line["learning/lm_loss"] + 2 * SMALL["moe_z_loss_weight"] * line["learning/moe_z_loss"]
    np.testing.assert_allclose(line["learning/loss"], expected, rtol=1e-6)  # two layers with experts


def biases(folder, name, step):
  """(of each replica [2, E], of all [E]) of each router."""
  path = (folder / name / "checkpoints" / str(step) / "items").resolve()
  reader = ocp.PyTreeCheckpointer()
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  tree = reader.restore(path, restore_args=jax.tree.map(lambda _: as_numpy, reader.metadata(path).item_metadata.tree))
  each, of_all = tree["inner_state"]["params"]["params"]["decoder"], tree["params"]["params"]["decoder"]
  layers = [f"layers_{index}" for index in (1, 2)]
  return [tuple(part[layer]["moe"]["MoeBlock_0"]["gate"]["bias"] for part in (each, of_all)) for layer in layers]


def test_biases_are_the_mean_of_all_replicas_after_a_sync_and_saved_once(folder):
  for each, of_all in biases(folder, "synchronised", STEPS - 1):
    np.testing.assert_array_equal(each[0], each[1])
    np.testing.assert_allclose(of_all, each[0], rtol=1e-6)
    assert np.abs(of_all).max() > 0
  for each, of_all in biases(folder, "between", STEPS - 2):
    assert np.abs(each[0] - each[1]).max() > 0.01
    np.testing.assert_allclose(of_all, each.mean(0), rtol=1e-5, atol=1e-7)


def test_its_checkpoint_is_exported(folder, tmp_path):
  config = session.make_config(**TINY | LAYERS)
  checkpoint = epath.Path(folder / "synchronised" / "checkpoints" / str(STEPS - 1))
  Export(checkpoint, config).run(tmp_path / "hf", "float32", None, Console(quiet=True))
  with HfCheckpoint(tmp_path / "hf") as tensors:
    tensors.check(config)
