"""Targets, disks, dtypes and models that do not fit a conversion: each is refused by name, and nothing is half-written.

The damaged folders are those of tests/hostile/bad_folders.py, read by tests/hostile/test_bad_inputs.py.
"""

import asyncio
import errno
import json
import os
import re
import shutil
from pathlib import Path

import folders
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from hostile.bad_folders import config as damaged_config
from hostile.bad_folders import tensors
from maxtext_ling2.checkpoint import hf_config, import_hf, orbax_handlers, orbax_store, safetensors_file
from maxtext_ling2.checkpoint.export_hf import Export
from maxtext_ling2.checkpoint.import_hf import Import
from maxtext_ling2.checkpoint.orbax_store import Storage
from maxtext_ling2.errors import CheckpointError

QUIET = Console(quiet=True)
pytestmark = pytest.mark.hostile


@pytest.fixture(scope="module")
def model():
  """The MaxText config of the undamaged folder: what the user asks for."""
  return folders.config(folders.GOLDEN / "one_cycle")


def test_all_faults_of_a_config_are_named_at_once(tmp_path):
  folder = folders.copy(tmp_path / "hf")
  damaged_config(use_bias=True, hidden_act="gelu", num_key_value_heads=1)(folder)
  with pytest.raises(CheckpointError) as error:
    hf_config.to_maxtext(hf_config.read(folder))
  assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "float16"])
def test_save_dtypes_that_are_not_offered(tmp_path, model, dtype):
  with pytest.raises(CheckpointError, match=f"save_dtype={dtype}"):
    Import(folders.GOLDEN / "one_cycle", model, epath.Path(tmp_path / "0"), dtype)


def test_an_mtp_layer_that_the_folder_has_not(tmp_path):
  config = folders.config(folders.GOLDEN / "one_cycle", mtp_num_layers=1)
  with pytest.raises(CheckpointError, match="mtp_num_layers=1, but config.json has 0"):
    Import(folders.GOLDEN / "one_cycle", config, epath.Path(tmp_path / "0"), "float32")


