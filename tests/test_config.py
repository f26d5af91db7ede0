"""The config as users meet it, the contracts of all seams, and the rules of validation."""

import os

import pytest
import yaml

from maxtext_ling2 import plugin
from maxtext_ling2.configs.fields import DEFAULTS, FIELDS
from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.maxtext_api.session import TOOL_SETTINGS

RFC = """decoder_block ling2, weight_dtype float32, dtype bfloat16, base_emb_dim 2048, base_mlp_dim 5120,
base_num_decoder_layers 20, mtp_num_layers 1, vocab_size 157184, first_num_dense_layers 1, mlp_activations [silu; linear],
normalization_layer_epsilon 1.0e-6, base_num_query_heads 16, base_num_kv_heads 16, head_dim 128, use_qk_norm true,
enable_dropout false, logits_via_embedding false, attention_type mla, q_lora_rank 256, kv_lora_rank 512,
qk_nope_head_dim 128,
qk_rope_head_dim 64, v_head_dim 128, mscale 1.0, mla_interleaved_rope true, dropout_rate 0.0,
inhomogeneous_layer_cycle_interval 5, group_norm_size 4, num_experts 256, num_experts_per_tok 8, base_moe_mlp_dim 512,
moe_shared_expert_dim 2048, shared_experts 1, routed_scaling_factor 2.5, n_routing_groups 8, topk_routing_group 4,
routed_score_func sigmoid, routed_bias true, routed_bias_dtype float32, enable_routed_bias_grad false,
routed_bias_update_rate 0.001, routed_bias_zero_mean_update true, norm_topk_prob false, float32_logits true,
use_linear_silu false, rope_min_timescale 1, rope_max_timescale 10000, max_position_embeddings 4096,
original_max_position_embeddings 4096, rope_factor 32, partial_rotary_factor 0.5, max_target_length 4096,
max_prefill_predict_length 4096, scan_layers false, add_bos false, calculate_per_token_loss false"""
RFC_VALUES = {k: yaml.safe_load(v.replace(";", ",")) for k, v in (item.split(None, 1) for item in RFC.split(","))}
QUIET = {k: TOOL_SETTINGS[k] for k in ("run_name", "enable_checkpointing", "skip_jax_distributed_system", "log_config")}


def load(*words, **kwargs):
  from maxtext.configs import pyconfig

  base = os.path.join(pyconfig.MAXTEXT_CONFIGS_DIR, "base.yml")
  return pyconfig.initialize_pydantic(["", base, *words], **{**QUIET, **kwargs})


def plain(value):
  return getattr(value, "value", value)


@pytest.fixture(scope="module")
def ling2():
  return load("model_name=ling2")


@pytest.mark.parametrize("name", RFC_VALUES)
def test_value_of_the_rfc(ling2, name):
  assert plain(getattr(ling2, name)) == RFC_VALUES[name]
  with open(plugin.CONFIGS / "models" / "ling2.yml", encoding="utf-8") as file:
    assert set(yaml.safe_load(file)) == set(RFC_VALUES)


def test_stock_model_has_the_defaults():
  config = load("model_name=llama2-7b")
  for name, default in DEFAULTS.items():
    assert getattr(config, name) == default, name


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_field_stands_in_its_class(field):
  from maxtext.configs import types

  owner = "MMapDataset" if field.name in types.MMapDataset.model_fields else field.owner
  assert getattr(types, owner).model_fields[field.name].default == field.default
  assert field.name in types.MaxTextConfig.model_fields


def test_ways_to_ask(tmp_path, monkeypatch):
  from maxtext.configs import pyconfig

  assert plain(load(model_name="ling2-tiny").decoder_block) == "ling2"
  yml = tmp_path / "mine.yml"
  yml.write_text("base_config: base.yml\nmodel_name: ling2-tiny\n")
  assert pyconfig.initialize_pydantic(["", str(yml)], **QUIET).base_emb_dim == 128
  assert load("model_name=ling2", "override_model_config=true", "scan_layers=true").scan_layers
  with pytest.raises(ValueError, match="scan_layers"):
    load("model_name=ling2", "scan_layers=true")
  monkeypatch.setenv("M_MOE_Z_LOSS_WEIGHT", "0.25")
  assert load("model_name=ling2-tiny").moe_z_loss_weight == 0.25


