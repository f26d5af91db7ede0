"""Hugging Face folders with random weights, written by the safetensors library, and MaxText configs of their models."""

import json
import shutil
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from maxtext_ling2.checkpoint import stock_tables
from maxtext_ling2.verify import model

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("one_cycle", "trailing_mtp")
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}

# head_dim 6 and 3 heads, no two dimensions alike: a wrong axis shows. Five experts, which no power of two divides.
TINY = {
  "architectures": ["BailingMoeV2_5ForCausalLM"],
  "model_type": "bailing_hybrid",
  "hidden_size": 20,
  "intermediate_size": 28,
  "num_hidden_layers": 6,
  "vocab_size": 33,
  "first_k_dense_replace": 1,
  "layer_group_size": 2,
  "rms_norm_eps": 1e-6,
  "num_attention_heads": 3,
  "head_dim": 12,
  "group_norm_size": 3,
  "use_qk_norm": True,
  "q_lora_rank": 11,
  "kv_lora_rank": 9,
  "qk_nope_head_dim": 10,
  "qk_rope_head_dim": 6,
  "v_head_dim": 7,
  "num_experts": 5,
  "num_experts_per_tok": 2,
  "moe_intermediate_size": 13,
  "num_shared_experts": 2,
  "n_group": 1,
  "topk_group": 1,
  "routed_scaling_factor": 2.5,
  "partial_rotary_factor": 0.5,
  "max_position_embeddings": 128,
  "rope_theta": 10000.0,
  "num_nextn_predict_layers": 0,
}


def weights(config, dtype="BF16"):
  """{name: random array}; router biases are float32."""

  def one(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    value = rng.standard_normal(shape) * 0.1 + name.endswith("norm.weight")
    return value.astype(np.float32 if name.endswith("expert_bias") else DTYPES[dtype])

  return {name: one(name, shape) for name, shape in stock_tables.hf_shapes(config).items()}


def write(folder, dtype="BF16", files=1, **changes):
  """A folder of TINY with changes; with several files there is an index, and MTP has a file of its own outside it."""
  config = {**TINY, **changes}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  tensors = weights(config, dtype)
  mtp = {name: tensors.pop(name) for name in list(tensors) if is_mtp(name, config)} if files > 1 else {}
  if files == 1:
    save_file(tensors, folder / "model.safetensors")
    return folder
  names, weight_map = sorted(tensors), {}
  for i in range(files):
    file = f"model-{i + 1:05}-of-{files:05}.safetensors"
    part = names[i::files]
    save_file({name: tensors[name] for name in part}, folder / file)
    weight_map |= dict.fromkeys(part, file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  if mtp:
    save_file(mtp, folder / "mtp.safetensors")
  return folder


def is_mtp(name, config):
  layers = range(config["num_hidden_layers"], config["num_hidden_layers"] + config["num_nextn_predict_layers"])
  return name.startswith(tuple(f"model.layers.{layer}." for layer in layers)) if layers else False


def copy(folder, case="one_cycle"):
  """A copy of an oracle folder's checkpoint, to be damaged."""
  folder.mkdir(parents=True, exist_ok=True)
  for file in ("config.json", "model.safetensors"):
    shutil.copyfile(GOLDEN / case / file, folder / file)
  return folder


def read(folder):
  """All tensors of a folder, read by the safetensors library."""
  tensors = {}
  for path in sorted(Path(folder).glob("*.safetensors")):
    with safe_open(path, framework="numpy") as file:
      tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  the file itself is not iterable
  return tensors


def config(folder, **settings):
  """The MaxText config of a folder's model."""
  return model.make_config(folder, 1, 16, **settings)


def stacked(leaf, get):
  """A whole leaf, put together by np.stack instead of in blocks.

  Args:
    leaf: of `stacking.leaves`.
    get: Hugging Face name -> tensor.
  """

  def one(entry):
    parts = [(get(name).T if entry.linear else get(name)).reshape(entry.one_shape) for name in entry.names]
    return np.stack(parts) if len(parts) > 1 else parts[0]

  cycles = [[one(entry) for entry in cycle] for cycle in leaf.entries]
  if leaf.num_stacked_axes == 2:
    return np.stack([np.stack(cycle, axis=leaf.axis) for cycle in cycles], axis=leaf.axis)
  return np.stack([cycle[0] for cycle in cycles], axis=leaf.axis) if leaf.num_stacked_axes else cycles[0][0]


def unstacked(values):
  """{Hugging Face name: tensor} of {leaf: whole array}, taken apart by np.moveaxis instead of in blocks."""
  tensors = {}
  for leaf, value in values.items():
    for axis in range(leaf.num_stacked_axes):
      value = np.moveaxis(value, leaf.axis + axis, axis)
    value = value.reshape(len(leaf.entries), len(leaf.entries[0]), *leaf.first.shape)
    for cycle, of_cycle in zip(leaf.entries, value, strict=True):
      for entry, of_entry in zip(cycle, of_cycle, strict=True):
        parts = of_entry if len(entry.names) > 1 else [of_entry]
        parts = [part.reshape(entry.hf_shape[::-1]).T if entry.linear else part for part in parts]
        tensors |= zip(entry.names, parts, strict=True)
  return tensors


def assert_equal(ours, theirs):
  """The same names, dtypes and bits."""
  assert set(ours) == set(theirs)
  for name, value in theirs.items():
    assert ours[name].dtype == value.dtype, name
    assert ours[name].tobytes() == value.tobytes(), name
