# SPDX-License-Identifier: Apache-2.0
# Part of maxtext-ling2.
"""Configuration of LING2 (BailingMoeV2_5) for transformers 4.57 and 5.

Ling 3.0 is another model of the same model_type, `bailing_hybrid`, and transformers 5.20 and later have it built in. So
that they do not read this model's weights as Ling 3.0's, config.json names a weight file that does not exist (GUARD).
This class takes that name out when it reads config.json and puts it back when it writes one: whoever loads the model with
trust_remote_code=True comes here and never sees it; whoever loads it without gets an error that says what to do.
"""

import math
from typing import Any

from transformers.configuration_utils import PretrainedConfig

GUARD = "load-with-trust_remote_code=True.safetensors"
AUTO_MAP = {
  "AutoConfig": "configuration_ling2.BailingMoeV2_5Config",
  "AutoModel": "modeling_ling2.BailingMoeV2_5Model",
  "AutoModelForCausalLM": "modeling_ling2.BailingMoeV2_5ForCausalLM",
}

_FIXED = {
  "hidden_act": "silu",
  "score_function": "sigmoid",
  "use_qkv_bias": False,
  "use_bias": False,
  "tie_word_embeddings": False,
  "rope_interleave": True,
  "moe_router_enable_expert_bias": True,
}
"""Keys with one possible value: another one is another model."""


