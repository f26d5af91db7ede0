"""Bad settings: LING2's rules, MaxText's words, ymls and environment variables, each with words of the error."""

from maxtext_ling2.configs.fields import FIELDS

MMAP = {"dataset_type": "grain", "grain_file_type": "mmap", "grain_train_files": "/data/web"}

# What is changed in the good config, and what the message holds besides "field=value" of the first of these fields.
RULES = [
  ({"lora_input_adapters_path": "/adapters"}, "merge the adapter with to_huggingface or to_maxtext"),
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
  ({"gla_backend": "triton"}, "gla_backend='triton': use one of auto, reference, chunked, pallas"),
  ({"gla_backend": ""}, "use one of auto"),
  ({"experts_backend": "triton"}, "experts_backend='triton': use one of auto, reference, xla, pallas, maxtext"),
  ({"experts_backend": "pallas", "sparse_matmul": False}, "it cannot be had with sparse_matmul=False"),
  ({"experts_backend": "xla", "num_moe_emb_chunks": 2}, "num_moe_emb_chunks=2, which only MaxText's"),
  ({"experts_backend": "pallas", "wi_tile_fwd_mlp_dim": 256}, "wi_tile_fwd_mlp_dim=256, which only MaxText's"),
  ({"experts_backend": "pallas", "quantization": "int8"}, "quantization=int8"),
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
  ({"topk_routing_group": 1, "num_experts_per_tok": 40}, "choose more groups"),
  ({"routed_bias_dtype": "float33"}, "float32, bfloat16, float16, or ''"),
  ({"moe_z_loss_weight": -0.1}, "0 turns it off"),
  ({"moe_shared_expert_dim": -1}, "0 turns it off"),
  ({"routed_bias_update_rate": -0.001}, "0 turns it off"),
  ({"mtp_num_layers": -1}, "0 turns it off"),
  ({"ici_pipeline_parallelism": 2}, "use fsdp"),
  ({"dcn_pipeline_parallelism": 2}, "use fsdp"),
  ({"shard_mode": "explicit"}, "use shard_mode=auto"),
  ({"use_qk_clip": True, "attention": "autoselected"}, "or attention=dot_product"),
  ({"use_qk_clip": True, "attention": "flash", "use_tokamax_splash": True, "hardware": "gpu"}, "on TPUs"),
  ({"adamw_mask": ["scale"], "opt_type": "muon"}, "or use opt_type=adamw"),
  ({"param_scan_axis": 2, "scan_layers": True}, "use 0 or 1"),
  ({"capacity_factor": 1.0, "sparse_matmul": True}, "set sparse_matmul=false"),
  ({"weight_dtype": "float8_e4m3fn"}, "use bfloat16 or float32"),
  ({"causal_block_size": 4}, "leave it at 32"),
  ({"prefuse_moe_weights": True}, "leave it at False"),
  ({"padded_base_moe_mlp_dim": 640}, "leave it at None"),
  ({"weight_block_size": [128, 128]}, "leave it at None"),
  ({"unquantized_modules": ["gate"]}, "leave it at []"),
  ({"enable_streaming_diloco": True, "enable_diloco": True, "num_diloco_fragments": 2}, "set it to false, for plain"),
  ({"compile_xla_flags": "--xla_a=1", "enable_diloco": True}, "use the variable XLA_FLAGS"),
  ({"context_parallel_load_balance": True, "ici_context_parallelism": 2}, "set context_parallel_load_balance=false"),
  ({"context_parallel_load_balance": True, "dcn_context_parallelism": 2}, "dcn_context_parallelism=2: "),
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
  ({"use_gather_mosaic_kernel": True}, "leave it at False"),
  ({"te_moe_block": True}, "leave it at False"),
  ({"use_indexer": True}, "leave it at False"),
  ({"first_num_hash_layers": 1}, "leave it at 0"),
  ({"fused_qkv": True}, "leave it at False"),
  ({"fused_mlp": True}, "leave it at False"),
  ({"moe_expert_input_dim": 64}, "leave it at -1"),
  ({"mtp_reuse_input_embedding": True}, "leave it at False"),
  ({"use_tunix_gradient_accumulation": True}, "leave it at False"),
  ({"logits_via_embedding": True}, "leave it at False"),
  ({"attention_sink": True}, "leave it at False"),
  ({"mlp_bias": True}, "leave it at False"),
  ({"rope_linear_scaling_factor": 4.0}, "leave it at 1.0"),
  ({"local_rope_max_timescale": 10000}, "leave it at -1"),
  ({"interleave_moe_layer_step": 2}, "leave it at 1"),
  ({"nope_layer_interval": 4}, "leave it at -1"),
  ({"attention_bias": True}, "leave it at False"),
  ({"sliding_window_size": 512}, "leave it at 0"),
  ({"chunk_attn_window_size": 512}, "leave it at 0"),
  ({"moba": True}, "leave it at False"),
  ({"temperature_tuning": True}, "leave it at False"),
  ({"use_post_attn_norm": True}, "leave it at False"),
  ({"use_post_ffw_norm": True}, "leave it at False"),
  ({"mlp_activations_limit": 7.0}, "leave it at -1.0"),
  ({"dtype": "float16"}, "computes in bfloat16 and float32"),
  ({"use_untrainable_positional_embedding": True}, "leave it at False"),
  ({"trainable_position_size": 16}, "leave it at -1"),
  ({"final_logits_soft_cap": 30.0}, "it would do nothing; leave it at 0"),
  ({"rope_type": "llama3.1"}, "LING2 supports rope_type=default and yarn"),
  ({"max_position_embeddings": 0}, "the number of positions must be positive"),
  ({"pad_id": 7}, "leave it at 0"),
  ({"pad_id": -1}, "choose one from 0 to"),
  ({"pad_id": 1 << 20}, "choose one from 0 to"),
  ({"bos_id": 2}, "leave it at 1"),
  ({"mmap_eod_id": 1 << 20, **MMAP}, "so no document would end"),
  ({"mmap_eod_id": -1, **MMAP}, "take the token that the files were made with"),
  ({"mmap_npy_split": "99,1", **MMAP}, "mmap would train on all documents"),
  ({"mmap_npy_split": "99;1", **MMAP, "grain_file_type": "mmap_npy"}, "write 99,1, or leave it out"),
  ({"mmap_npy_split": "0,0", **MMAP, "grain_file_type": "mmap_npy"}, "write 99,1, or leave it out"),
  ({"dataset_type": "tfds", "use_sft": True}, "set dataset_type=hf or grain"),
  ({"chat_template_path": "ours.jinja", "use_sft": True, "dataset_type": "hf"}, "pass the absolute path"),
  ({"chat_template_path": "/ours.jinja", "use_sft": True, "dataset_type": "grain"}, "set chat_template"),
]
FINITE = "be positive and finite"

