"""LING2's rules: each broken one names the field, its value and a way out. One MaxText config, varied without MaxText."""

import types

import pytest

from maxtext_ling2.configs import validation
from maxtext_ling2.host import session

# What is changed in the good config, and what the message holds besides "field=value" of the first of these fields.
BAD = [
  ({"base_num_kv_heads": 8}, "set it to base_num_query_heads=16"),
  ({"group_norm_size": 3}, "choose a divisor"),
  ({"group_norm_size": 0}, "choose a divisor"),
  ({"group_norm_size": -4}, "choose a divisor"),
  ({"group_norm_size": 4, "base_num_query_heads": 3, "base_num_kv_heads": 3, "head_dim": 2}, "heads * head_dim = 6"),
  ({"partial_rotary_factor": 0.0}, "0.5 is LING2's"),
  ({"partial_rotary_factor": 1.5}, "0.5 is LING2's"),
  ({"partial_rotary_factor": 0.01}, "0.5 is LING2's"),
  ({"partial_rotary_factor": 0.2}, "even number"),
  ({"base_num_decoder_layers": 1}, "use at least 2"),
  ({"inhomogeneous_layer_cycle_interval": 0}, "5 is LING2's"),
  ({"inhomogeneous_layer_cycle_interval": -5}, "5 is LING2's"),
  ({"first_num_dense_layers": 21}, "between 0 and base_num_decoder_layers=20"),
  ({"first_num_dense_layers": -1}, "between 0 and base_num_decoder_layers=20"),
  ({"gla_decay_layer_offset": 2}, "must be 0 (as trained"),
  ({"gla_decay_layer_offset": -1}, "must be 0 (as trained"),
  ({"gla_backend": "triton"}, "gla_backend='triton': use one of auto, pallas, chunked, reference"),
  ({"gla_backend": ""}, "use one of auto"),
  ({"attention_type": "global"}, "set attention_type=mla"),
  ({"kv_lora_rank": 0}, "must be positive"),
  ({"qk_nope_head_dim": 0}, "must be positive"),
  ({"qk_rope_head_dim": 0}, "must be positive"),
  ({"qk_rope_head_dim": 63}, "must be even"),
  ({"v_head_dim": -128}, "must be positive"),
  ({"num_experts": 1}, "use at least 2 experts"),
  ({"num_experts_per_tok": 0}, "at most num_experts=256"),
  ({"num_experts_per_tok": 257}, "at most num_experts=256"),
  ({"routed_score_func": "softmax"}, "set routed_score_func=sigmoid"),
  ({"routed_score_func": ""}, "set routed_score_func=sigmoid"),
  ({"n_routing_groups": 7}, "choose a divisor, or -1"),
  ({"n_routing_groups": 0}, "choose a divisor, or -1"),
  ({"n_routing_groups": -2}, "choose a divisor, or -1"),
  ({"n_routing_groups": 256}, "use fewer groups, or -1"),
  ({"topk_routing_group": 9}, "between 1 and n_routing_groups=8"),
  ({"topk_routing_group": 0}, "between 1 and n_routing_groups=8"),
  ({"topk_routing_group": 1, "num_experts_per_tok": 40}, "keep more groups"),
  ({"routed_bias_dtype": "float33"}, "float32, bfloat16, float16, or ''"),
  ({"moe_z_loss_weight": -0.1}, "0 turns it off"),
  ({"moe_shared_expert_dim": -1}, "0 turns it off"),
  ({"routed_bias_update_rate": -0.001}, "0 turns it off"),
  ({"mtp_num_layers": -1}, "0 turns it off"),
  ({"ici_pipeline_parallelism": 2}, "use fsdp"),
  ({"dcn_pipeline_parallelism": 2}, "use fsdp"),
  ({"shard_mode": "explicit"}, "use shard_mode=auto"),
  ({"context_parallel_load_balance": True, "ici_context_parallelism": 2}, "set context_parallel_load_balance=false"),
  ({"context_parallel_load_balance": True, "dcn_context_parallelism": 2}, "of 2 context ranks"),
  ({"context_parallel_load_balance": True, "ici_context_parallelism": -1}, "set context_parallel_load_balance=false"),
  ({"ici_autoregressive_parallelism": 2}, "set sparse_matmul=false"),
  ({"ici_tensor_sequence_parallelism": 2}, "set sparse_matmul=false"),
  ({"dcn_tensor_sequence_parallelism": -1}, "set sparse_matmul=false"),
  ({"attention": "paged"}, "to_huggingface"),
  ({"attention": "vllm_rpa"}, "to_huggingface"),
  ({"attention": "vllm_batched_rpa"}, "to_huggingface"),
  ({"mhc_expansion_rate": 4}, "leave it at 1"),
  ({"engram_layers": [1]}, "leave it at []"),
  ({"use_batch_split_schedule": True}, "leave it at False"),
  ({"te_moe_block": True}, "leave it at False"),
  ({"use_indexer": True}, "leave it at False"),
  ({"first_num_hash_layers": 1}, "leave it at 0"),
  ({"fused_qkv": True}, "leave it at False"),
  ({"moe_expert_input_dim": 64}, "leave it at -1"),
  ({"mtp_reuse_input_embedding": True}, "leave it at False"),
  ({"use_tunix_gradient_accumulation": True}, "leave it at False"),
  ({"pad_id": 7}, "leave it at 0"),
  ({"pad_id": -1}, "choose one from 0 on"),
  ({"pad_id": 1 << 20}, "choose one from 0 on"),
  ({"bos_id": 2}, "leave it at 1"),
]

