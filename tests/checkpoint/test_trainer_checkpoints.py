"""Checkpoints that MaxText's own trainers saved are exported: every tensor as MaxText restores it, none left behind.

The trainers run in processes of their own, with adamw and an MTP layer: pre-training unscanned, and scanned on 8 devices;
and native supervised fine-tuning.
"""

import functools
import json
import logging
import os
import subprocess
import sys

import folders
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from maxtext_ling2.checkpoint import orbax_store, stacking
from maxtext_ling2.checkpoint.export_hf import Export
from maxtext_ling2.checkpoint.import_hf import Import
from maxtext_ling2.checkpoint.orbax_store import Storage
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.maxtext_api import overrides, session
from maxtext_ling2.maxtext_api.start import maxtext_folder
from maxtext_ling2.verify import tensors
from tiny import TINY
from training.stock_runs import SMALL, arguments, run, write_documents

QUIET = Console(quiet=True)
WHOLE_EXPERTS = {"moe_shared_expert_dim": 32}  # shared experts as wide as two others, as config.json counts them
LAYERS = {"base_num_decoder_layers": SMALL["base_num_decoder_layers"]}
SFT = "maxtext.trainers.post_train.sft.train_sft_native"
EIGHT = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
RUNS = {
  "unscanned": {"scan_layers": False, "base_num_decoder_layers": 4},
  "eight": {"scan_layers": True, "per_device_batch_size": 1, "ici_fsdp_parallelism": 8},
  "tuned": {"scan_layers": False, "vocab_size": 151936, "base_num_decoder_layers": 4, "per_device_batch_size": 1},
}

SLOW = {"unscanned": (), "eight": pytest.mark.slow, "tuned": pytest.mark.slow}


def chats(folder):
  """The settings of native fine-tuning on a file of conversations, which is written."""
  turns = [[("user", f"What is {i} and one?"), ("assistant", f"It is {i + 1}.")] for i in range(8)]
  lines = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
  (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  tokenizer = maxtext_folder() / "assets" / "tokenizers" / "qwen3-tokenizer"
  return {
    "dataset_type": "hf",
    "hf_path": "json",
    "hf_train_files": folder / "chat.jsonl",
    "train_split": "train",
    "train_data_columns": ["messages"],
    "tokenizer_type": "huggingface",
    "tokenizer_path": tokenizer,
    "sft_train_on_completion_only": True,
    "packing": True,
    "num_epoch": 100,
    "max_target_length": 64,
  }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A function: name of a run -> folder of its last step. A run of two steps begins when first asked for."""
  folder = tmp_path_factory.mktemp("trained")
  documents = write_documents(folder)
  variables = {
    "unscanned": {},
    "eight": {"XLA_FLAGS": EIGHT},
    "tuned": {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
  }

  @functools.cache
  def train(name):
    read = chats(folder) if name == "tuned" else documents
    words = arguments(folder, name, name, 2, **read, **WHOLE_EXPERTS, **RUNS[name])
    run(folder, [SFT, *words] if name == "tuned" else words, **variables[name])
    return folder / name / "checkpoints" / "1"

  return train


def config(name, **changes):
  """The MaxText config of a run, on this process's one device."""
  settings = {**TINY, **WHOLE_EXPERTS, **LAYERS, **RUNS[name], **changes}
  return session.make_config(**settings | {"ici_fsdp_parallelism": 1})


def restored(checkpoint, cfg):
  """{Hugging Face name: tensor} of what MaxText restores."""
  values = session.restore(cfg, session.make_mesh(cfg), str(checkpoint / "items"))
  return folders.unstacked({leaf: np.asarray(values[leaf.path]) for leaf in stacking.leaves(cfg)})


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW[name]) for name in RUNS])
def test_every_tensor_is_exported_as_maxtext_restores_it(trained, tmp_path, name, caplog):
  cfg = config(name)
  with caplog.at_level(logging.WARNING):
    Export(epath.Path(trained(name)), cfg).run(tmp_path / "hf", "float32", None, QUIET)
  # Nothing is said but, of the models whose layers are no whole cycles, what others would compute.
  assert ["vLLM, SGLang and sglang-jax have no" in line for line in caplog.messages] == [True] * (name != "eight")
  expected = restored(trained(name), cfg)
  folders.assert_equal(folders.read(tmp_path / "hf"), expected)
  assert sum("mtp" in "/".join(path) for path in orbax_store.open_arrays(epath.Path(trained(name)))) > 20
  biases = [value for key, value in expected.items() if key.endswith("expert_bias")]
  assert len(biases) == cfg.num_decoder_layers and all(np.abs(bias).max() > 0 for bias in biases)  # trained: no zeros
  reports = tensors.compare(trained(name), tmp_path / "hf", cfg)
  assert {report.name for report in reports} == set(expected) and all(report.passed for report in reports)
  Import(tmp_path / "hf", cfg, epath.Path(tmp_path / "mt" / "0"), "float32").run(Storage(), QUIET)
  folders.assert_equal(restored(tmp_path / "mt" / "0", cfg), expected)


