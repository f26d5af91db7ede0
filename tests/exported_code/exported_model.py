"""Folders as an export writes them, and tiny models with random weights, without MaxText and this package's imports."""

import functools
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))  # where code of folders is run from

import numpy as np
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
CODE = ROOT / "maxtext_ling2" / "checkpoint" / "torch_code"
CODE_FILES = ("configuration_ling2.py", "attention_ling2.py", "modeling_ling2.py")
CASES = ("one_cycle", "trailing_mtp")
GUARD = "load-with-trust_remote_code=True.safetensors"
AUTO_MAP = {
  "AutoConfig": "configuration_ling2.BailingMoeV2_5Config",
  "AutoModel": "modeling_ling2.BailingMoeV2_5Model",
  "AutoModelForCausalLM": "modeling_ling2.BailingMoeV2_5ForCausalLM",
}


def _module(name, path, **where):
  spec = importlib.util.spec_from_file_location(name, path, **where)
  module = sys.modules[name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


# The code as it is imported, not loaded from a folder. As a package of its own: its parents import JAX.
_module("torch_code", CODE / "__init__.py", submodule_search_locations=[str(CODE)])
configuration = importlib.import_module("torch_code.configuration_ling2")
attention = importlib.import_module("torch_code.attention_ling2")
modeling = importlib.import_module("torch_code.modeling_ling2")
reference = _module("torch_ling2", ROOT / "examples" / "torch_ling2.py")

TINY = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 4,
  "layer_group_size": 2,
  "num_attention_heads": 4,
  "head_dim": 16,
  "group_norm_size": 2,
  "kv_lora_rank": 24,
  "q_lora_rank": 20,
  "qk_nope_head_dim": 12,
  "qk_rope_head_dim": 8,
  "v_head_dim": 10,
  "first_k_dense_replace": 1,
  "num_experts": 8,
  "num_experts_per_tok": 3,
  "n_group": 4,
  "topk_group": 2,
  "moe_intermediate_size": 16,
  "num_shared_experts": 1,
  "routed_scaling_factor": 2.5,
  "num_nextn_predict_layers": 0,
  "mtp_loss_scaling_factor": 0.1,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0,
  "partial_rotary_factor": 0.5,
  "use_qk_norm": True,
  "linear_silu": False,
  "max_position_embeddings": 256,
  "pad_token_id": 0,
  "eos_token_id": None,
  "gla_decay_layer_offset": 0,
}
"""3 heads would do as well; heads * head_dim is not hidden_size, and no two widths agree."""


def tiny(seed=0, **changes):
  """A model in evaluation mode whose weights are random, norms' scales and routers' biases too."""
  config = configuration.BailingMoeV2_5Config(**{**TINY, **changes})
  model = modeling.BailingMoeV2_5ForCausalLM(config).eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, tensor in model.state_dict().items():
      noise = torch.randn(tensor.shape, generator=generator) * (0.02 if name.endswith("expert_bias") else 0.15)
      tensor.copy_(1 + noise if "norm" in name.split(".")[-2] else noise)
  return model


def tokens(rows, length, vocabulary=61, seed=1):
  return torch.from_numpy(np.random.RandomState(seed).randint(1, vocabulary, (rows, length)))


@functools.cache
def recorded(case, name):
  with np.load(GOLDEN / case / f"{name}.npz") as file:
    return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def write_folder(folder, case, **changes):
  """The golden folder of `case` as an export writes it: with the code, auto_map and the guard. None removes a key."""
  folder.mkdir(parents=True, exist_ok=True)
  config = json.loads((GOLDEN / case / "config.json").read_text())
  config |= {"auto_map": AUTO_MAP, "transformers_weights": GUARD, "gla_decay_layer_offset": 1, **changes}
  config = {key: value for key, value in config.items() if key not in changes or value is not None}
  (folder / "config.json").write_text(json.dumps(config))
  shutil.copy(GOLDEN / case / "model.safetensors", folder)
  for name in CODE_FILES:
    shutil.copy(CODE / name, folder)
  return folder


def load(folder, auto_class=AutoModelForCausalLM, **arguments):
  return auto_class.from_pretrained(folder, trust_remote_code=True, **arguments).eval()


@functools.cache
def golden(case, offset):
  """The model of a golden folder, loaded as a user does."""
  return load(write_folder(Path(tempfile.mkdtemp()) / f"{case}_{offset}", case, gla_decay_layer_offset=offset))


def cache_of(output):
  return output[modeling._CACHE]


def largest_error(ours, theirs):
  return (ours.detach().double() - theirs.double()).abs().max().item()
