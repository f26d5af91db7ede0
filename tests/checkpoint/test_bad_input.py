"""Folders, files and targets that are not what they must be: each is refused by name, and nothing is half-written."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import folders
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from rich.console import Console
from safetensors.numpy import load_file, save_file

from maxtext_ling2.checkpoint import hf_config, import_hf, orbax_store, safetensors_file, stock_tables
from maxtext_ling2.checkpoint.export_hf import Export
from maxtext_ling2.checkpoint.import_hf import Import
from maxtext_ling2.checkpoint.orbax_store import Storage
from maxtext_ling2.errors import CheckpointError, Ling2Error

QUIET = Console(quiet=True)
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def header(folder, change):
  """Rewrites the header of model.safetensors."""
  path = folder / "model.safetensors"
  data = path.read_bytes()
  length = struct.unpack("<Q", data[:8])[0]
  entries = json.loads(data[8 : 8 + length])
  text = change(entries)
  text = json.dumps(entries).encode() if text is None else text
  path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def entry(key, value, name=EXPERT):
  return lambda folder: header(folder, lambda entries: entries[name].__setitem__(key, value))


def tensors(change):
  def damage(folder):
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors")

  return damage


def config(**changes):
  def damage(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for key, value in changes.items():
      if value is ...:
        values.pop(key, None)
      else:
        values[key] = value
    path.write_text(json.dumps(values))

  return damage


def index(weight_map, **other):
  return lambda folder: (folder / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": weight_map, **other})
  )


def text(name, content):
  return lambda folder: (folder / name).write_bytes(content)


def cut(size):
  def damage(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])

  return damage


def link_out(folder):
  shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
  (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def dangling(folder):
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors").symlink_to(folder / "gone.safetensors")


def twice(folder):
  shutil.copyfile(folder / "model.safetensors", folder / "model-2.safetensors")


def pickled(folder):
  os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")


def no_weights(folder):
  (folder / "model.safetensors").unlink()


def reshape(values):
  values[EXPERT] = np.ascontiguousarray(values[EXPERT].T)


def rename(values):
  values["model.layers.0.attention.qkv.weight"] = values.pop("model.layers.0.attention.query_key_value.weight")


# (how the folder of `one_cycle` is damaged, words of the error)
FILES = {
  "empty file": (cut(0), ["model.safetensors", "not a safetensors file"]),
  "five bytes": (cut(5), ["not a safetensors file", "fetch the file again"]),
  "cut within the header": (cut(400), ["not a safetensors file", "400 bytes"]),
  "cut within the data": (cut(-1000), ["truncated", "header declares"]),
  "too long": (lambda f: (f / "model.safetensors").open("ab").write(b"12345678"), ["too long"]),
  "a header of 2^60 bytes": (text("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), ["not a safetensors file"]),
  "header is no JSON": (lambda f: header(f, lambda _: b"{not json"), ["header is not valid"]),
  "header is a list": (lambda f: header(f, lambda _: b"[]"), ["header is not valid"]),
  "header is not UTF-8": (lambda f: header(f, lambda _: b"\xff\xfe{}"), ["header is not valid"]),
  "header nests without end": (lambda f: header(f, lambda _: b"[" * 100_000), ["header is not valid"]),
  "no offsets": (lambda f: header(f, lambda e: e[EXPERT].pop("data_offsets") and None), ["header is not valid"]),
  "negative dimension": (entry("shape", [-32, 64]), ["header is not valid", "non-negative"]),
  "shape of text": (entry("shape", ["32", 64]), ["header is not valid"]),
  "shape of other size": (entry("shape", [32, 65]), [EXPERT, "needs"]),
  "offsets overlap": (entry("data_offsets", [0, 8192]), ["expected"]),
  "a git LFS pointer": (
    text("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    ["not a safetensors"],
  ),
  "quantized to 8 bits": (entry("dtype", "F8_E4M3"), [EXPERT, "F8_E4M3", "unquantized"]),
  "integers": (tensors(lambda v: v.__setitem__(EXPERT, v[EXPERT].astype(np.int32))), [EXPERT, "I32"]),
  "float64": (tensors(lambda v: v.__setitem__(EXPERT, v[EXPERT].astype(np.float64))), [EXPERT, "F64"]),
  "missing tensor": (tensors(lambda v: v.pop(EXPERT)), ["1 missing tensor:", EXPERT]),
  "superfluous tensor": (tensors(lambda v: v.__setitem__("model.extra", v[EXPERT])), ["1 unexpected", "model.extra"]),
  "renamed tensor": (tensors(rename), ["1 missing", "query_key_value", "1 unexpected", "attention.qkv"]),
  "transposed tensor": (tensors(reshape), ["1 misshapen", EXPERT, "(64, 32)", "expected (32, 64)"]),
  "two files with the same tensors": (twice, ["model.safetensors", "model-2.safetensors", "holds"]),
  "a pickle only": (pickled, ["no *.safetensors file"]),
  "no weights": (no_weights, ["no *.safetensors file"]),
  "a link out of the folder": (link_out, ["a link to", "elsewhere.safetensors", "out of the folder"]),
  "a link to nothing": (dangling, ["model.safetensors", "not a file"]),
  "index names a missing file": (index({EXPERT: "model-00002.safetensors"}), ["model-00002.safetensors", "not in the"]),
  "index climbs out": (index({EXPERT: "../one.safetensors"}), ["../one.safetensors", "not a *.safetensors file of this"]),
  "index with an absolute path": (index({EXPERT: "/etc/one.safetensors"}), ["/etc/one.safetensors", "not a *.safetens"]),
  "index names a pickle": (index({EXPERT: "pytorch_model.bin"}), ["pytorch_model.bin", "not a *.safetensors file"]),
  "index names an absent tensor": (index({"model.x": "model.safetensors"}), ["model.x", "is not there"]),
  "index is no JSON": (text("model.safetensors.index.json", b"{"), ["index.json", "not an index"]),
  "index without a map": (text("model.safetensors.index.json", b"{}"), ["not an index", "weight_map"]),
  "index is a list": (text("model.safetensors.index.json", b"[1]"), ["not an index"]),
  "no config.json": (lambda f: (f / "config.json").unlink(), ["config.json: no such file"]),
  "config.json is no JSON": (text("config.json", b"{'a': 1}"), ["config.json", "not valid JSON"]),
  "config.json is a list": (text("config.json", b"[]"), ["a list instead of a JSON object"]),
  "config.json of another size": (config(hidden_size=128), ["base_emb_dim=64 is not 128"]),
  "config.json of other numbers": (config(rope_theta=1e4, n_group=2), ["rope_max_timescale=", "n_routing_groups="]),
  "kv heads": (config(num_key_value_heads=2), ["num_key_value_heads=2", "num_attention_heads=4"]),
  "kv heads of the class default": (config(num_key_value_heads=1), ["num_key_value_heads=1"]),
  "partial rotary factor": (config(partial_rotary_factor=1.0), ["partial_rotary_factor=1.0", "qk_rope_head_dim=16"]),
  "rope_theta of half a radian": (config(rope_theta=10000.5), ["rope_theta=10000.5", "not an integer"]),
  "linear rope scaling": (config(rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling=", "not YaRN"]),
  "missing keys": (config(kv_lora_rank=..., n_group=...), ["lacks kv_lora_rank, n_group"]),
  "hidden_size as text": (config(hidden_size="64"), ["hidden_size='64'", "not a positive integer"]),
  "a layer count of zero": (config(num_hidden_layers=0), ["num_hidden_layers=0", "not a positive integer"]),
  "a negative epsilon": (config(rms_norm_eps=-1e-6), ["rms_norm_eps=-1e-06", "not a positive number"]),
  "use_qk_norm as a number": (config(use_qk_norm=1), ["use_qk_norm=1", "not true or false"]),
  "more dense layers than layers": (config(first_k_dense_replace=9), ["first_k_dense_replace=9", "num_hidden_layers=5"]),
  "experts that groups do not divide": (config(n_group=3), ["n_group=3", "num_experts=16"]),
  "bias": (config(use_bias=True), ["use_bias=True", "not False"]),
  "qkv bias": (config(use_qkv_bias=True), ["use_qkv_bias=True"]),
  "tied embeddings": (config(tie_word_embeddings=True), ["tie_word_embeddings=True"]),
  "gelu": (config(hidden_act="gelu"), ["hidden_act='gelu'", "'silu'"]),
  "softmax routing": (config(score_function="softmax"), ["score_function='softmax'", "'sigmoid'"]),
  "rotary halves": (config(rope_interleave=False), ["rope_interleave=False"]),
  "no router bias": (config(moe_router_enable_expert_bias=False), ["moe_router_enable_expert_bias=False"]),
  "quantized": (config(quantization_config={"quant_method": "fp8"}), ["quantization_config", "quantized"]),
  "Ling 2.0": (config(architectures=["BailingMoeV2ForCausalLM"]), ["BailingMoeV2ForCausalLM", "Ling 2.0", "would need"]),
  "Ring-linear": (config(architectures=["BailingMoeLinearV2ForCausalLM"]), ["Ring-linear 2.0", "GQA instead of MLA"]),
  "Ling 3.0": (config(architectures=["BailingHybridForCausalLM"]), ["Ling 3.0", "KDA"]),
  "model_type alone": (config(architectures=...), ["bailing_hybrid", "Ling 2.5 or Ling 3.0", "KDA"]),
  "Llama": (config(architectures=["LlamaForCausalLM"], model_type="llama"), ["LlamaForCausalLM", "'llama'"]),
}


@pytest.fixture(scope="module")
def model():
  """The MaxText config of the undamaged folder: what the user asks for."""
  return folders.config(folders.GOLDEN / "one_cycle")


@pytest.mark.parametrize(("damage", "words"), FILES.values(), ids=FILES)
def test_a_damaged_folder_is_refused_before_anything_is_written(tmp_path, model, damage, words):
  folder = folders.copy(tmp_path / "hf")
  damage(folder)
  with pytest.raises(Ling2Error) as error:
    Import(folder, model, epath.Path(tmp_path / "mt" / "0"), "float32")
  assert isinstance(error.value, CheckpointError)
  for word in words:
    assert word in str(error.value)
  assert not (tmp_path / "mt").exists()


def test_there_are_enough_of_them():
  assert len(FILES) >= 60


def test_all_faults_of_a_config_are_named_at_once(tmp_path):
  folder = folders.copy(tmp_path / "hf")
  config(use_bias=True, hidden_act="gelu", num_key_value_heads=1)(folder)
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
  with pytest.raises(CheckpointError, match="missing tensors: model.layers.6"):
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
  with pytest.raises(CheckpointError, match=r"0: already there.*delete it, or choose another"):
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

  monkeypatch.setattr(orbax_store.StreamedLeaf, "write", full)
  with pytest.raises(CheckpointError, match="the disk is full; make room"):
    job.run(Storage(), QUIET)
  assert not list((tmp_path / "mt").iterdir())


def test_an_interrupted_import_leaves_nothing_and_can_be_run_again(tmp_path, model, monkeypatch):
  target = tmp_path / "mt" / "0"
  (tmp_path / "mt" / "0.orbax-checkpoint-tmp" / "items").mkdir(parents=True)  # what a killed process leaves
  job = Import(folders.GOLDEN / "one_cycle", model, epath.Path(target), "float32")
  written = []
  original = import_hf.blocks.fill

  def fill(*arguments):
    if len(written) == 20:
      raise KeyboardInterrupt
    written.append(arguments)
    return original(*arguments)

  monkeypatch.setattr(import_hf.blocks, "fill", fill)
  with pytest.raises(KeyboardInterrupt):
    job.run(Storage(), QUIET)
  assert not list((tmp_path / "mt").iterdir())
  monkeypatch.setattr(import_hf.blocks, "fill", original)
  job.run(Storage(), QUIET)
  assert [path.name for path in (tmp_path / "mt").iterdir()] == ["0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
  target = tmp_path_factory.mktemp("mt") / "0"
  Import(folders.GOLDEN / "one_cycle", model, epath.Path(target), "float32").run(Storage(), QUIET)
  return target


def test_an_interrupted_export_leaves_nothing_and_can_be_run_again(tmp_path, model, checkpoint, monkeypatch):
  job = Export(epath.Path(checkpoint), model)
  original = import_hf.blocks.spill
  count = iter(range(20))

  def spill(*arguments):
    if next(count, None) is None:
      raise KeyboardInterrupt
    original(*arguments)

  monkeypatch.setattr(import_hf.blocks, "spill", spill)
  with pytest.raises(KeyboardInterrupt):
    job.run(tmp_path / "hf", "float32", None, QUIET)
  assert not list(tmp_path.iterdir())
  monkeypatch.setattr(import_hf.blocks, "spill", original)
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
  ],
)
def test_an_export_of_what_hugging_face_has_not(settings, words):
  settings = {"base_moe_mlp_dim": 32, "shared_experts": 1, "routed_bias": True} | settings
  yml = {"head_dim": 32, "qk_rope_head_dim": 16, "moe_shared_expert_dim": 32, "partial_rotary_factor": 0.5}
  sizes = {"base_num_decoder_layers": 5, "base_emb_dim": 64, "base_mlp_dim": 96, "base_num_query_heads": 4}
  with pytest.raises(CheckpointError, match=words):
    hf_config.from_maxtext(stock_tables.structure({**yml, **sizes, **settings, "mla_interleaved_rope": True} | settings))


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_a_checkpoint_that_is_none(tmp_path, model, name):
  (tmp_path / "empty").mkdir()
  with pytest.raises(CheckpointError, match="no such folder|not a readable Orbax checkpoint"):
    Export(epath.Path(tmp_path / name), model)


def test_a_damaged_checkpoint(tmp_path, model, checkpoint):
  shutil.copytree(checkpoint, tmp_path / "0")
  (tmp_path / "0" / "items" / "_METADATA").write_text("{")
  with pytest.raises(CheckpointError, match="not a readable Orbax checkpoint"):
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
