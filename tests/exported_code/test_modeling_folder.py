"""The exported folder as transformers opens and saves it: names, config.json, the guard against Ling 3.0, YaRN."""
# ruff: noqa: E402  what follows importorskip needs what it asks for

import json
import logging
import math
import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np
from exported_model import (
  AUTO_MAP,
  CASES,
  CODE,
  CODE_FILES,
  GOLDEN,
  GUARD,
  ROOT,
  TINY,
  configuration,
  largest_error,
  load,
  modeling,
  recorded,
  tiny,
  tokens,
  write_folder,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, pipeline
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

KNOWS_LING_3 = "bailing_hybrid" in CONFIG_MAPPING
"""Whether this transformers would take the folder for Ling 3.0's."""
YARN = {
  "type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 64,
  "beta_fast": 8.0,
  "beta_slow": 0.5,
  "mscale": 1.0,
  "mscale_all_dim": 0.7,
}


@pytest.fixture
def logged():
  """Warnings that transformers and the code of a folder log, in a list."""
  seen, handler = [], logging.Handler(logging.WARNING)
  handler.emit = lambda record: seen.append(record.getMessage())
  loggers = [logging.getLogger(), logging.getLogger("transformers")]  # the latter keeps its records to itself
  for logger in loggers:
    logger.addHandler(handler)
  yield seen
  for logger in loggers:
    logger.removeHandler(handler)


def saved(model, folder):
  """config.json and the weights after save_pretrained."""
  model.save_pretrained(folder)
  return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def equal(ours, theirs):
  return ours.keys() == theirs.keys() and all(
    ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
  )


@pytest.mark.parametrize("case", CASES)
def test_names_and_values_survive(case, tmp_path, logged):
  """MTP's weights too, and over several rounds; no weight is missing, unexpected or new."""
  weights, folder = load_file(GOLDEN / case / "model.safetensors"), write_folder(tmp_path / f"first_{case}", case)
  logits = []
  for round_trip in range(3):
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == "BailingMoeV2_5ForCausalLM" and model.dtype == torch.float32
    assert equal(dict(model.state_dict()), weights)
    with torch.no_grad():
      logits.append(model(recorded(case, "io_short")["input_ids"]).logits)
    folder = tmp_path / f"{case}_{round_trip}"
    config, again = saved(model, folder)
    assert equal(again, weights)
    assert config["auto_map"] == AUTO_MAP and config["transformers_weights"] == GUARD
    assert config["architectures"] == ["BailingMoeV2_5ForCausalLM"] and config["model_type"] == "bailing_hybrid"
    assert config["gla_decay_layer_offset"] == 1
    for name in CODE_FILES:
      assert (folder / name).read_text() == (CODE / name).read_text()
  assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
  assert not logged


def test_every_key_of_config_survives(tmp_path):
  folder = write_folder(tmp_path / "whole", "trailing_mtp", q_lora_rank=40)
  before, (after, _) = json.loads((folder / "config.json").read_text()), saved(load(folder), tmp_path / "again")
  assert before.pop("torch_dtype") == after["dtype"] == "float32"  # transformers has renamed it
  assert {key: after[key] for key in before} == before
  generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
  assert not {"transformers_weights", "auto_map", "rope_scaling"} & generation.keys()


def test_a_model_made_by_hand_saves_a_folder_that_loads(tmp_path):
  """The class was imported, not loaded from a folder: its code goes along all the same."""
  model = tiny(num_nextn_predict_layers=2, num_shared_experts=None, q_lora_rank=None)
  config, weights = saved(model, tmp_path / "by_hand")
  assert config["auto_map"] == AUTO_MAP and config["transformers_weights"] == GUARD
  assert config["num_shared_experts"] is None and config["q_lora_rank"] is None
  assert equal(weights, dict(model.state_dict()))
  again = load(tmp_path / "by_hand")
  assert type(again).__module__.startswith("transformers_modules")
  assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
  base = load(tmp_path / "by_hand", AutoModel)
  assert type(base).__name__ == "BailingMoeV2_5Model"
  assert torch.equal(base(tokens(2, 9)).last_hidden_state, model.model(tokens(2, 9)).last_hidden_state)


def test_a_configuration_alone(tmp_path):
  config = configuration.BailingMoeV2_5Config(**TINY)
  assert not hasattr(config, "transformers_weights")
  config.save_pretrained(tmp_path / "config")
  written = json.loads((tmp_path / "config" / "config.json").read_text())
  assert written["architectures"] == ["BailingMoeV2_5ForCausalLM"] and written["transformers_weights"] == GUARD
  again = AutoConfig.from_pretrained(tmp_path / "config", trust_remote_code=True)
  assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
  assert configuration.BailingMoeV2_5Config.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_loaded_in_bfloat16(tmp_path):
  folder = write_folder(tmp_path / "half", "trailing_mtp")
  model, exact = load(folder, dtype=torch.bfloat16), load_file(folder / "model.safetensors")
  expected = {name: value if name.endswith("expert_bias") else value.bfloat16() for name, value in exact.items()}
  assert equal(dict(model.state_dict()), expected)
  config, weights = saved(model, tmp_path / "half_again")
  assert equal(weights, expected) and config["dtype"] == "bfloat16"
  again = load(tmp_path / "half_again", dtype="auto")
  assert equal(dict(again.state_dict()), expected)
  ids = recorded("trailing_mtp", "io_short")["input_ids"]
  assert torch.equal(again(ids).logits, model(ids).logits)


def test_layers_on_disk(tmp_path):
  pytest.importorskip("accelerate")
  folder, ids = write_folder(tmp_path / "offloaded", "trailing_mtp"), recorded("trailing_mtp", "io_short")["input_ids"]
  places = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(8)}
  places |= {"model.word_embeddings": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
  model = load(folder, device_map=places, offload_folder=tmp_path / "disk")
  with torch.no_grad():
    assert torch.equal(model(ids).logits, load(folder)(ids).logits)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}])