class BailingMoeV2_5Config(PretrainedConfig):
  """The keys of config.json. Names and defaults are those of the official configuration class.

  Args:
    head_dim: None takes hidden_size / num_attention_heads.
    num_key_value_heads: None, or num_attention_heads; there is no grouped attention in this model.
    q_lora_rank: None or 0 for queries without a latent.
    num_shared_experts: None or 0 for none.
    group_norm_size: number of groups of the norm after linear attention.
    linear_silu: SiLU on the queries, keys and values of linear attention; `use_linear_silu` is another name for it.
    layer_group_size: the last layer of each group, and all layers after the last whole group, have latent attention.
    mtp_loss_scaling_factor: weight of the loss of multi-token prediction; with 0 it is not computed.
    gla_decay_layer_offset: 0 or 1: the decay of linear attention in layer i is made with i - offset. None means that
      config.json does not say; the model then takes 1, as the official code does.
    rope_theta, partial_rotary_factor, rope_scaling: rotary embedding in the layout of transformers 4, which is the one
      that is written. rope_scaling is None, or YaRN's parameters with `rope_type` (or `type`) "yarn".
    rope_parameters: all three in one dictionary, the layout of transformers 5; where given, it wins.
  """

  model_type = "bailing_hybrid"
  keys_to_ignore_at_inference = ["past_key_values", "cache"]

  def __init__(
    self,
    vocab_size: int = 157184,
    hidden_size: int = 2048,
    intermediate_size: int = 5120,
    num_hidden_layers: int = 20,
    num_attention_heads: int = 16,
    num_key_value_heads: int | None = None,
    head_dim: int | None = 128,
    max_position_embeddings: int = 32768,
    rms_norm_eps: float = 1e-6,
    initializer_range: float = 0.02,
    attention_dropout: float = 0.0,
    use_cache: bool = True,
    pad_token_id: int | None = 156892,
    eos_token_id: int | None = 156892,
    layer_group_size: int = 5,
    group_norm_size: int = 4,
    use_qk_norm: bool = True,
    linear_silu: bool | None = None,
    use_linear_silu: bool | None = None,
    gla_decay_layer_offset: int | None = None,
    kv_lora_rank: int = 512,
    q_lora_rank: int | None = None,
    qk_nope_head_dim: int = 128,
    qk_rope_head_dim: int = 64,
    v_head_dim: int = 128,
    rope_theta: float = 600000.0,
    partial_rotary_factor: float = 0.5,
    rope_scaling: dict[str, Any] | None = None,
    rope_parameters: dict[str, Any] | None = None,
    first_k_dense_replace: int = 1,
    num_experts: int = 256,
    num_experts_per_tok: int = 8,
    num_shared_experts: int | None = 1,
    moe_intermediate_size: int = 512,
    n_group: int = 8,
    topk_group: int = 4,
    routed_scaling_factor: float = 1.0,
    num_nextn_predict_layers: int | None = 0,
    mtp_loss_scaling_factor: float | None = 0.0,
    **kwargs: Any,
  ):
    if kwargs.get("transformers_weights") == GUARD:
      del kwargs["transformers_weights"]
    for key, only in _FIXED.items():
      setattr(self, key, kwargs.pop(key, only))
    self.vocab_size = vocab_size
    self.hidden_size = hidden_size
    self.intermediate_size = intermediate_size
    self.num_hidden_layers = num_hidden_layers
    self.num_attention_heads = num_attention_heads
    self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
    self.head_dim = head_dim or hidden_size // num_attention_heads
    self.max_position_embeddings = max_position_embeddings
    self.rms_norm_eps = rms_norm_eps
    self.initializer_range = initializer_range
    self.attention_dropout = attention_dropout
    self.use_cache = use_cache

    self.layer_group_size = layer_group_size
    self.group_norm_size = group_norm_size
    self.use_qk_norm = use_qk_norm
    self.linear_silu = self.use_linear_silu = bool(linear_silu or use_linear_silu)
    self.gla_decay_layer_offset = gla_decay_layer_offset

    self.kv_lora_rank = kv_lora_rank
    self.q_lora_rank = q_lora_rank
    self.qk_nope_head_dim = qk_nope_head_dim
    self.qk_rope_head_dim = qk_rope_head_dim
    self.v_head_dim = v_head_dim

    self.first_k_dense_replace = first_k_dense_replace
    self.num_experts = num_experts
    self.num_experts_per_tok = num_experts_per_tok
    self.num_shared_experts = num_shared_experts
    self.moe_intermediate_size = moe_intermediate_size
    self.n_group = n_group
    self.topk_group = topk_group
    self.routed_scaling_factor = routed_scaling_factor
    self.num_nextn_predict_layers = num_nextn_predict_layers or 0
    self.mtp_loss_scaling_factor = mtp_loss_scaling_factor or 0.0

    self.rope_theta = rope_theta
    self.partial_rotary_factor = partial_rotary_factor
    self.rope_scaling = rope_scaling
    if rope_parameters:
      self.rope_parameters = rope_parameters
    self.refuse_contradictions()
    super().__init__(pad_token_id=pad_token_id, eos_token_id=eos_token_id, tie_word_embeddings=False, **kwargs)

  def refuse_contradictions(self) -> None:
    """Raises ValueError where the values are those of another model, or of none. The model asks again."""
    for key, only in _FIXED.items():
      if getattr(self, key) != only:
        raise ValueError(f"{key}={getattr(self, key)!r}: not {only!r}, the only value that this model computes")
    offset, heads = self.gla_decay_layer_offset, self.num_attention_heads
    if offset is not None and (type(offset) is not int or offset not in (0, 1)):
      raise ValueError(f"gla_decay_layer_offset={offset!r}: not 0 or 1")
    if self.num_key_value_heads != heads:
      raise ValueError(f"num_key_value_heads={self.num_key_value_heads}: not num_attention_heads={heads}")
    if heads * self.head_dim % self.group_norm_size:
      raise ValueError(
        f"group_norm_size={self.group_norm_size}: does not divide heads * head_dim = {heads * self.head_dim}"
      )
    if self.n_group < 1 or self.num_experts % self.n_group:
      raise ValueError(f"n_group={self.n_group}: does not divide num_experts={self.num_experts}")
    if not 1 <= self.topk_group <= self.n_group:
      raise ValueError(f"topk_group={self.topk_group}: not between 1 and n_group={self.n_group}")
    if self.num_experts_per_tok > self.topk_group * (self.num_experts // self.n_group):
      raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}: more experts than topk_group groups have")
    rotated = int(self.head_dim * self.partial_rotary_factor)
    if rotated != self.qk_rope_head_dim:
      raise ValueError(
        f"partial_rotary_factor={self.partial_rotary_factor}: head_dim * factor is {rotated}, not qk_rope_head_dim="
        f"{self.qk_rope_head_dim}, but both attentions rotate with the same frequencies"
      )

  @property
  def rope_scaling(self) -> dict[str, Any] | None:
    """YaRN's parameters; None without YaRN."""
    # Under the property's own name in __dict__, where transformers looks for what it writes to config.json.
    return self.__dict__.get("rope_scaling")

  @rope_scaling.setter
  def rope_scaling(self, value: dict[str, Any] | None) -> None:
    scaling = {key: number for key, number in (value or {}).items() if number is not None}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "yarn"):
      raise ValueError(f"rope_scaling.rope_type={kind!r}: not 'yarn' or 'default', the only types of this model")
    if kind == "yarn":
      scaling |= {"rope_type": kind, "type": kind}  # old readers look for `type`
      original = scaling.setdefault("original_max_position_embeddings", self.max_position_embeddings)
      scaling.setdefault("factor", self.max_position_embeddings / original)
    self.__dict__["rope_scaling"] = scaling if kind == "yarn" else None

  @property
  def rope_parameters(self) -> dict[str, Any]:
    """rope_theta, partial_rotary_factor and rope_scaling as one dictionary, as transformers 5 has it. A copy."""
    return {
      "rope_type": "default",
      **(self.rope_scaling or {}),
      "rope_theta": self.rope_theta,
      "partial_rotary_factor": self.partial_rotary_factor,
    }

  @rope_parameters.setter
  def rope_parameters(self, value: dict[str, Any] | None) -> None:
    rest = dict(value or {})
    self.rope_theta = rest.pop("rope_theta", None) or self.rope_theta
    self.partial_rotary_factor = rest.pop("partial_rotary_factor", None) or self.partial_rotary_factor
    self.rope_scaling = rest

  def to_dict(self) -> dict[str, Any]:
    """What config.json says, with what makes a folder load this code: auto_map, architectures and the guard."""
    written = super().to_dict()
    written["auto_map"] = {**(written.get("auto_map") or {}), **AUTO_MAP}
    written["architectures"] = written.get("architectures") or ["BailingMoeV2_5ForCausalLM"]
    written["transformers_weights"] = GUARD
    return written