def test_mtp_weights_that_are_absent(tmp_path):
  folder = folders.write(tmp_path / "hf", files=2, num_nextn_predict_layers=1)
  (folder / "mtp.safetensors").unlink()
  with pytest.raises(CheckpointError, match=r"MTP \(model.layers.6.* pass mtp_num_layers=0"):
    Import(folder, folders.config(folder), epath.Path(tmp_path / "mt"), "bfloat16")
  Import(folder, folders.config(folder, mtp_num_layers=0), epath.Path(tmp_path / "mt"), "bfloat16")


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
  blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
  folders.copy(snapshot)
  blobs.mkdir()
  os.replace(snapshot / "model.safetensors", blobs / "0123")
  (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0123"))
  Import(snapshot, folders.config(snapshot), epath.Path(tmp_path / "mt"), "float32")


def test_a_target_that_is_there(tmp_path, model):
  (tmp_path / "0").mkdir()
  with pytest.raises(CheckpointError, match=r"0: already exists.*delete it, or choose another"):
    Import(folders.GOLDEN / "one_cycle", model, epath.Path(tmp_path / "0"), "float32")
  assert not list((tmp_path / "0").iterdir())


def test_a_disk_that_is_too_small(tmp_path, model, monkeypatch):
  monkeypatch.setattr(import_hf.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
  with pytest.raises(CheckpointError, match="GiB, but .* free; make room"):
    Import(folders.GOLDEN / "one_cycle", model, epath.Path(tmp_path / "0"), "float32")


def test_a_disk_that_fills_up(tmp_path, model, monkeypatch):
  job = Import(folders.GOLDEN / "one_cycle", model, epath.Path(tmp_path / "mt" / "0"), "float32")

  async def full(self, store, window):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

  monkeypatch.setattr(orbax_handlers.StreamedLeaf, "write", full)
  with pytest.raises(CheckpointError, match="the disk is full; make room"):
    job.run(Storage(), QUIET)
  assert not list((tmp_path / "mt").iterdir())


def test_a_disk_that_fills_up_while_other_leaves_are_written(tmp_path, model, monkeypatch):
  """No write is under way, or begins, once the folder has been removed."""
  job = Import(folders.GOLDEN / "one_cycle", model, epath.Path(tmp_path / "mt" / "0"), "float32")
  original = orbax_handlers.StreamedLeaf.write
  begun, ended = [], []

  async def write(self, store, window):
    begun.append(self)
    if len(begun) == 3:
      raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")
    await asyncio.sleep(0.2)
    try:
      await original(self, store, window)
    finally:
      ended.append(self)

  monkeypatch.setattr(orbax_handlers.StreamedLeaf, "write", write)
  with pytest.raises(CheckpointError, match="the disk is full; make room"):
    job.run(Storage(), QUIET)
  assert len(ended) == len(begun) - 1 > 2
  assert not list((tmp_path / "mt").iterdir())


def test_an_interrupted_import_leaves_nothing_and_can_be_run_again(tmp_path, model, monkeypatch):
  target = tmp_path / "mt" / "0"
  (tmp_path / "mt" / "0.orbax-checkpoint-tmp" / "items").mkdir(parents=True)  # what a killed process leaves
  job = Import(folders.GOLDEN / "one_cycle", model, epath.Path(target), "float32")
  written = []
  original = import_hf.blocks.read_block

  def read_block(*arguments):
    if len(written) == 20:
      raise KeyboardInterrupt
    written.append(arguments)
    return original(*arguments)

  monkeypatch.setattr(import_hf.blocks, "read_block", read_block)
  with pytest.raises(KeyboardInterrupt):
    job.run(Storage(), QUIET)
  assert not list((tmp_path / "mt").iterdir())
  monkeypatch.setattr(import_hf.blocks, "read_block", original)
  job.run(Storage(), QUIET)
  assert [path.name for path in (tmp_path / "mt").iterdir()] == ["0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
  target = tmp_path_factory.mktemp("mt") / "0"
  Import(folders.GOLDEN / "one_cycle", model, epath.Path(target), "float32").run(Storage(), QUIET)
  return target


def test_an_interrupted_export_leaves_nothing_and_can_be_run_again(tmp_path, model, checkpoint, monkeypatch):
  job = Export(epath.Path(checkpoint), model)
  original = import_hf.blocks.write_block
  count = iter(range(20))

  def write_block(*arguments):
    if next(count, None) is None:
      raise KeyboardInterrupt
    original(*arguments)

  monkeypatch.setattr(import_hf.blocks, "write_block", write_block)
  with pytest.raises(KeyboardInterrupt):
    job.run(tmp_path / "hf", "float32", None, QUIET)
  assert not list(tmp_path.iterdir())
  monkeypatch.setattr(import_hf.blocks, "write_block", original)
  job.run(tmp_path / "hf", "float32", None, QUIET)
  assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_export_onto_something(tmp_path, model, checkpoint):
  (tmp_path / "hf").mkdir()
  job = Export(epath.Path(checkpoint), model)
  job.run(tmp_path / "hf", "float32", None, QUIET)  # an empty folder is no obstacle
  before = (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns
  with pytest.raises(CheckpointError, match="not an empty folder"):
    job.run(tmp_path / "hf", "float32", None, QUIET)
  assert (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns == before


def test_an_export_to_a_disk_that_is_too_small(tmp_path, model, checkpoint, monkeypatch):
  def full(descriptor, offset, length):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(safetensors_file.os, "posix_fallocate", full)
  with pytest.raises(CheckpointError, match="cannot be written .*make room"):
    Export(epath.Path(checkpoint), model).run(tmp_path / "hf", "float32", None, QUIET)
  assert not list(tmp_path.iterdir())


def test_an_export_in_a_dtype_that_weights_cannot_have(tmp_path, model, checkpoint):
  with pytest.raises(CheckpointError, match="float64"):
    Export(epath.Path(checkpoint), model).run(tmp_path / "hf", "float64", None, QUIET)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"scan_layers": True, "inhomogeneous_layer_cycle_interval": 2}, ["scanned_blocks", "is missing"]),
    ({"base_moe_mlp_dim": 16}, ["wi_0 is (16, 64, 32), expected (16, 64, 16)"]),
    ({"q_lora_rank": 0}, ["self_attention/query/kernel is missing"]),
  ],
)
def test_an_export_of_another_model(model, checkpoint, settings, words):
  config = folders.config(folders.GOLDEN / "one_cycle", **settings)
  with pytest.raises(CheckpointError) as error:
    Export(epath.Path(checkpoint), config)
  for word in ["not a checkpoint of this model", *words]:
    assert word in str(error.value)


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"moe_shared_expert_dim": 40}, "moe_shared_expert_dim=40: not a multiple of base_moe_mlp_dim=32"),
    ({"mla_interleaved_rope": False}, "mla_interleaved_rope=False"),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
    ({"rope_min_timescale": 2}, "rope_min_timescale=2"),
    ({"routed_bias": False, "routed_bias_update_rate": 0.0}, "routed_bias=False"),
    ({"mlp_activations": ["gelu", "linear"]}, r"mlp_activations=\['gelu', 'linear'\]"),
    ({"attn_logits_soft_cap": 30.0}, "attn_logits_soft_cap=30.0"),
    ({"capacity_factor": 1.25, "sparse_matmul": False}, "capacity_factor=1.25: .*capacity_factor=-1"),
    ({"rope_type": "yarn", "rope_factor": 4}, "max_position_embeddings=256: .*export with max_position_embeddings=1024"),
  ],
)
def test_an_export_of_what_config_json_cannot_say(settings, words):
  with pytest.raises(CheckpointError, match=words):
    hf_config.from_maxtext(folders.config(folders.GOLDEN / "one_cycle", **settings))