@pytest.mark.slow
def test_maxtexts_command_exports_it(trained, tmp_path):
  """As a user does after `make demo`, on a checkpoint that 8 devices saved."""
  words = {**TINY, **SMALL, **WHOLE_EXPERTS, **RUNS["eight"], "ici_fsdp_parallelism": 1, "run_name": "export"}
  words |= {"base_output_directory": tmp_path / "hf", "load_parameters_path": trained("eight") / "items"}
  base = maxtext_folder() / "configs" / "base.yml"
  command = [sys.executable, "-m", "maxtext_ling2", "run", "maxtext.checkpoint_conversion.to_huggingface", str(base)]
  done = subprocess.run([*command, *overrides.words(words)], capture_output=True, text=True, timeout=280)
  assert done.returncode == 0, done.stderr[-3000:]
  folders.assert_equal(folders.read(tmp_path / "hf"), restored(trained("eight"), config("eight")))


LOST = {
  "fewer layers": ({"base_num_decoder_layers": 3}, "decoder/layers_3/"),
  "no shared experts": ({"shared_experts": 0}, "shared_experts/wi_0/kernel"),
  "no qk-norm": ({"use_qk_norm": False}, "self_attention/key_norm/scale"),
  "no router bias": ({"routed_bias": False, "routed_bias_update_rate": 0.0}, "routed_bias=False"),
}


@pytest.mark.parametrize(("changes", "words"), LOST.values(), ids=LOST)
def test_no_tensor_is_left_behind_in_silence(trained, changes, words):
  with pytest.raises(CheckpointError, match="not in the model|the only value config.json can represent") as error:
    Export(epath.Path(trained("unscanned")), config("unscanned", **changes))
  assert words in str(error.value)


def test_mtp_is_left_out_when_asked_and_named(trained, tmp_path, caplog):
  cfg = config("unscanned", mtp_num_layers=0)
  with caplog.at_level(logging.WARNING, "maxtext_ling2"):
    Export(epath.Path(trained("unscanned")), cfg).run(tmp_path / "hf", "float32", None, QUIET)
  (line,) = (message for message in caplog.messages if "left out" in message)
  assert "21 tensors of MTP (mtp_block/mtp_layer_1/" in line and "mtp_num_layers=0" in line
  assert not [name for name in folders.read(tmp_path / "hf") if name.startswith("model.layers.4.")]


def test_orbaxs_own_reason_is_in_the_error(trained, tmp_path):
  """A type of leaf that nobody knows: as `jax.Array` was before."""
  items = tmp_path / "0" / "items"
  items.mkdir(parents=True)
  text = (trained("unscanned") / "items" / "_METADATA").read_text()
  (items / "_METADATA").write_text(text.replace('"jax.Array"', '"some.Array"'))
  with pytest.raises(CheckpointError, match=r"Orbax cannot read it .*some\.Array.*saved completely"):
    orbax_store.open_arrays(epath.Path(tmp_path / "0"))
