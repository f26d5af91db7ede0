"""config.json: every key is translated, checked, or known not to compute; what is unknown or contradictory is refused.

The cases are what transformers 4 and 5, other models of the family and fine-tuning really leave in a folder.
"""

import json

import folders
import pytest
import transformers
import yaml
from etils import epath
from folders import TINY
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from maxtext_ling2.checkpoint import hf_config, hf_keys
from maxtext_ling2.checkpoint.import_hf import Import
from maxtext_ling2.cli import app
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.maxtext_api import session

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.7}
LONG = TINY | {"max_position_embeddings": 256}
ON_TOP = ("rope_theta", "partial_rotary_factor")
MOVED = {key: value for key, value in TINY.items() if key not in ON_TOP}
PARAMETERS = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}


def command(tmp_path, config):
  """`maxtext-ling2 config` on a folder with this config.json: the settings of its YAML file, or the error text."""
  (tmp_path / "config.json").write_text(json.dumps(config))
  found = CliRunner().invoke(app, ["config", str(tmp_path)], terminal_width=300)
  if found.exit_code == 0:
    return yaml.safe_load(found.stdout)
  assert found.exit_code == 1 and found.stdout == ""
  return " ".join(found.stderr.split())


# Read as the same model: what -> (config.json, config.json in the old layout).
EQUAL = {
  "rope_theta on top, YaRN in rope_parameters": (
    LONG | {"rope_parameters": YARN | {"rope_theta": 10000.0}},
    LONG | {"rope_scaling": YARN},
  ),
  "theta and factor only in rope_parameters": (MOVED | {"rope_parameters": PARAMETERS}, TINY),
  "rope_parameters without a type": (
    MOVED | {"rope_parameters": {key: PARAMETERS[key] for key in ON_TOP}},
    TINY,
  ),
  "YaRN wholly in rope_parameters": (
    MOVED | {"max_position_embeddings": 256, "rope_parameters": PARAMETERS | YARN | {"rope_type": "yarn"}},
    LONG | {"rope_scaling": YARN},
  ),
  "both layouts, equal": (
    LONG | {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000}},
    LONG | {"rope_scaling": YARN},
  ),
  "both, the defaults written out in one": (
    LONG | {"rope_scaling": YARN, "rope_parameters": YARN | {"beta_fast": 32, "beta_slow": 1, "truncate": True}},
    LONG | {"rope_scaling": YARN},
  ),
  "no scaling, by type": (TINY | {"rope_scaling": {"rope_type": "default"}}, TINY),
}


@pytest.mark.parametrize(("config", "same"), EQUAL.values(), ids=EQUAL)
def test_two_layouts_of_one_model(tmp_path, config, same):
  settings = command(tmp_path, config)
  assert settings == command(tmp_path, same)
  assert settings["rope_max_timescale"] == 10000 and settings["partial_rotary_factor"] == 0.5
  if "yarn" in json.dumps(config):
    assert (settings["rope_type"], settings["rope_factor"]) == ("yarn", 4)
    assert settings["original_max_position_embeddings"] == 64
    assert settings["rope_mscale_all_dim"] == 0.7


@pytest.mark.parametrize("scaling", [None, YARN, YARN | {"attention_factor": 1.25}], ids=["plain", "yarn", "factor"])
def test_what_the_installed_transformers_writes(tmp_path, scaling):
  """A configuration object of the official kind, saved by transformers: no torch is needed for it."""

  class Official(transformers.PretrainedConfig):
    model_type = "bailing_hybrid"

    def __init__(self, **keys):
      for key in {**TINY, "rope_scaling": None}.keys() - {"architectures", "model_type"}:
        setattr(self, key, keys.pop(key, None))
      super().__init__(**keys)

  original = LONG | {"rope_scaling": scaling}
  Official(**original).save_pretrained(tmp_path / "saved")
  saved = hf_config.read(tmp_path / "saved")
  assert ("rope_parameters" in saved) == (int(transformers.__version__.split(".")[0]) >= 5)
  assert hf_config.to_maxtext(saved) == hf_config.to_maxtext(original)


