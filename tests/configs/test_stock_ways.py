"""LING2's fields and models under MaxText's own rules: every stock way to set a value, and which decoder is built.

That every value of ling2.yml is the RFC's stands in tests/test_config.py.
"""

import os

import pytest

import tiny
from maxtext_ling2.maxtext_api import session

# Name, class, type, default: the RFC's table, the decay offset and two backends.
RFC_FIELDS = [
  ("moe_z_loss_weight", "MoEGeneral", float, 0.0),
  ("moe_shared_expert_dim", "DeepSeekMoE", int, 0),
  ("routed_bias_dtype", "DeepSeekMoE", str, ""),
  ("enable_routed_bias_grad", "DeepSeekMoE", bool, True),
  ("routed_bias_zero_mean_update", "DeepSeekMoE", bool, False),
  ("mla_interleaved_rope", "MlaAttention", bool, True),
  ("group_norm_size", "Qwen3Next", int, 1),
  ("use_linear_silu", "Qwen3Next", bool, False),
  ("gla_decay_layer_offset", "Qwen3Next", int, 0),
  ("gla_backend", "Qwen3Next", str, "auto"),
  ("experts_backend", "MoEKernels", str, "auto"),
  ("blend_cache_dir", "GrainDataset", str, ""),
  ("blend_index_dir", "GrainDataset", str, ""),
  ("reset_attention_mask", "GrainDataset", bool, True),
  ("eod_mask_loss", "GrainDataset", bool, False),
  ("mmap_split_sentences", "GrainDataset", bool, False),
  ("pad_id", "Tokenizer", int, 0),
  ("bos_id", "Tokenizer", int, 1),
  ("calculate_per_token_loss", "Optimizer", bool, True),
]
STOCK = {"blend_cache_dir", "blend_index_dir", "reset_attention_mask", "eod_mask_loss", "mmap_split_sentences"}


def load(*words, **kwargs):
  """The RFC's call: MaxText's own function, base.yml first."""
  from maxtext.configs import pyconfig

  return pyconfig.initialize_pydantic(["", os.path.join(pyconfig.MAXTEXT_CONFIGS_DIR, "base.yml"), *words], **kwargs)


def refusal(*words, **kwargs):
  with pytest.raises(ValueError) as error:
    load(*words, **kwargs)
  return str(error.value)


@pytest.fixture(scope="module")
def ling2():
  return load("model_name=ling2")


@pytest.fixture(scope="module")
def llama():
  return load("model_name=llama2-7b")


# The RFC's tests


def test_ling2_by_the_call_of_the_rfc(ling2):
  assert ling2.decoder_block.value == "ling2"
  assert (ling2.inhomogeneous_layer_cycle_interval, ling2.first_num_dense_layers) == (5, 1)
  assert ling2.moe_shared_expert_dim == 2048
  assert (ling2.num_decoder_layers, ling2.emb_dim, ling2.moe_mlp_dim) == (20, 2048, 512)


def test_llama_keeps_the_defaults(llama):
  assert llama.moe_z_loss_weight == 0.0
  assert llama.calculate_per_token_loss is True
  assert llama.moe_shared_expert_dim == 0
  for name, _, _, default in RFC_FIELDS:
    assert getattr(llama, name) == default, name


@pytest.mark.parametrize(("name", "owner", "kind", "default"), RFC_FIELDS, ids=[field[0] for field in RFC_FIELDS])
def test_field(name, owner, kind, default):
  from maxtext.configs import types

  if name in STOCK:  # MaxText 0.2.5 has these five, in a class of their own; stock's stays
    owner = "MMapDataset"
  info = getattr(types, owner).model_fields[name]
  assert info.annotation is kind and type(info.default) is kind and info.default == default
  assert types.MaxTextConfig.model_fields[name].default == default
  holders = {
    key for key, value in vars(types).items() if isinstance(value, type) and name in getattr(value, "model_fields", ())
  }
  assert holders <= {owner, "MaxTextConfig", "RLConfig"}


def test_values_are_checked_by_type():
  assert "greater than or equal to 0" in refusal("model_name=llama2-7b", "moe_z_loss_weight=-1.0")
  assert "valid integer" in refusal("model_name=ling2-tiny", "override_model_config=true", "group_norm_size=many")


def test_unknown_dtypes_are_refused_and_named():
  assert "float33" in refusal("model_name=ling2-tiny", "dtype=float33")
  assert "float33" in refusal("model_name=ling2-tiny", "override_model_config=true", "routed_bias_dtype=float33")


# The decoder that MaxText's Transformer builds


def decoder(config):
  from flax import nnx
  from maxtext.models import models

  mesh = session.make_mesh(config)
  with session.model_context(config, mesh):
    return nnx.eval_shape(
      lambda: models.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(params=0, dropout=1))
    ).decoder


def test_transformer_builds_our_decoder():
  from maxtext.common.common_types import DecoderBlockType

  from maxtext_ling2.model.decoder import Ling2Decoder

  assert DecoderBlockType("ling2") is DecoderBlockType.LING2
  assert type(decoder(tiny.config())) is Ling2Decoder