def test_nobody_loads_it_as_ling_3(tmp_path, trust):
  first = write_folder(tmp_path / "guarded", "one_cycle")
  load(first).save_pretrained(tmp_path / "guarded_again")
  for folder in (first, tmp_path / "guarded_again"):
    for open_it in (
      lambda: AutoModelForCausalLM.from_pretrained(folder, **trust),  # noqa: B023  called at once
      lambda: AutoModel.from_pretrained(folder, **trust),  # noqa: B023
      lambda: pipeline("text-generation", model=str(folder), **trust),  # noqa: B023
    ):
      with pytest.raises((OSError, ValueError)) as raised:
        open_it()
      assert (GUARD if KNOWS_LING_3 else "trust_remote_code=True") in str(raised.value)


def test_pipeline_with_trust(tmp_path):
  folder = write_folder(tmp_path / "piped", "one_cycle")
  write_tokenizer(folder)
  generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
  text = generate("w3 w5 w8", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
  expected = load(folder).generate(torch.tensor([[3, 5, 8]]), max_new_tokens=4, do_sample=False)[0, 3:]
  assert text.split() == [f"w{token}" for token in expected.tolist()]


def write_tokenizer(folder):
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(384)}, unk_token="w0"))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(folder)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_tokenizer_opens(tmp_path, trust):
  if not trust and not KNOWS_LING_3:
    pytest.skip("transformers 4 asks before it reads a folder with code")
  folder = write_folder(tmp_path / "tokens", "one_cycle")
  write_tokenizer(folder)
  assert AutoTokenizer.from_pretrained(folder, **trust)("w7 w9")["input_ids"] == [7, 9]


