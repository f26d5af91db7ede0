"""LING2's rules, on one MaxText config, varied without MaxText; what they refuse: tests/hostile/bad_settings.py."""

import types

import pytest

from hostile.bad_settings import RULES
from maxtext_ling2.configs import unsupported, validation
from maxtext_ling2.configs.fields import DEFAULTS, FIELDS
from maxtext_ling2.maxtext_api import session

pytestmark = pytest.mark.unit

GOOD = [
  {},
  {"group_norm_size": 1},
  {"group_norm_size": 2048},
  {"gla_decay_layer_offset": 1},
  {"gla_backend": "reference"},
  {"experts_backend": "pallas"},
  {"experts_backend": "maxtext", "use_gmm_v2": True, "sparse_matmul": False},
  {"use_gmm_v2": True},
  {"first_num_dense_layers": 0},
  {"inhomogeneous_layer_cycle_interval": 1},
  {"q_lora_rank": 0},
  {"n_routing_groups": -1, "topk_routing_group": -1},
  {"num_experts": 1, "n_routing_groups": -1, "first_num_dense_layers": 20, "mtp_num_layers": 0},
  {"moe_shared_expert_dim": 0, "moe_z_loss_weight": 0.001, "routed_bias_dtype": "", "mtp_num_layers": 0},
  {"ici_context_parallelism": 2, "context_parallel_load_balance": False},
  {"ici_tensor_sequence_parallelism": 2, "sparse_matmul": False},
]

# The fields that only LING2 reads, with a value that is not the default.
IN_VAIN = {
  "moe_z_loss_weight": 0.001,
  "moe_shared_expert_dim": 2048,
  "routed_bias_dtype": "float32",
  "enable_routed_bias_grad": False,
  "routed_bias_zero_mean_update": True,
  "mla_interleaved_rope": False,
  "rope_mscale_all_dim": 1.0,
  "rope_attention_factor": 1.5,
  "group_norm_size": 4,
  "use_linear_silu": True,
  "gla_decay_layer_offset": 1,
  "gla_backend": "chunked",
  "experts_backend": "xla",
  "tuned_xla_flags": False,
  "calculate_per_token_loss": False,
  "pad_id": 3,
  "bos_id": 3,
}


@pytest.fixture(scope="module")
def ling2():
  return dict(session.make_config(model_name="ling2").get_keys())


@pytest.fixture(scope="module")
def llama():
  return dict(session.make_config(model_name="llama2-7b").get_keys())


def validate(settings, changes):
  validation.validate(types.SimpleNamespace(**{**settings, **changes}))


def name(changes):
  return ",".join(f"{field}={value}" for field, value in changes.items()) or "as it is"


@pytest.mark.parametrize("changes", GOOD, ids=name)
def test_good(ling2, changes):
  validate(ling2, changes)


def test_all_broken_rules_are_named_at_once(ling2):
  changes = {"base_num_kv_heads": 8, "kv_lora_rank": 0, "topk_routing_group": 9, "moe_z_loss_weight": -1.0}
  with pytest.raises(ValueError) as error:
    validate(ling2, changes)
  lines = str(error.value).splitlines()
  assert len(lines) == len(changes)
  for field, value in changes.items():
    assert any(line.startswith(f"{field}={value}:") for line in lines)


def test_the_tables_cover_every_listed_field():
  assert set(unsupported.OFF) <= {field for changes, _ in RULES for field in changes}
  assert {field.name for field in FIELDS if field.ling2_only} == set(IN_VAIN)


@pytest.mark.parametrize("field", IN_VAIN)
def test_a_field_of_ours_in_another_model_is_refused(llama, field):
  validate(llama, {})
  with pytest.raises(ValueError) as error:
    validate(llama, {field: IN_VAIN[field]})
  text = str(error.value)
  assert text.startswith(f"{field}={IN_VAIN[field]!r}: only decoder_block=ling2") and "decoder_block=llama2" in text
  assert f"remove it, or set it to {DEFAULTS[field]!r}" in text


def test_other_models_are_not_measured_by_our_rules(llama):
  validate(
    llama, {"base_num_kv_heads": 8, "base_num_decoder_layers": 1, "ici_pipeline_parallelism": 2, "fused_qkv": True}
  )


def test_maxtext_sees_other_values_only_for_ling2(ling2, llama):
  assert validation.validation_overrides(types.SimpleNamespace(**llama)) == {}
  shown = validation.validation_overrides(types.SimpleNamespace(**ling2))
  assert (shown["routed_bias_update_rate"], shown["partial_rotary_factor"]) == (0.0, 1.0)
  assert (ling2["routed_bias_update_rate"], ling2["partial_rotary_factor"]) == (0.001, 0.5)