REFUSED = {
  "theta twice": (TINY | {"rope_parameters": PARAMETERS | {"rope_theta": 6e6}}, ["rope_theta=10000.0", "6000000.0"]),
  "partial factor twice": (
    TINY | {"rope_parameters": PARAMETERS | {"partial_rotary_factor": 1.0}},
    ["partial_rotary_factor=0.5", "rope_parameters.partial_rotary_factor=1.0"],
  ),
  "factor twice": (
    LONG | {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 8.0}},
    ["rope_scaling.factor=4.0", "rope_parameters.factor=8.0"],
  ),
  "a parameter in one of two": (
    LONG | {"rope_scaling": YARN, "rope_parameters": YARN | {"beta_fast": 16}},
    ["rope_scaling.beta_fast=32", "rope_parameters.beta_fast=16"],
  ),
  "types that differ": (
    LONG | {"rope_scaling": YARN, "rope_parameters": PARAMETERS},
    ["rope_scaling.rope_type='yarn'", "rope_parameters.rope_type='default'"],
  ),
  "two types in one": (
    LONG | {"rope_scaling": YARN | {"rope_type": "default"}},
    ["rope_scaling.type='yarn'", "rope_scaling.rope_type='default'"],
  ),
  "llama3": (
    TINY | {"rope_parameters": PARAMETERS | {"rope_type": "llama3", "factor": 8.0}},
    ["rope_parameters=", "not YaRN"],
  ),
  "linear": (TINY | {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling=", "not YaRN"]),
  "no type": (LONG | {"rope_scaling": {"factor": 4.0}}, ["rope_scaling={'factor': 4.0}", "without a type"]),
  "no type in the new layout": (TINY | {"rope_parameters": {"factor": 4.0}}, ["rope_parameters=", "without a type"]),
  "default with a factor": (TINY | {"rope_parameters": PARAMETERS | {"factor": 2.0}}, ["rope_parameters.factor=2.0"]),
  "a list": (TINY | {"rope_parameters": [1.0]}, ["rope_parameters=[1.0]", "list"]),
  "a text": (TINY | {"rope_scaling": "yarn"}, ["rope_scaling='yarn'", "str"]),
  "factor zero": (LONG | {"rope_scaling": YARN | {"factor": 0}}, ["rope_scaling.factor=0", "not positive"]),
  "truncate as a number": (
    LONG | {"rope_scaling": YARN | {"truncate": 1}},
    ["rope_scaling.truncate=1", "not true or false"],
  ),
  "negative mscale_all_dim": (
    LONG | {"rope_scaling": YARN | {"mscale_all_dim": -1.0}},
    ["rope_scaling.mscale_all_dim=-1.0", "not positive"],
  ),
  "an original length below 1": (
    LONG | {"rope_scaling": YARN | {"original_max_position_embeddings": 5e-324}},
    ["original_max_position_embeddings=5e-324", "not positive"],
  ),
  "a number beyond floats": (
    LONG | {"rope_scaling": YARN | {"factor": 10**400}},
    ["rope_scaling.factor=1000", "not a number"],
  ),
  "a trillion layers": (
    TINY | {"num_hidden_layers": 10**12},
    ["num_hidden_layers=1000000000000", "not a number of layers"],
  ),
  "another weight file": (
    TINY | {"transformers_weights": "other.safetensors"},
    ["transformers_weights='other.safetensors'"],
  ),
  "clamped experts": (TINY | {"expert_swiglu_limit_list": [7.0]}, ["expert_swiglu_limit_list=[7.0]", "None"]),
  "clamped shared experts": (TINY | {"share_expert_swiglu_limit_list": [0.0]}, ["share_expert_swiglu_limit_list"]),
  "an unknown key": (TINY | {"logit_scale": 0.5}, ["logit_scale=0.5", f"{hf_keys.IGNORE}=logit_scale"]),
  "an unknown key that is null": (TINY | {"new_thing": None}, ["new_thing=None"]),
  "KDA": (TINY | {"kda_lower_bound": -5.0}, ["kda_lower_bound=-5.0", "KDA"]),
  "KDA's switch": (TINY | {"no_kda_lora": True}, ["no_kda_lora=True"]),
  "linear attention": (TINY | {"linear_attention": {}}, ["linear_attention={}"]),
  "another linear attention": (TINY | {"linear_attn_config": {"a": 1}}, ["linear_attn_config"]),
  "short convolution": (TINY | {"short_conv_kernel_size": 4}, ["short_conv_kernel_size=4"]),
  "two architectures": (
    TINY | {"architectures": ["BailingMoeV2_5ForCausalLM", "LlamaForCausalLM"]},
    ["more than BailingMoeV2_5ForCausalLM"],
  ),
  "grouped linear attention": (TINY | {"num_kv_heads_for_linear_attn": 1}, ["num_kv_heads_for_linear_attn=1", "0 or 3"]),
  "another shared width": (
    TINY | {"moe_shared_expert_intermediate_size": 39},
    ["moe_shared_expert_intermediate_size=39", "moe_intermediate_size", "13 or 26"],
  ),
  "other layer types": (TINY | {"layer_types": ["full_attention"] * 6}, ["layer_types=", "layer_group_size"]),
  "qk_head_dim": (TINY | {"qk_head_dim": 17}, ["qk_head_dim=17", "=16"]),
  "unnormalised weights": (TINY | {"norm_topk_prob": False}, ["norm_topk_prob=False"]),
  "softmax scores": (TINY | {"scoring_func": "softmax"}, ["scoring_func='softmax'"]),
  "another top-k": (TINY | {"topk_method": "greedy"}, ["topk_method='greedy'"]),
  "a router in bfloat16": (TINY | {"router_dtype": "bf16"}, ["router_dtype='bf16'"]),
  "sliding windows": (TINY | {"sliding_window": 512}, ["sliding_window=512"]),
  "dropout": (TINY | {"attention_dropout": 0.1}, ["attention_dropout=0.1"]),
  "two names of one switch": (
    TINY | {"linear_silu": True, "use_linear_silu": False},
    ["linear_silu=True", "use_linear_silu=False"],
  ),
  "a switch as text": (TINY | {"linear_silu": "no"}, ["linear_silu='no'", "not true or false"]),
  "an offset of 2": (TINY | {"gla_decay_layer_offset": 2}, ["gla_decay_layer_offset=2", "neither 0 nor 1"]),
  "an MTP weight as text": (TINY | {"mtp_loss_scaling_factor": "0.1"}, ["mtp_loss_scaling_factor='0.1'"]),
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(tmp_path, config, words):
  text = command(tmp_path, config)
  assert isinstance(text, str) and text.startswith("error:")
  for word in words:
    assert word in text


ACCEPTED = {
  "published keys": {
    "attn_implementation": "flash_attention_2", "auto_map": {"AutoConfig": "x.Y"}, "dtype": "bfloat16",
    "embedding_dropout": 0.0, "eos_token_id": [1, 2], "expert_swiglu_limit_list": None, "hidden_act": "silu",
    "max_window_layers": 28, "moe_router_enable_expert_bias": True, "moe_shared_expert_intermediate_size": 13,
    "norm_topk_prob": True, "num_kv_heads_for_linear_attn": 3, "output_dropout": 0.0, "output_router_logits": False,
    "pad_token_id": 0, "qk_head_dim": 16, "quantization_config": None, "rope_interleave": True, "rotary_dim": 6,
    "router_dtype": "fp32", "score_function": "sigmoid", "scoring_func": "sigmoid", "seq_aux": True,
    "sliding_window": None, "topk_method": "noaux_tc", "transformers_version": "4.57.1", "use_cache": True,
    "use_rmsnorm": True,
  },
  "the whole shared width": {"moe_shared_expert_intermediate_size": 26},
  "no grouped heads": {"num_kv_heads_for_linear_attn": 0, "num_key_value_heads": 3},
  "layer types": {
    "layer_types": ["linear_attention", "full_attention"] * 3, "mlp_layer_types": ["dense"] + ["sparse"] * 5,
  },
}  # fmt: skip


@pytest.mark.parametrize("more", ACCEPTED.values(), ids=ACCEPTED)
def test_keys_that_change_nothing(tmp_path, more):
  assert command(tmp_path, TINY | more) == command(tmp_path, TINY)


def test_every_key_of_transformers_own_is_in_the_table():
  own = transformers.PretrainedConfig().to_dict()
  assert len(own) > 10 and not [key for key in own if not hf_keys.is_known(key)]


def test_every_key_that_an_export_writes_is_in_the_table():
  written = hf_config.from_maxtext(session.make_config(model_name="ling2-tiny"))
  assert len(written) > 35 and not [key for key in written if not hf_keys.is_known(key)]


def test_a_key_that_the_user_knows_to_be_harmless(tmp_path, monkeypatch, caplog):
  monkeypatch.setenv(hf_keys.IGNORE, "first_thing, logit_scale")
  with caplog.at_level("WARNING", "maxtext_ling2"):
    assert command(tmp_path, TINY | {"logit_scale": 0.5}) == command(tmp_path, TINY)
  assert "config.json: logit_scale=0.5 is ignored" in caplog.messages[0]
  monkeypatch.setenv(hf_keys.IGNORE, "kda_lower_bound,use_bias")  # what is known is not to be ignored
  assert "kda_lower_bound" in command(tmp_path, TINY | {"kda_lower_bound": -5.0})
  assert "use_bias" in command(tmp_path, TINY | {"use_bias": True})


@pytest.mark.parametrize(
  ("shared", "width"), [(..., 13), (None, 0), (0, 0), (2, 26)], ids=["absent", "null", "zero", "two"]
)
def test_shared_experts_by_the_official_class(tmp_path, shared, width):
  config = {key: value for key, value in TINY.items() if key != "num_shared_experts"}
  settings = command(tmp_path, config if shared is ... else config | {"num_shared_experts": shared})
  assert settings["moe_shared_expert_dim"] == width and settings["shared_experts"] == min(1, width)


@pytest.mark.parametrize(
  ("head_dim", "read"), [(..., 128), (None, 8), (0, 8), (16, 16)], ids=["absent", "null", "0", "16"]
)
def test_head_dim_by_the_official_class(tmp_path, head_dim, read):
  config = TINY | {"hidden_size": 24, "qk_rope_head_dim": read // 2}
  config.pop("head_dim")
  assert command(tmp_path, config if head_dim is ... else config | {"head_dim": head_dim})["head_dim"] == read


def test_the_offset_of_an_exported_folder(tmp_path):
  assert command(tmp_path, TINY | {"gla_decay_layer_offset": 1})["gla_decay_layer_offset"] == 1
  assert "gla_decay_layer_offset" not in command(tmp_path, TINY)
  folder = folders.write(tmp_path / "hf", gla_decay_layer_offset=1)
  assert folders.config(folder).gla_decay_layer_offset == 1
  with pytest.raises(CheckpointError, match="gla_decay_layer_offset=0: config.json .* with gla_decay_layer_offset=1"):
    folders.config(folder, gla_decay_layer_offset=0)
  other = session.changed(folders.config(folder), gla_decay_layer_offset=0)
  with pytest.raises(CheckpointError, match="gla_decay_layer_offset=0 is not 1, as config.json says"):
    Import(folder, other, epath.Path(tmp_path / "0"), "float32")


def check(folder, **settings):
  Import(folder, folders.config(folder, **settings), epath.Path(folder.parent / "mt" / "0"), "bfloat16")


def test_mtp_in_config_json_without_tensors(tmp_path):
  folder = folders.write(tmp_path / "hf", files=2, num_nextn_predict_layers=1)
  (folder / "mtp.safetensors").unlink()
  with pytest.raises(CheckpointError, match=r"num_nextn_predict_layers=1 .*fine-tuning.*pass mtp_num_layers=0"):
    check(folder)
  check(folder, mtp_num_layers=0)


def test_mtp_and_another_tensor_missing(tmp_path):
  folder = folders.write(tmp_path / "hf", num_nextn_predict_layers=1)
  without(folder, "model.layers.6.", "model.norm.weight")
  with pytest.raises(CheckpointError) as error:  # both are named
    check(folder)
  assert "pass mtp_num_layers=0" in str(error.value) and "1 missing tensor: model.norm.weight" in str(error.value)


def test_mtp_that_is_damaged_is_not_explained_as_fine_tuning(tmp_path):
  folder = folders.write(tmp_path / "hf", num_nextn_predict_layers=1)
  without(folder, "model.layers.6.eh_proj.weight")
  with pytest.raises(CheckpointError, match=r"1 missing tensor: model\.layers\.6\.eh_proj\.weight") as error:
    check(folder)
  assert "fine-tuning" not in str(error.value)


@pytest.mark.parametrize("stated", [0, 1])
def test_more_mtp_tensors_than_config_json_says(tmp_path, stated):
  folder = folders.write(tmp_path / "hf", files=2, num_nextn_predict_layers=stated + 1)
  (folder / "config.json").write_text(json.dumps(hf_config.read(folder) | {"num_nextn_predict_layers": stated}))
  with pytest.raises(CheckpointError, match=r"of 1 MTP layer\(s\) .*mtp\.safetensors") as error:
    check(folder)
  assert f"has num_nextn_predict_layers={stated}; to use them write num_nextn_predict_layers={stated + 1}" in str(
    error.value
  )
  assert "to go on without them write that and pass mtp_num_layers=0" in str(error.value)
  (folder / "config.json").write_text(json.dumps(hf_config.read(folder) | {"num_nextn_predict_layers": stated + 1}))
  check(folder)
  check(folder, mtp_num_layers=0)


@pytest.mark.parametrize(
  ("has", "stated", "words"),
  [(0, 1, "pass mtp_num_layers=0"), (1, 0, "write num_nextn_predict_layers=1"), (1, 1, None), (0, 0, None)],
)
def test_the_config_command_says_so_too(tmp_path, caplog, has, stated, words):
  folder = folders.write(tmp_path / "hf", num_nextn_predict_layers=has)
  with caplog.at_level("WARNING", "maxtext_ling2"):
    settings = command(folder, hf_config.read(folder) | {"num_nextn_predict_layers": stated})
  assert settings["mtp_num_layers"] == stated
  lines = [message for message in caplog.messages if "MTP" in message]
  assert len(lines) == (words is not None) and all(words in line for line in lines)


def without(folder, *prefixes):
  """Takes tensors out of the folder's one file."""
  tensors = load_file(folder / "model.safetensors")
  kept = {name: value for name, value in tensors.items() if not name.startswith(prefixes)}
  assert len(kept) < len(tensors)
  save_file(kept, folder / "model.safetensors")


@pytest.mark.slow
def test_verify_leaves_mtp_out_too(tmp_path):
  """The command, on a fine-tuned folder, with MaxText's own conversion in between."""
  folder = folders.write(tmp_path / "hf", files=2, num_nextn_predict_layers=1)
  (folder / "mtp.safetensors").unlink()
  found = CliRunner().invoke(app, ["verify", str(folder), "--via-orbax"], terminal_width=300)
  assert found.exit_code == 1 and "pass mtp_num_layers=0" in " ".join(found.stderr.split())
  found = CliRunner().invoke(app, ["verify", str(folder), "mtp_num_layers=0", "--via-orbax"], terminal_width=300)
  assert found.exit_code == 0 and "PASS" in found.output, found.output


ODD = [None, True, -1, 0, 10**400, 1e308, 5e-324, float("nan"), float("inf"), "x", "", [], [1], {}, {"a": 1}]


def test_no_value_of_any_key_ends_in_another_error():
  """Every key of both oracle models, and of YaRN in both layouts, with values that JSON can hold."""
  yarn = YARN | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
  originals = [hf_config.read(folders.GOLDEN / case) for case in folders.CASES]
  originals += [LONG | {"rope_scaling": YARN, "rope_parameters": yarn}]
  tried = refused = 0
  for config in originals:
    places = [config, *(part for part in config.values() if isinstance(part, dict))]
    for place in places:
      for key, kept in list(place.items()):
        for value in ODD:
          place[key], tried = value, tried + 1
          try:
            hf_config.to_maxtext(config)
          except CheckpointError:
            refused += 1
        place[key] = kept
  assert tried > 1500 and 0.6 < refused / tried < 1.0


def test_mtp_left_out_everywhere_alike(tmp_path, caplog):
  """to_maxtext, verify and the weights of generate and eval: one rule, one line that says so."""
  from maxtext_ling2.inference import saved_model
  from maxtext_ling2.verify.model import Float32Model

  folder = folders.write(tmp_path / "hf", "F32", num_nextn_predict_layers=1)
  with caplog.at_level("WARNING", "maxtext_ling2"):
    check(folder, mtp_num_layers=0)
    Float32Model(folder, 1, 16, mtp_num_layers=0)
    saved_model._weights_of(folder, folders.config(folder, mtp_num_layers=0))
  lines = [message for message in caplog.messages if "left out" in message]
  assert len(lines) == 3 and len(set(lines)) == 1
  assert "tensors of MTP (model.layers.6." in lines[0] and "mtp_num_layers=0" in lines[0]


def test_what_macos_leaves_beside_the_weights(tmp_path):
  folder = folders.write(tmp_path / "hf")
  (folder / "._model.safetensors").write_bytes(b"Mac OS X        ATTR")
  check(folder)
