"""The config fields that LING2 adds to MaxText.

Those are the 16 of the RFC "Refactor PR1 - Ling2 config extension", with its names, owners, types and defaults; the
decay offset, on which LING2's sources disagree; the backends of GLA and of the experts; YaRN's two scales; and the
switch of the XLA flags. A field that the installed MaxText already defines remains MaxText's.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Field:
  """One config field.

  Attributes:
    name: as in a YAML file or on the command line.
    owner: the class of `maxtext.configs.types` to which it belongs.
    annotation: its type, the name of a builtin or of a type in `maxtext.configs.types`.
    default: the value at which it changes no other model.
    description: what it does, and its Megatron name if it has one.
    ling2_only: whether only LING2 reads it, so that another model's run refuses any value but the default.
  """

  name: str
  owner: str
  annotation: str
  default: Any
  description: str
  ling2_only: bool = True


FIELDS = (
  Field(
    "moe_z_loss_weight",
    "MoEGeneral",
    "NonNegativeFloat",
    0.0,
    "Weight of the router z-loss, mean(logsumexp(router logits)^2) per MoE layer (Megatron --moe-z-loss-coeff).",
  ),
  Field(
    "moe_shared_expert_dim",
    "DeepSeekMoE",
    "int",
    0,
    "Hidden width of one shared expert; 0: moe_mlp_dim (Megatron --moe-shared-expert-intermediate-size).",
  ),
  Field("routed_bias_dtype", "DeepSeekMoE", "str", "", "dtype in which the router bias is kept; '': weight_dtype."),
  Field(
    "enable_routed_bias_grad",
    "DeepSeekMoE",
    "bool",
    True,
    "Whether the router bias is a trainable parameter; False: only loss-free balancing moves it, as in Megatron.",
  ),
  Field(
    "routed_bias_zero_mean_update",
    "DeepSeekMoE",
    "bool",
    False,
    "Whether loss-free balancing recentres the router bias to mean 0 after each update, as Megatron does.",
  ),
  Field(
    "mla_interleaved_rope",
    "MlaAttention",
    "bool",
    True,
    "Whether the rotary dimensions of MLA's q and k are stored as interleaved pairs (x0, y0, x1, y1, ...).",
  ),
  Field(
    "rope_mscale_all_dim",
    "YarnRope",
    "float",
    -1.0,
    "mscale of the factor of MLA's softmax scale under YaRN, Hugging Face's rope_scaling.mscale_all_dim; 0: no factor; "
    "negative: MaxText's rule, mscale if max_position_embeddings exceeds original_max_position_embeddings. Without "
    "rope_type=yarn there is no factor.",
  ),
  Field(
    "rope_attention_factor",
    "YarnRope",
    "float",
    0.0,
    "Factor of cos and sin under YaRN, as Hugging Face's rope_scaling.attention_factor; 0: MaxText's rule, "
    "rope_attention_scaling.",
  ),
  Field(
    "group_norm_size",
    "Qwen3Next",
    "int",
    1,
    "NUMBER of groups of the RMSNorm on the linear attention's output; 1: one RMSNorm over all heads.",
  ),
  Field(
    "use_linear_silu",
    "Qwen3Next",
    "bool",
    False,
    "Whether linear attention applies SiLU to its projected q, k and v (Megatron: not --no-linear-silu).",
  ),
  Field(
    "gla_decay_layer_offset",
    "Qwen3Next",
    "int",
    0,
    "Offset of the layer index in linear attention's decay: 0 as trained (Megatron, SGLang, vLLM), 1 as in the Hugging "
    "Face code.",
  ),
  Field(
    "gla_backend",
    "Qwen3Next",
    "str",
    "auto",
    "What computes linear attention: pallas (a TPU kernel), chunked (plain JAX), reference (its recurrence, slow), or "
    "auto: pallas on TPU, chunked elsewhere.",
  ),
  Field(
    "experts_backend",
    "MoEKernels",
    "str",
    "auto",
    "What computes the routed experts: pallas (TPU kernels), xla (the same in plain JAX), reference (slow), maxtext (its "
    "grouped products), or auto: pallas on a TPU and xla on a GPU where settings and shapes allow it, else maxtext.",
  ),
  Field(
    "tuned_xla_flags",
    "LayoutAndSharding",
    "bool",
    True,
    "Whether train and eval step are compiled for a TPU with the XLA flags that LING2 has for its generation; "
    "compile_xla_flags wins over them.",
  ),
  Field(
    "blend_cache_dir",
    "GrainDataset",
    "PathStr",
    "",
    "Cache folder of the blended Megatron dataset's indices.",
    ling2_only=False,
  ),
  Field(
    "blend_index_dir", "GrainDataset", "PathStr", "", "Folder of pre-generated blended dataset indices.", ling2_only=False
  ),
  Field(
    "reset_attention_mask",
    "GrainDataset",
    "bool",
    True,
    "Start a new segment after each end-of-document token.",
    ling2_only=False,
  ),
  Field(
    "eod_mask_loss",
    "GrainDataset",
    "bool",
    False,
    "Exclude positions whose input is end-of-document from the loss.",
    ling2_only=False,
  ),
  Field(
    "mmap_split_sentences",
    "GrainDataset",
    "bool",
    False,
    "Whether the data was made with --split-sentences.",
    ling2_only=False,
  ),
  Field("pad_id", "Tokenizer", "int", 0, "Padding token of the mmap pipeline, so that it needs no tokenizer for it."),
  Field("bos_id", "Tokenizer", "int", 1, "BOS token inserted between documents with concat_then_split packing."),
  Field(
    "calculate_per_token_loss",
    "Optimizer",
    "bool",
    True,
    "How gradient accumulation averages: True: over all tokens of all microbatches; False: each microbatch's own mean, "
    "with equal weight (Megatron: not --no-calculate-per-token-loss).",
  ),
)

DEFAULTS = {field.name: field.default for field in FIELDS}