GOOD = [
  {},
  {"group_norm_size": 1},
  {"group_norm_size": 2048},
  {"gla_decay_layer_offset": 1},
  {"gla_backend": "reference"},
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
  "calculate_per_token_loss": False,
  "pad_id": 3,
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


@pytest.mark.parametrize(("changes", "way_out"), BAD, ids=lambda value: name(value) if isinstance(value, dict) else "")
def test_bad(ling2, changes, way_out):
  assert set(changes) <= set(ling2)
  with pytest.raises(ValueError) as error:
    validate(ling2, changes)
  field, value = next(iter(changes.items()))
  line = next(line for line in str(error.value).splitlines() if f"{field}=" in line)
  # Enums and switches are spelled as in a yml.
  shown = str(value).lower() if field == "context_parallel_load_balance" else str(value)
  assert f"{field}={shown}" in line.replace("'", "")
  assert way_out in line


def test_all_broken_rules_are_named_at_once(ling2):
  changes = {"base_num_kv_heads": 8, "kv_lora_rank": 0, "topk_routing_group": 9, "moe_z_loss_weight": -1.0}
  with pytest.raises(ValueError) as error:
    validate(ling2, changes)
  lines = str(error.value).splitlines()
  assert len(lines) == len(changes)
  for field, value in changes.items():
    assert any(line.startswith(f"{field}={value}:") for line in lines)


def test_the_tables_cover_every_listed_field():
  assert set(validation._OFF) <= {field for changes, _ in BAD for field in changes}
  assert set(validation.LING2_ONLY) == set(IN_VAIN)


@pytest.mark.parametrize("field", IN_VAIN)
def test_a_field_of_ours_in_another_model_is_refused(llama, field):
  validate(llama, {})
  with pytest.raises(ValueError) as error:
    validate(llama, {field: IN_VAIN[field]})
  text = str(error.value)
  assert text.startswith(f"{field}={IN_VAIN[field]!r}: only decoder_block=ling2") and "decoder_block=llama2" in text
  assert f"remove it, or set it to {validation.DEFAULTS[field]!r}" in text


def test_other_models_are_not_measured_by_our_rules(llama):
  validate(
    llama, {"base_num_kv_heads": 8, "base_num_decoder_layers": 1, "ici_pipeline_parallelism": 2, "fused_qkv": True}
  )


def test_maxtext_sees_other_values_only_for_ling2(ling2, llama):
  assert validation.shown_to_maxtext(types.SimpleNamespace(**llama)) == {}
  shown = validation.shown_to_maxtext(types.SimpleNamespace(**ling2))
  assert (shown["routed_bias_update_rate"], shown["partial_rotary_factor"]) == (0.0, 1.0)
  assert (ling2["routed_bias_update_rate"], ling2["partial_rotary_factor"]) == (0.001, 0.5)