RULES += [
  ({"base_emb_dim": 0}, FINITE),
  ({"base_mlp_dim": -1}, FINITE),
  ({"base_moe_mlp_dim": 0}, FINITE),
  ({"head_dim": 0}, FINITE),
  ({"vocab_size": 0}, FINITE),
  ({"normalization_layer_epsilon": 0.0}, FINITE),
  ({"normalization_layer_epsilon": float("nan")}, FINITE),
  ({"rope_max_timescale": 0}, FINITE),
  ({"routed_scaling_factor": float("inf")}, FINITE),
  ({"routed_scaling_factor": -2.5}, FINITE),
  ({"max_target_length": 0}, FINITE),
  ({"per_device_batch_size": float("nan")}, FINITE),
  ({"rope_factor": 0, "rope_type": "yarn"}, FINITE),
  ({"original_max_position_embeddings": 0, "rope_type": "yarn"}, FINITE),
  ({"beta_slow": 0, "rope_type": "yarn"}, FINITE),
  ({"rope_max_timescale": 1, "rope_type": "yarn"}, "use at least 2"),
  ({"rope_attention_factor": -1.0}, "0 takes MaxText's rule"),
  ({"rope_attention_factor": float("nan")}, "0 takes MaxText's rule"),
  ({"rope_mscale_all_dim": float("inf")}, "a negative number takes MaxText's rule"),
  ({"routed_bias_update_rate": float("nan")}, "0 turns it off"),
  ({"moe_z_loss_weight": float("inf")}, "0 turns it off"),
  ({"partial_rotary_factor": float("nan")}, "0.5 is LING2's"),
  ({"partial_rotary_factor": float("inf")}, "0.5 is LING2's"),
  ({"base_num_query_heads": 0, "base_num_kv_heads": 0}, "set it to at least 1"),
  ({"quantize_kvcache": True}, "set it to false"),
  ({"use_chunked_prefill": True}, "max_prefill_predict_length to the longest prompt"),
  ({"mla_naive_kvcache": True}, "leave it out or set it to false"),
]