def test_offset_of_the_decay(tmp_path, logged):
  """Absent: 1, as in the official code, and one line that says so; then written down."""
  io = recorded("one_cycle", "io_short")
  for offset, key in ((0, "slope_noshift"), (1, "eval"), (None, "eval")):
    folder = write_folder(tmp_path / f"offset_{offset}", "one_cycle", gla_decay_layer_offset=offset)
    model = load(folder)
    assert largest_error(model(io["input_ids"]).logits, io[f"{key}.logits"]) < 2e-5
    config, _ = saved(model, tmp_path / f"offset_{offset}_again")
    assert config["gla_decay_layer_offset"] == (1 if offset is None else offset)
  assert [line for line in logged if "gla_decay_layer_offset" in line] == [
    "gla_decay_layer_offset is not in config.json: taking 1, as the official PyTorch code does"
  ]
  folder = write_folder(tmp_path / "offset_2", "one_cycle", gla_decay_layer_offset=2)
  with pytest.raises(ValueError, match="gla_decay_layer_offset=2: not 0 or 1"):
    load(folder)


BOTH = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
NEW = {**YARN, **BOTH, "rope_type": "yarn"}
"""YARN as transformers 5 writes it."""

REFUSED = {
  "hidden_act='gelu'": {"hidden_act": "gelu"},
  "score_function='softmax'": {"score_function": "softmax"},
  "use_qkv_bias=True": {"use_qkv_bias": True},
  "use_bias=True": {"use_bias": True},
  "tie_word_embeddings=True": {"tie_word_embeddings": True},
  "rope_interleave=False": {"rope_interleave": False},
  "moe_router_enable_expert_bias=False": {"moe_router_enable_expert_bias": False},
  "norm_topk_prob=False": {"norm_topk_prob": False},
  "router_dtype='bf16'": {"router_dtype": "bf16"},
  "sliding_window=4096": {"sliding_window": 4096},
  "embedding_dropout=0.1": {"embedding_dropout": 0.1},
  "expert_swiglu_limit_list=[7.0]": {"expert_swiglu_limit_list": [7.0]},
  "linear_attn_config={'kda_layers': [1]}": {"linear_attn_config": {"kda_layers": [1]}},
  "kda_num_heads=4": {"kda_num_heads": 4},
  "short_conv_kernel_size=4": {"short_conv_kernel_size": 4},
  "linear_num_key_heads=4": {"linear_num_key_heads": 4},
  "linear_head_dim=4": {"linear_head_dim": 4},
  "num_kv_heads_for_linear_attn=2": {"num_kv_heads_for_linear_attn": 2},
  "num_key_value_heads=2": {"num_key_value_heads": 2},
  "qk_head_dim=8": {"qk_head_dim": 8},
  "n_routed_experts=7": {"n_routed_experts": 7},
  "moe_shared_expert_intermediate_size=48": {"moe_shared_expert_intermediate_size": 48},
  "layer_types=['linear_attention']": {"layer_types": ["linear_attention"]},
  "linear_silu=False, use_linear_silu=True": {"linear_silu": False, "use_linear_silu": True},
  "linear_silu=True, use_linear_silu=False": {"linear_silu": True, "use_linear_silu": False},
  "gla_decay_layer_offset=0.5": {"gla_decay_layer_offset": 0.5},
  "group_norm_size=7": {"group_norm_size": 7},
  "group_norm_size=0": {"group_norm_size": 0},
  "num_attention_heads=0": {"num_attention_heads": 0, "head_dim": None},
  "num_hidden_layers=0": {"num_hidden_layers": 0},
  "layer_group_size=0": {"layer_group_size": 0},
  "n_group=0": {"n_group": 0},
  "num_experts=0": {"num_experts": 0},
  "num_experts_per_tok=0": {"num_experts_per_tok": 0},
  "max_position_embeddings=0": {"max_position_embeddings": 0, "rope_scaling": YARN},
  "vocab_size=-1": {"vocab_size": -1},
  "hidden_size=32.0": {"hidden_size": 32.0},
  "hidden_size=33": {"hidden_size": 33, "head_dim": None},
  "rope_theta=0": {"rope_theta": 0},
  "mtp_loss_scaling_factor=-0.1": {"mtp_loss_scaling_factor": -0.1},
  "use_qk_norm=1": {"use_qk_norm": 1},
  "first_k_dense_replace=5": {"first_k_dense_replace": 5},
  "n_group=3": {"n_group": 3},
  "topk_group=5": {"topk_group": 5},
  "num_experts_per_tok=5": {"num_experts_per_tok": 5},
  "partial_rotary_factor=1.0": {"partial_rotary_factor": 1.0},
  "rope_scaling.rope_type='linear'": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
  "rope_parameters.rope_type='llama3'": {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
  "rope_scaling={'factor': 4}: without a rope_type": {"rope_scaling": {"factor": 4}},
  "rope_parameters={'factor': 4}: without a rope_type": {"rope_parameters": {"factor": 4}},
  "rope_scaling.factor=4: rope_type 'default'": {"rope_scaling": {"type": "default", "factor": 4}},
  "rope_parameters.factor=4: rope_type 'default'": {"rope_parameters": {"rope_type": "default", "factor": 4}},
  "rope_scaling.type='yarn': not rope_scaling.rope_type='default'": {"rope_scaling": YARN | {"rope_type": "default"}},
  "rope_parameters.type='yarn': not rope_parameters.rope_type='default'": {
    "rope_parameters": YARN | {"rope_type": "default"}
  },
  "rope_scaling='yarn'": {"rope_scaling": "yarn"},
  "rope_scaling=0": {"rope_scaling": 0},
  "rope_parameters=[{'type'": {"rope_parameters": [NEW]},
  "rope_scaling.short_factor=[1.0]": {"rope_scaling": YARN | {"short_factor": [1.0]}},
  "rope_parameters.attn_factor=2": {"rope_parameters": NEW | {"attn_factor": 2}},
  "rope_scaling.mscale=-1.0": {"rope_scaling": YARN | {"mscale": -1.0}},
  "rope_parameters.mscale_all_dim=-0.7": {"rope_parameters": NEW | {"mscale_all_dim": -0.7}},
  "rope_scaling.truncate=1": {"rope_scaling": YARN | {"truncate": 1}},
  "rope_scaling.truncate='false'": {"rope_scaling": YARN | {"truncate": "false"}},
  "rope_scaling.factor=0": {"rope_scaling": YARN | {"factor": 0}},
  "rope_scaling.factor='4'": {"rope_scaling": YARN | {"factor": "4"}},
  "rope_scaling.beta_fast=True": {"rope_scaling": YARN | {"beta_fast": True}},
  "rope_scaling.original_max_position_embeddings=0": {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
  "rope_scaling.rope_type='yarn', rope_parameters.rope_type='default'": {
    "rope_scaling": YARN,
    "rope_parameters": BOTH | {"rope_type": "default"},
  },
  "rope_scaling.rope_type='default', rope_parameters.rope_type='yarn'": {
    "rope_scaling": {"type": "default"},
    "rope_parameters": NEW,
  },
  "rope_theta=10000.0, rope_parameters.rope_theta=5.0": {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
  "rope_theta=10000.0, rope_scaling.rope_theta=5.0": {"rope_scaling": YARN | {"rope_theta": 5.0}},
  "partial_rotary_factor=0.5, rope_parameters.partial_rotary_factor=0.25": {
    "rope_parameters": NEW | {"partial_rotary_factor": 0.25}
  },
  "rope_scaling.factor=4.0, rope_parameters.factor=2.0": {
    "rope_scaling": YARN,
    "rope_parameters": NEW | {"factor": 2.0},
  },
  "rope_scaling.truncate=True, rope_parameters.truncate=False": {
    "rope_scaling": YARN,
    "rope_parameters": NEW | {"truncate": False},
  },
  "rope_scaling.attention_factor=1.5, rope_parameters.attention_factor=1.25": {
    "rope_scaling": YARN | {"attention_factor": 1.5},
    "rope_parameters": NEW | {"attention_factor": 1.25},
  },
}
"""What the error says first -> the changes that it is about."""


@pytest.mark.parametrize("named", REFUSED)
def test_what_the_model_does_not_compute_is_refused_by_name(named):
  with pytest.raises(ValueError, match=f"^{re.escape(named)}"):
    configuration.BailingMoeV2_5Config(**{**TINY, **REFUSED[named]})


def test_all_reasons_are_named():
  with pytest.raises(ValueError) as raised:
    configuration.BailingMoeV2_5Config(**{**TINY, "norm_topk_prob": False, "sliding_window": 64, "kda_num_heads": 4})
  assert [line.partition(":")[0] for line in str(raised.value).splitlines()] == [
    "norm_topk_prob=False",
    "sliding_window=64",
    "kda_num_heads=4",
  ]


ACCEPTED = {
  "what other files of the family say": {
    "norm_topk_prob": True,
    "router_dtype": "fp32",
    "moe_router_enable_shared_expert": True,
    "use_rmsnorm": True,
    "sliding_window": None,
    "use_sliding_window": False,
    "num_kv_heads_for_linear_attn": 0,
    "qk_head_dim": 20,
    "rotary_dim": 8,
    "moe_shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "output_dropout": 0.0,
  },
  "keys that nobody knows": {"my_own_key": 3, "quantization": None},
  "both names of the switch": {"linear_silu": True, "use_linear_silu": True},
  "dropout of attention": {"attention_dropout": 0.1},
  "rope_parameters alone": {"rope_parameters": NEW},
  "rope_parameters alone, the rest absent": {"rope_parameters": NEW, "rope_theta": None, "partial_rotary_factor": None},
  "both layouts": {"rope_scaling": YARN, "rope_parameters": NEW},
  "both layouts, one with the defaults": {
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "rope_parameters": {
      "rope_type": "yarn",
      "factor": 4,
      "original_max_position_embeddings": 64,
      "beta_fast": 32.0,
      "beta_slow": 1,
      "truncate": True,
      "mscale_all_dim": None,
      "rope_theta": 10000,
    },
  },
  "nulls": {"rope_scaling": YARN | {"attention_factor": None, "truncate": None}},
  "theta in rope_scaling": {"rope_scaling": YARN | BOTH},
  "no type and no scaling": {"rope_parameters": BOTH},
  "no scaling in both": {"rope_scaling": {"type": "default"}, "rope_parameters": BOTH | {"rope_type": "default"}},
}


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED)
def test_what_repeats_or_says_nothing_is_accepted_and_survives(changes, tmp_path):
  config = configuration.BailingMoeV2_5Config(**{**TINY, **changes})
  assert (config.rope_theta, config.partial_rotary_factor) == (10000.0, 0.5)
  stretched = "yarn" in str(changes)
  assert (config.rope_scaling or {}).get("factor") == (4.0 if stretched else None)
  assert not config.rope_scaling or config.rope_scaling.keys().isdisjoint(BOTH)
  assert config.rope_parameters["rope_type"] == ("yarn" if stretched else "default")
  config.save_pretrained(tmp_path)
  again = type(config).from_pretrained(tmp_path)
  assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
  assert modeling.BailingMoeV2_5ForCausalLM(again).config.rope_scaling == config.rope_scaling


def test_assigning_one_layout_replaces_the_rotary_embedding():
  config = configuration.BailingMoeV2_5Config(**TINY)
  config.rope_parameters = NEW | {"rope_theta": 7.0}
  assert (config.rope_theta, config.rope_scaling["factor"]) == (7.0, 4.0)
  config.rope_scaling = None
  assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}
  for layout in ("rope_scaling", "rope_parameters"):
    with pytest.raises(ValueError, match=f"{layout}.mscale=-1"):
      setattr(config, layout, YARN | {"mscale": -1})


def test_a_value_changed_while_loading_is_refused_too(tmp_path):
  folder = write_folder(tmp_path / "changed", "one_cycle")
  with pytest.raises(ValueError, match="hidden_act='gelu'"):
    load(folder, hidden_act="gelu")
  with pytest.raises(ValueError, match="linear_silu=True, use_linear_silu=False"):
    load(folder, linear_silu=True)
  with pytest.raises(ValueError, match="group_norm_size=0"):
    load(folder, group_norm_size=0)
  assert load(folder, gla_decay_layer_offset=0).config.gla_decay_layer_offset == 0


def test_defaults_for_absent_keys():
  config = configuration.BailingMoeV2_5Config(num_attention_heads=8, head_dim=None, hidden_size=1024)
  assert (config.num_key_value_heads, config.head_dim, config.num_shared_experts) == (8, 128, 1)
  assert config.q_lora_rank is None and config.mtp_loss_scaling_factor == 0.0 and config.num_nextn_predict_layers == 0
  assert config.gla_decay_layer_offset is None and config.rope_scaling is None
  assert (config.rope_theta, config.partial_rotary_factor) == (600000.0, 0.5)
  for switch in ("linear_silu", "use_linear_silu"):
    config = configuration.BailingMoeV2_5Config(**{switch: True})
    assert config.linear_silu and config.use_linear_silu
  assert not configuration.BailingMoeV2_5Config().linear_silu


def yarn_by_numpy(dims, theta, factor, original, beta_fast, beta_slow, truncate=True):
  """Blends, pair by pair, a frequency and the same frequency slowed down; the ramp is linear in the pair's number."""
  j = np.arange(dims // 2)
  frequency = 1.0 / theta ** (2 * j / dims)

  def pair(turns):  # where original * frequency(j) / 2 pi, the turns within the original length, is `turns`
    return math.log(original / (2 * math.pi * turns), theta) * dims / 2

  first, last = pair(beta_fast), pair(beta_slow)
  if truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, dims - 1)
  slowed = np.clip((j - first) / max(last - first, 1e-3), 0, 1)
  return frequency * ((1 - slowed) + slowed / factor)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("beta_fast", "beta_slow"), [(32.0, 1.0), (8.0, 0.5), (2.0, 2.0)])