def is_mla(config: BailingMoeV2_5Config, layer: int) -> bool:
  """Whether a layer has latent attention; MTP's layers, from num_hidden_layers on, have it too."""
  layers, group = config.num_hidden_layers, config.layer_group_size
  return (layer + 1) % group == 0 or layer >= layers // group * group


def log_decays(config: BailingMoeV2_5Config, layer: int) -> list[float]:
  """The log of each head's decay in a layer of linear attention: ALiBi's slopes, the weaker the deeper the layer."""

  def slopes(count: int) -> list[float]:
    ratio = 2.0 ** -(2.0 ** -(math.log2(count) - 3))
    return [ratio**j for j in range(1, count + 1)]

  heads, offset = config.num_attention_heads, config.gla_decay_layer_offset
  power = 2 ** int(math.log2(heads))
  depth = (layer - (1 if offset is None else offset)) / (config.num_hidden_layers - 1)
  return [-s * (1 - depth + 1e-5) for s in slopes(power) + slopes(2 * power)[0::2][: heads - power]]


def inverse_frequencies(config: BailingMoeV2_5Config) -> list[float]:
  """Radians per position of the rotated pairs, with YaRN (arXiv:2309.00071) where rope_scaling asks for it.

  Pairs that turn more than beta_fast times within the original length keep their frequency, pairs that turn less than
  beta_slow times are slowed down by the factor, those between are blended linearly.
  """
  rope, dims = config.rope_parameters, config.qk_rope_head_dim
  theta, plain = rope["rope_theta"], [rope["rope_theta"] ** (-2 * j / dims) for j in range(dims // 2)]
  if rope["rope_type"] != "yarn":
    return plain

  def pair_that_turns(times: float) -> float:
    return dims * math.log(rope["original_max_position_embeddings"] / (2 * math.pi * times)) / (2 * math.log(theta))

  low, high = pair_that_turns(rope.get("beta_fast") or 32), pair_that_turns(rope.get("beta_slow") or 1)
  if rope.get("truncate", True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dims - 1)
  width = high - low if high != low else 1e-3
  slowed = [min(max((j - low) / width, 0.0), 1.0) for j in range(dims // 2)]
  return [f * (1 - s) + f / rope["factor"] * s for f, s in zip(plain, slowed, strict=True)]


def yarn_magnitude(factor: float, mscale: float) -> float:
  """0.1 * mscale * ln(factor) + 1; 1 without stretching."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(config: BailingMoeV2_5Config) -> float:
  """What cos and sin are multiplied by: rope_scaling.attention_factor, or else what transformers makes of the mscales."""
  rope = config.rope_parameters
  if rope["rope_type"] != "yarn":
    return 1.0
  if rope.get("attention_factor") is not None:
    return float(rope["attention_factor"])
  mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
  if mscale and all_dim:
    return yarn_magnitude(rope["factor"], mscale) / yarn_magnitude(rope["factor"], all_dim)
  return yarn_magnitude(rope["factor"], 1.0)


def softmax_scale(config: BailingMoeV2_5Config) -> float:
  """Of MLA: (nope + rope)^-0.5, times YaRN's magnitude squared where rope_scaling names an mscale_all_dim."""
  rope, scale = config.rope_parameters, (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
  all_dim = rope.get("mscale_all_dim") if rope["rope_type"] == "yarn" else None
  return scale * yarn_magnitude(rope["factor"], all_dim) ** 2 if all_dim else scale


BailingMoeV2_5Config.register_for_auto_class()