SETTINGS = {
  "group_norm_size=many": "valid integer",
  "group_norm_size=99999999999999999999999": "choose a divisor",
  "group_norm_size=3": "choose a divisor",
  "gla_decay_layer_offset=2": "must be 0 (as trained",
  "gla_backend=Pallas": "use one of auto",
  "gla_backend=pallas chunked": "use one of auto",
  "experts_backend=Pallas": "use one of auto",
  "moe_z_loss_weight=nan": "greater than or equal to 0",
  "moe_z_loss_weight=inf": "0 turns it off",
  "moe_shared_expert_dim=-1": "0 turns it off",
  "routed_bias_dtype=float64": "use one of float32",
  "routed_bias_dtype=FLOAT32": "use one of float32",
  "enable_routed_bias_grad=maybe": "valid boolean",
  "rope_mscale_all_dim=nan": "takes MaxText's rule",
  "rope_attention_factor=-1": "takes MaxText's rule",
  "pad_id=99999": "choose one from 0 to",
  "bos_id=-1": "leave it at 1",
  "routed_bias_update_rate=nan": "0 turns it off",
  "partial_rotary_factor=inf": "0.5 is LING2's",
  "base_num_decoder_layers=0": "use at least 2",
  "base_num_query_heads=3": "set it to base_num_query_heads=3",
  "base_emb_dim=0": FINITE,
  "head_dim=-8": FINITE,
  "head_dim=7": "even number",
  "vocab_size=-1": FINITE,
  "num_experts=7": "choose a divisor",
  "num_experts_per_tok=1000": "at most num_experts",
  "topk_routing_group=9": "groups can be chosen",
  "routed_score_func=tanh": "set routed_score_func=sigmoid",
  "decoder_block=ling3": "and no decoder_block",
  "decoder_block=llama2": "and no decoder_block",
  "attention_type=chunk": "set attention_type=mla",
  "attention=paged": "`maxtext-ling2 eval` and `generate`",
  "quantize_kvcache=true": "set it to false",
  "use_chunked_prefill=true": "the longest prompt",
  "mla_naive_kvcache=true": "set it to false",
  "ici_pipeline_parallelism=2": "use fsdp",
  "dcn_pipeline_parallelism=2": "use fsdp",
  "context_parallel_load_balance=true ici_context_parallelism=2": "set context_parallel_load_balance=false",
  "ici_autoregressive_parallelism=2": "set sparse_matmul=false",
  "shard_mode=explicit": "use shard_mode=auto",
  "per_device_batch_size=0": FINITE,
  "max_target_length=-1": FINITE,
  "--steps=3": "not in",
  "novalue": "not in",
}
"""Words after `model_name=ling2-tiny override_model_config=true`: the field of the first is at fault.

Values that MaxText's types refuse (`pad_id=x`) are MaxText's to test; three show that their errors reach the user.
"""

MODELS = {
  "ling": "'ling2'",
  "Ling2": "'ling2'",
  "LING2": "doctor",
  "ling-2": "'ling2'",
  "ling2.yml": "'ling2'",
  "ling2_tiny": "'ling2-tiny'",
  "ling2.6flash": "'ling2.6-flash'",
  "ling2.5-1T": "'ling2.5-1t'",
  "../ling2": "'ling2'",
  "/etc/passwd": "doctor",
  "inclusionAI/Ling-2.5": "doctor",
  "none": "doctor",
}
"""Misspelt model names, and what the answer names."""