def test_transformer_builds_the_stock_decoder_for_another_block():
  from maxtext.layers.nnx_decoders import NNXDecoder

  sizes = {
    name: tiny.TINY[name] for name in ("base_emb_dim", "base_mlp_dim", "head_dim", "vocab_size", "max_target_length")
  }
  config = session.make_config(decoder_block="llama2", base_num_decoder_layers=1, **sizes)
  assert type(decoder(config)) is NNXDecoder


# The ways to set a value


def test_keyword_arguments():
  config = load(model_name="ling2-tiny", moe_z_loss_weight=0.01, gla_decay_layer_offset=1)
  assert (config.moe_z_loss_weight, config.gla_decay_layer_offset) == (0.01, 1)


def test_command_line_and_override_model_config():
  assert "override_model_config=True" in refusal("model_name=ling2", "base_emb_dim=1024")
  assert "group_norm_size" in refusal("model_name=ling2", "group_norm_size=8")
  config = load("model_name=ling2", "base_emb_dim=1024", "group_norm_size=8", "override_model_config=true")
  assert (config.emb_dim, config.group_norm_size, config.num_experts) == (1024, 8, 256)


def test_a_yml_that_inherits_from_base_and_names_the_model(tmp_path):
  from maxtext.configs import pyconfig

  yml = tmp_path / "mine.yml"
  yml.write_text("base_config: base.yml\nmodel_name: ling2-tiny\nsteps: 7\nmoe_z_loss_weight: 0.5\n")
  by_place = pyconfig.initialize_pydantic(["", str(yml)])
  by_keyword = pyconfig.initialize_pydantic([""], base_config=str(yml))
  for config in (by_place, by_keyword):
    assert (config.decoder_block.value, config.base_emb_dim) == ("ling2", 128)
    assert (config.steps, config.moe_z_loss_weight) == (7, 0.5)


def test_environment_sets_a_stock_field_and_one_of_ours(monkeypatch):
  monkeypatch.setenv("M_STEPS", "7")
  monkeypatch.setenv("M_MOE_Z_LOSS_WEIGHT", "0.25")
  config = load("model_name=ling2-tiny")
  assert (config.steps, config.moe_z_loss_weight) == (7, 0.25)
  assert "M_MOE_Z_LOSS_WEIGHT" in refusal("model_name=ling2-tiny", "moe_z_loss_weight=0.1")


def test_environment_against_the_model_yml_is_refused_as_for_stock(monkeypatch):
  monkeypatch.setenv("M_GROUP_NORM_SIZE", "2")
  assert "M_GROUP_NORM_SIZE" in refusal("model_name=ling2-tiny")
  assert load("model_name=ling2-tiny", "override_model_config=true").group_norm_size == 2


def test_a_switch_by_environment(monkeypatch):
  monkeypatch.setenv("M_CALCULATE_PER_TOKEN_LOSS", "true")
  assert load("model_name=ling2-tiny", "override_model_config=true").calculate_per_token_loss is True


@pytest.mark.parametrize("words", [[], ["model_name=ling2"], ["model_name=llama2-7b"]])
def test_the_model_name_by_environment_is_refused(monkeypatch, words):
  monkeypatch.setenv("M_MODEL_NAME", "ling2")
  text = refusal(*words)
  assert text.startswith("M_MODEL_NAME=ling2:")
  assert "unset it and pass model_name=ling2 on the command line" in text


def test_another_model_name_by_environment_is_none_of_our_business(monkeypatch):
  monkeypatch.setenv("M_MODEL_NAME", "llama2-7b")
  assert load().model_name == "llama2-7b"


# Mistakes


@pytest.mark.parametrize(
  ("typo", "meant"), [("group_norm_siz", "group_norm_size"), ("moe_zloss_weight", "moe_z_loss_weight")]
)
def test_a_misspelt_field(typo, meant):
  text = refusal("model_name=ling2", f"{typo}=4")
  assert f"{typo}=4" in text and f"did you mean '{meant}'" in text


def test_a_misspelt_stock_field_gets_stocks_error():
  assert refusal("model_name=llama2-7b", "stepss=4").startswith("'stepss' not in ")


@pytest.mark.parametrize(
  ("typo", "meant"), [("ling22", "ling2"), ("ling2_tiny", "ling2-tiny"), ("llama2-7", "llama2-7b")]
)
def test_a_misspelt_model_name(typo, meant):
  text = refusal(f"model_name={typo}")
  assert f"model_name={typo}" in text and "did you mean" in text and f"'{meant}'" in text


def test_a_field_of_ours_in_a_run_of_another_model():
  text = refusal("model_name=llama2-7b", "group_norm_size=4")
  assert "group_norm_size=4: only decoder_block=ling2 reads this field" in text and "decoder_block=llama2" in text
  text = refusal("model_name=deepseek2-16b", "mla_interleaved_rope=false")
  assert "mla_interleaved_rope=False" in text and "decoder_block=deepseek" in text


def test_rules_of_validation_reach_the_user(monkeypatch):
  text = refusal("model_name=ling2", "override_model_config=true", "base_num_kv_heads=8", "n_routing_groups=7")
  assert "base_num_kv_heads=8" in text and "n_routing_groups=7" in text
  monkeypatch.setenv("M_ICI_PIPELINE_PARALLELISM", "2")
  assert "ici_pipeline_parallelism=2" in refusal("model_name=ling2-tiny")
