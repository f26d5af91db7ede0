"""Damaged Hugging Face folders: how each is damaged, and words of the error."""

import json
import os
import shutil
import struct

import numpy as np
from safetensors.numpy import load_file, save_file

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


INDEX_TWICE = b'{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}'


def twice_in_header(entries):
  return json.dumps({"!": entries[EXPERT], **entries}).replace('"!"', json.dumps(EXPERT), 1).encode()


def a_folder(folder):
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors").mkdir()


def config_is_a_folder(folder):
  (folder / "config.json").unlink()
  (folder / "config.json").mkdir()


def yarn(**parameters):
  return config(rope_scaling={"type": "yarn", "factor": 2.0, **parameters})


def reshape(values):
  values[EXPERT] = np.ascontiguousarray(values[EXPERT].T)


def rename(values):
  values["model.layers.0.attention.qkv.weight"] = values.pop("model.layers.0.attention.query_key_value.weight")


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
  "index names an absent tensor": (index({"model.x": "model.safetensors"}), ["model.x", "does not exist"]),
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
  "a tensor twice in the header": (lambda f: header(f, twice_in_header), ["header is not valid", EXPERT, "twice"]),
  "index with a tensor twice": (text("model.safetensors.index.json", INDEX_TWICE), ["index.json", "'a'", "twice"]),
  "a folder called model.safetensors": (a_folder, ["model.safetensors", "not a file"]),
  "index is a folder": (lambda f: (f / "model.safetensors.index.json").mkdir(), ["index.json"]),
  "index is not UTF-8": (text("model.safetensors.index.json", b"\xff\xfe"), ["index.json", "not an index"]),
  "index nests without end": (text("model.safetensors.index.json", b"[" * 100_000), ["index.json", "not an index"]),
  "config.json is empty": (text("config.json", b""), ["config.json", "not valid JSON"]),
  "config.json is not UTF-8": (text("config.json", b"\xff\xfe{}"), ["config.json", "not valid JSON"]),
  "config.json nests without end": (text("config.json", b"[" * 100_000), ["config.json", "not valid JSON"]),
  "config.json with a key twice": (text("config.json", b'{"a": 1, "a": 2}'), ["config.json", "'a'", "twice"]),
  "config.json is a number": (text("config.json", b"1"), ["config.json", "int instead of a JSON object"]),
  "config.json is a folder": (config_is_a_folder, ["config.json: no such file"]),
  "architectures as text": (config(architectures="BailingMoeV2_5ForCausalLM"), ["architectures=", "not a list of names"]),
  "architectures of lists": (config(architectures=[[1]]), ["architectures=[[1]]", "not a list of names"]),
  "infinite rope_theta": (config(rope_theta=float("inf")), ["rope_theta=inf", "not a positive number"]),
  "rms_norm_eps is no number": (config(rms_norm_eps=float("nan")), ["rms_norm_eps=nan", "not a positive number"]),
  "infinite partial rotary factor": (config(partial_rotary_factor=float("inf")), ["partial_rotary_factor=inf"]),
  "infinite YaRN factor": (yarn(factor=float("inf")), ["rope_scaling.factor=inf", "not a number"]),
  "YaRN's beta_fast is no number": (yarn(beta_fast=float("nan")), ["rope_scaling.beta_fast=nan", "not a number"]),
  "vocab_size true": (config(vocab_size=True), ["vocab_size=True", "not a positive integer"]),
  "Llama": (config(architectures=["LlamaForCausalLM"], model_type="llama"), ["LlamaForCausalLM", "'llama'"]),
}