TYPOS = {field.name[: len(field.name) // 2] + field.name[len(field.name) // 2 + 1 :]: field.name for field in FIELDS}
"""Our fields with their middle letter left out."""

NAMED = "base_config: base.yml\n{}model_name: ling2-tiny\n"

YMLS = {
  "base_config: base.yml\nmodel_name: ling22\n": ["model_name=ling22", "'ling2'"],
  "{base_config: base.yml, model_name: ling2-tiny}": ["model_name=ling2-tiny", "as a line of its own"],
  "base_config: base.yml\nmodel_name: &a ling2-tiny\nrun_name: *a\n": ["model_name=ling2-tiny", "as a line of its own"],
  NAMED.format("group_norm_siz: 4\n"): ["group_norm_siz=4", "did you mean 'group_norm_size'"],
  NAMED.format("moe_z_loss_weight: .nan\n"): ["moe_z_loss_weight", "greater than or equal to 0"],
  NAMED.format("moe_z_loss_weight: .inf\n"): ["moe_z_loss_weight=inf", "0 turns it off"],
  NAMED.format("ici_pipeline_parallelism: 2\n"): ["ici_pipeline_parallelism=2", "use fsdp"],
  NAMED.format("bos_id: [1]\n"): ["bos_id", "valid integer"],
  NAMED.format("steps: 3\nsteps: 4\n"): ["bad.yml", "duplicate key steps", "line 3"],
  NAMED.format("steps: [1\n"): ["bad.yml", "line 2"],
  NAMED.format("\tsteps: 3\n"): ["bad.yml", "tab character"],
  NAMED.format("run_name: !!python/object/apply:os.getcwd []\n"): ["bad.yml", "tag"],
  NAMED.format("steps: ${nothing}\n"): ["steps", "'nothing' not found"],
  "base_config: gone.yml\nmodel_name: ling2-tiny\n": ["gone.yml", "No such file"],
  "base_config: base.yml\nmodel_name: ling2-custom\n": ["model_name=ling2-custom", "this name has no sizes of its own"],
}
"""Base ymls called bad.yml, and words of the error."""

VARIABLES = {
  "M_MODEL_NAME=ling2": "unset it and pass model_name=ling2",
  "M_MODEL_NAME=llama2-7b": "unset it and pass model_name=ling2-tiny",
  "M_GROUP_NORM_SIZE=many": "Couldn't parse",
  "M_GROUP_NORM_SIZE=3": "choose a divisor",
  "M_MOE_Z_LOSS_WEIGHT=nan": "greater than or equal to 0",
  "M_MOE_Z_LOSS_WEIGHT=inf": "0 turns it off",
  "M_GLA_BACKEND=triton": "use one of auto",
  "M_PAD_ID=-1": "choose one from 0 to",
  "M_BOS_ID=2": "leave it at 1",
  "M_USE_LINEAR_SILU=2": "Couldn't parse",
  "M_STEPS=x": "Couldn't parse",
  "M_DECODER_BLOCK=llama2": "and no decoder_block",
  "M_ICI_PIPELINE_PARALLELISM=2": "use fsdp",
  "M_SHARD_MODE=explicit": "use shard_mode=auto",
  "M_ATTENTION=paged": "`maxtext-ling2 eval` and `generate`",
  "M_QUANTIZE_KVCACHE=true": "set it to false",
  "M_MLA_NAIVE_KVCACHE=true": "set it to false",
}
"""Environment variables beside `model_name=ling2-tiny override_model_config=true`."""

SLIM = """
steps: 10
decoder_block: llama2
ici_pipeline_parallelism: 1
shard_mode: auto
attention: autoselected
quantize_kvcache: false
mla_naive_kvcache: false
"""
"""A base yml with only what `VARIABLES` changes: merging the 800 keys of MaxText's takes most of the time of a case."""


def split(text):
  """The words of a row of `SETTINGS`; a blank belongs to a value unless a field follows it."""
  first, *rest = text.split(" ")
  found = [first]
  for word in rest:
    if "=" in word:
      found.append(word)
    else:
      found[-1] += f" {word}"
  return found