@pytest.mark.parametrize(("mscale_all_dim", "expected"), [(-1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_the_way_out_of_yarns_positions_computes_the_same(mscale_all_dim, expected):
  """As the error says: max_position_embeddings = factor * original, and the factor of MLA's softmax scale as a number."""
  from maxtext_ling2.model import yarn

  given = {"rope_type": "yarn", "rope_factor": 4, "original_max_position_embeddings": 64, "max_position_embeddings": 128}
  trained = folders.config(folders.GOLDEN / "one_cycle", **given, rope_mscale_all_dim=mscale_all_dim)
  with pytest.raises(CheckpointError) as error:
    hf_config.from_maxtext(trained)
  words = re.findall(r"(max_position_embeddings|rope_mscale_all_dim)=([\d.]+) ", str(error.value).split("export with")[1])
  config = folders.config(folders.GOLDEN / "one_cycle", **given | {key: json.loads(value) for key, value in words})
  assert (config.max_position_embeddings, config.rope_mscale_all_dim) == (256, expected)
  assert (yarn.softmax_mscale(trained) or 0.0) == (yarn.softmax_mscale(config) or 0.0) == expected
  assert hf_config.to_maxtext(hf_config.from_maxtext(config))["rope_mscale_all_dim"] == expected


def test_no_routing_groups_are_one_group():
  config = folders.config(folders.GOLDEN / "one_cycle", n_routing_groups=-1)
  written = hf_config.from_maxtext(config)
  assert (written["n_group"], written["topk_group"]) == (1, 1)
  assert hf_config.to_maxtext(written)["n_routing_groups"] == 1


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_a_checkpoint_that_is_none(tmp_path, model, name):
  (tmp_path / "empty").mkdir()
  with pytest.raises(CheckpointError, match="no such folder|Orbax cannot read it"):
    Export(epath.Path(tmp_path / name), model)


def test_a_damaged_checkpoint(tmp_path, model, checkpoint):
  shutil.copytree(checkpoint, tmp_path / "0")
  (tmp_path / "0" / "items" / "_METADATA").write_text("{")
  with pytest.raises(CheckpointError, match="Orbax cannot read it"):
    Export(epath.Path(tmp_path / "0"), model)


def test_bfloat16_router_biases_are_widened(tmp_path, model):
  folder = folders.copy(tmp_path / "hf")
  name = "model.layers.1.mlp.gate.expert_bias"
  tensors(lambda values: values.__setitem__(name, values[name].astype(ml_dtypes.bfloat16)))(folder)
  Import(folder, model, epath.Path(tmp_path / "mt" / "0"), "bfloat16").run(Storage(), QUIET)
  stores = orbax_store.open_arrays(epath.Path(tmp_path / "mt" / "0"))
  bias = stores["params", "params", "decoder", "layers_1", "moe", "MoeBlock_0", "gate", "bias"].read().result()
  np.testing.assert_array_equal(bias, folders.read(folder)[name].astype(np.float32))
  assert bias.dtype == np.float32