def test_yarn_frequencies(beta_fast, beta_slow, truncate):
  yarn = YARN | {"beta_fast": beta_fast, "beta_slow": beta_slow, "truncate": truncate}
  model = tiny(head_dim=64, qk_rope_head_dim=32, rope_scaling=yarn)
  ours = model.model.inverse_frequencies
  np.testing.assert_allclose(ours, yarn_by_numpy(32, 10000.0, 4.0, 64, beta_fast, beta_slow, truncate), rtol=1e-9)
  theirs, _ = transformers_yarn(32, yarn)
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def transformers_yarn(dims, yarn):
  """(frequencies, attention factor) by transformers' own function."""
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  rope = {key: value for key, value in yarn.items() if key != "type"} | {"rope_type": "yarn"}
  config = LlamaConfig(
    hidden_size=4 * dims,
    num_attention_heads=4,
    head_dim=dims,
    max_position_embeddings=256,
    rope_theta=10000.0,
    rope_scaling=rope,
  )
  return ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))


MAGNITUDES = {
  "both": ({"mscale": 1.0, "mscale_all_dim": 0.7}, (0.1 * math.log(4) + 1) / (0.07 * math.log(4) + 1), 0.7),
  "equal": ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1.0),
  "neither": ({}, 0.1 * math.log(4) + 1, 0.0),
  "one": ({"mscale_all_dim": 0.7}, 0.1 * math.log(4) + 1, 0.7),
  "explicit": ({"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 0.7}, 1.25, 0.7),
}


@pytest.mark.parametrize(("parts", "factor", "all_dim"), MAGNITUDES.values(), ids=MAGNITUDES)
def test_yarn_magnitudes(parts, factor, all_dim):
  yarn = {key: value for key, value in YARN.items() if not key.startswith("mscale")} | parts
  model = tiny(rope_scaling=yarn)
  assert model.model.attention_factor == pytest.approx(factor, rel=1e-12)
  assert model.model.attention_factor == pytest.approx(transformers_yarn(8, yarn)[1], rel=1e-6)
  scale = 20**-0.5 * (0.1 * all_dim * math.log(4) + 1) ** 2
  assert model.model.layers[1].attention.scale == pytest.approx(scale, rel=1e-12)
  cos = model.model._batch(torch.zeros(1, 3, 32), None, None, 0).cos
  assert cos[0, 0].tolist() == pytest.approx([factor] * 4)  # cos(0) times the factor


def test_yarn_factor_is_the_one_that_is_written():
  """Not max_position_embeddings / original_max_position_embeddings = 2."""
  model = tiny(rope_scaling=YARN | {"original_max_position_embeddings": 128})
  np.testing.assert_allclose(model.model.inverse_frequencies, yarn_by_numpy(8, 10000.0, 4.0, 128, 8.0, 0.5), rtol=1e-9)


def test_yarn_in_both_layouts_and_after_saving(tmp_path):
  old = tiny(rope_scaling=YARN)
  new = tiny(rope_theta=None, partial_rotary_factor=None, rope_parameters=NEW)
  named = tiny(rope_scaling={**{k: v for k, v in YARN.items() if k != "type"}, "rope_type": "yarn"})
  ids = tokens(2, 80)
  expected = old(ids).logits
  assert largest_error(tiny()(ids).logits, expected) > 0.01
  assert torch.equal(new(ids).logits, expected) and torch.equal(named(ids).logits, expected)
  for i, model in enumerate((old, new)):
    config, _ = saved(model, tmp_path / f"yarn_{i}")
    assert config["rope_scaling"] == YARN | {"rope_type": "yarn"}
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (10000.0, 0.5)
    assert "rope_parameters" not in config
    assert torch.equal(load(tmp_path / f"yarn_{i}")(ids).logits, expected)
    # As transformers 5 would have written it.
    layout = {key: value for key, value in config.items() if key not in ("rope_scaling", *BOTH)}
    layout["rope_parameters"] = config["rope_scaling"] | BOTH
    (tmp_path / f"yarn_{i}" / "config.json").write_text(json.dumps(layout))
    again = load(tmp_path / f"yarn_{i}")
    assert torch.equal(again(ids).logits, expected) and again.config.rope_theta == 10000.0


def test_rotary_embedding_without_yarn():
  model, io = tiny(rope_theta=600000.0), recorded("one_cycle", "io_short")
  for rope in (None, {"type": "default"}, {"rope_type": "default"}):
    assert tiny(rope_scaling=rope).config.rope_scaling is None
  for kind in ({"rope_type": "default"}, {}):
    assert tiny(rope_theta=None, rope_parameters={"rope_theta": 7.0, **kind}).config.rope_theta == 7.0
  golden = modeling.inverse_frequencies(tiny(head_dim=32, qk_rope_head_dim=16, rope_theta=600000.0).config)
  np.testing.assert_allclose(golden, io["inv_freq.gla"], rtol=1e-6)
  np.testing.assert_allclose(golden, io["inv_freq.mla"], rtol=1e-6)
  assert model.model.attention_factor == 1.0
  assert tiny(qk_nope_head_dim=32).model.layers[1].attention.scale == pytest.approx(40**-0.5)


def test_the_block_of_the_page(tmp_path):
  """docs/convert.md shows how to open an export; here it is run."""
  (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "convert.md").read_text(), re.DOTALL)
  assert text.count('"HF_OUT"') == 1
  found = {}
  exec(text.replace("HF_OUT", str(write_folder(tmp_path / "hf", "one_cycle"))), found)
  assert type(found["model"]).__name__ == "BailingMoeV2_5ForCausalLM"