BOS = [
  *("bos_id=3", "add_bos=true", "packing=true", "grain_packing_type=concat_then_split", "dataset_type=grain"),
  *("grain_train_files=/none/data", "override_model_config=true"),
]


@pytest.mark.parametrize(
  ("words", "text"),
  [
    (["model_name=ling2-tny"], "did you mean 'ling2-tiny'"),
    (["model_name=ling2-tiny", "group_norm_sze=2"], "did you mean 'group_norm_size'"),
    (["model_name=llama2-7b", "moe_z_loss_weight=0.1"], "only decoder_block=ling2 reads this field"),
    (["model_name=ling2-tiny", "pad_id=3"], "grain_file_type=mmap or mmap_npy reads it"),
    (["model_name=ling2-tiny", "bos_id=3"], "add_bos=true reads it"),
    (["model_name=ling2-tiny", "grain_file_type=mmap_npy", *BOS], "add_bos=true reads it"),
    (["model_name=ling2-tiny", "grain_file_type=mmap", *BOS, "vocab_size=3"], "choose one from 0 to"),
    (["model_name=ling2-tiny", "grain_file_type=mmap", *BOS, "mmap_eod_id=3"], "equal to mmap_eod_id"),
    (["model_name=llama2-7b", "bos_id=3"], "only decoder_block=ling2 reads this field"),
    (["model_name=llama2-7b", "pad_id=3"], "only decoder_block=ling2 reads this field"),
    (["model_name=ling2-tiny", "ici_pipeline_parallelism=2"], "pipeline stages must be alike"),
  ],
)
def test_refused(words, text):
  with pytest.raises(Exception, match=text):
    load(*words)


@pytest.mark.parametrize(
  ("words", "text"),
  [
    (["model_name=llama3.1-8b", "moe_z_loss_weight=0.1"], "only decoder_block=ling2 reads this field"),
    (["model_name=ling2-tiny", "moe_z_loss_weight=0.1"], "reinforcement learning does not"),
    (["model_name=ling2-tiny", "override_model_config=true", "group_norm_size=3"], "must divide"),
  ],
)
def test_reinforcement_learning_config_is_validated_too(words, text):
  from maxtext.configs import pyconfig, types

  rl = os.path.join(pyconfig.MAXTEXT_CONFIGS_DIR, "post_train", "rl.yml")
  settings = {"run_name": "rl", "base_output_directory": "out", "tokenizer_path": "none"}
  with pytest.raises(ValueError, match=text):
    pyconfig.initialize_pydantic(["", rl, *words], config_class=types.RLConfig, **settings)


def test_model_name_by_environment_is_refused(monkeypatch):
  monkeypatch.setenv("M_MODEL_NAME", "ling2")
  with pytest.raises(ValueError, match="pass model_name=ling2 on the command line"):
    load()


def test_contracts_hold_and_everything_can_be_undone():
  from maxtext.common.common_types import DecoderBlockType
  from maxtext.configs import types
  from maxtext.models import models

  registry = plugin.REGISTRY
  registry.complete()
  assert models.NNXDecoder.__module__.startswith("maxtext.")
  assert registry.usable and hasattr(models.NNXDecoder, "__wrapped__")
  assert registry.undo() == []
  try:
    assert [str(violation) for seam in registry.seams for violation in seam.violations()] == []
    assert "ling2" not in DecoderBlockType._value2member_map_
    assert "moe_z_loss_weight" not in types.MaxTextConfig.model_fields
    assert isinstance(models.NNXDecoder, type)
    with pytest.raises(ValueError, match="decoder_block"):
      load("decoder_block=ling2")
  finally:
    registry.install()
    registry.complete()
  assert registry.usable and DecoderBlockType("ling2").value == "ling2"


def test_unmet_expectations_say_what_is_there():
  assert "nothing of that name" in Expectation("maxtext.version:nothing").found()
  assert "does not import" in Expectation("maxtext.no_such_module:x").found()
  assert "taking" in Expectation("maxtext.utils.maxtext_utils:get_shared_expert_mlp_dim", parameters=("y",)).found()
