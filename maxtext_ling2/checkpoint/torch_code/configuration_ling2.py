# SPDX-License-Identifier: Apache-2.0
# Part of maxtext-ling2.
"""Configuration of LING2 (BailingMoeV2_5) for transformers 4.57 and 5.

Ling 3.0 is another model of the same model_type, `bailing_hybrid`, and transformers 5.20 and later have it built in. So
that they do not read this model's weights as Ling 3.0's, config.json names a weight file that does not exist (GUARD).
This class takes that name out when it reads config.json and puts it back when it writes one: whoever loads the model with
trust_remote_code=True comes here and never sees it; whoever loads it without gets an error that says what to do.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.configuration_utils import PretrainedConfig

GUARD = "load-with-trust_remote_code=True.safetensors"
AUTO_MAP = {
  "AutoConfig": "configuration_ling2.BailingMoeV2_5Config",
  "AutoModel": "modeling_ling2.BailingMoeV2_5Model",
  "AutoModelForCausalLM": "modeling_ling2.BailingMoeV2_5ForCausalLM",
}

_WRITTEN = {
  "hidden_act": ("silu",),
  "score_function": ("sigmoid",),
  "use_qkv_bias": (False,),
  "use_bias": (False,),
  "tie_word_embeddings": (False,),
  "rope_interleave": (True,),
  "moe_router_enable_expert_bias": (True,),
}
"""Keys of the official class with the only values that this model computes. config.json always says them."""

_ALLOWED = {
  **_WRITTEN,
  "scoring_func": ("sigmoid",),
  "topk_method": ("noaux_tc",),
  "router_dtype": ("fp32", "float32", None),
  "embedding_dropout": (0, None),
  "output_dropout": (0, None),
  "norm_topk_prob": (True,),
  "moe_router_enable_routed_scaling": (True,),
  "moe_router_enable_shared_expert": (True,),
  "use_rmsnorm": (True,),
  "norm_head": (False,),
  "norm_softmax": (False,),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "sliding_window": (None,),
  "use_sliding_window": (False,),
  "rope_traditional": (False,),
  "use_mla_nope": (False,),
  "value_norm": (False,),
  "up_proj_norm": (False,),
  "scale_router_input": (False,),
  "use_nGPT": (False,),
  "expert_swiglu_limit_list": (None,),
  "share_expert_swiglu_limit_list": (None,),
}
"""The same, with the keys of published files of the family and of those who read them. All may be absent."""

_OTHER_ATTENTION = ("kda", "linear_att", "short_conv", "linear_key_value_heads", "linear_num_", "linear_head_dim")
"""Parts of the names of keys that other linear attentions have."""

_AS_GIVEN = (
  *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
  *("max_position_embeddings", "rms_norm_eps", "initializer_range", "attention_dropout", "use_cache"),
  *("layer_group_size", "group_norm_size", "use_qk_norm", "gla_decay_layer_offset"),
  *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
  *("first_k_dense_replace", "num_experts", "num_experts_per_tok", "num_shared_experts", "moe_intermediate_size"),
  *("n_group", "topk_group", "routed_scaling_factor"),
)
"""Arguments that become attributes as they are."""

_SIZES = (
  *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "max_position_embeddings"),
  *("layer_group_size", "group_norm_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
  *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"),
)
_COUNTS = ("first_k_dense_replace", "q_lora_rank", "num_shared_experts", "num_nextn_predict_layers")
_POSITIVE = ("rms_norm_eps", "routed_scaling_factor", "rope_theta")
_SWITCHES = ("use_qk_norm", "linear_silu", "use_linear_silu")

_ROPE_ON_TOP = {"rope_theta": 600000.0, "partial_rotary_factor": 0.5}
"""What of the rotary embedding is no scaling: the defaults."""

_YARN = {
  "factor": 1e-6,
  "original_max_position_embeddings": 1,
  "attention_factor": 1e-6,
  "beta_fast": 1e-6,
  "beta_slow": 1e-6,
  "mscale": 0,
  "mscale_all_dim": 0,
}
"""The smallest value of YaRN's parameters; `truncate` is another one, true or false."""


class BailingMoeV2_5Config(PretrainedConfig):
  """The keys of config.json. Names and defaults are those of the official configuration class.

  Args:
    head_dim: None takes hidden_size / num_attention_heads.
    num_key_value_heads: None, or num_attention_heads; there is no grouped attention in this model.
    q_lora_rank: None or 0 for queries without a latent.
    num_shared_experts: None or 0 for none.
    group_norm_size: number of groups of the norm after linear attention.
    linear_silu: SiLU on the queries, keys and values of linear attention; `use_linear_silu` is another name for it,
      which must not contradict it.
    layer_group_size: the last layer of each group, and all layers after the last whole group, have latent attention.
    mtp_loss_scaling_factor: weight of the loss of multi-token prediction; with 0 it is not computed.
    gla_decay_layer_offset: 0 or 1: the decay of linear attention in layer i is made with i - offset. None means that
      config.json does not say; the model then takes 1, as the official code does.
    rope_theta, partial_rotary_factor, rope_scaling: rotary embedding in the layout of transformers 4, which is the one
      that is written. None takes 600000 and 0.5. rope_scaling is None, or YaRN's parameters with `rope_type` (or `type`)
      "yarn".
    rope_parameters: all three in one dictionary, the layout of transformers 5. It may repeat the others, and must not
      contradict them.

  Raises:
    ValueError: a value, or several together, are not what this model computes; they are named.
  """

  model_type = "bailing_hybrid"
  keys_to_ignore_at_inference = ["past_key_values", "cache"]

  # Long because of its arguments: transformers and its users look up here which keys there are, and their defaults.
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
    rope_theta: float | None = None,
    partial_rotary_factor: float | None = None,
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
    given = dict(locals())  # the arguments by their names
    for key in _AS_GIVEN:
      setattr(self, key, given[key])
    for key, (only,) in _WRITTEN.items():
      setattr(self, key, kwargs.pop(key, only))
    if kwargs.get("transformers_weights") == GUARD:
      del kwargs["transformers_weights"]
    _refuse(_bad_numbers(vars(self)))
    self.head_dim = _even_share(hidden_size, num_attention_heads) if head_dim in (None, 0) else head_dim
    self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
    self.num_nextn_predict_layers = 0 if num_nextn_predict_layers is None else num_nextn_predict_layers
    self.mtp_loss_scaling_factor = 0.0 if mtp_loss_scaling_factor is None else mtp_loss_scaling_factor
    self.linear_silu = (use_linear_silu or False) if linear_silu is None else linear_silu
    self.use_linear_silu = self.linear_silu if use_linear_silu is None else use_linear_silu
    self._set_rope(given)
    self.refuse_contradictions(kwargs)
    super().__init__(pad_token_id=pad_token_id, eos_token_id=eos_token_id, tie_word_embeddings=False, **kwargs)

  def refuse_contradictions(self, more: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError where the values are those of another model, or of none. The model asks again.

    Args:
      more: values that are not attributes yet.
    """
    values = {**vars(self), **(more or {})}
    _refuse(_bad_numbers(values))
    _refuse(_other_models(values))
    _refuse(_contradictions(self, values))

  def _set_rope(self, given: Mapping[str, Any]) -> None:
    """Makes one layout of the two that __init__ takes."""
    old, new = (_undamaged_rope(layout, given[layout]) for layout in ("rope_scaling", "rope_parameters"))
    for key, default in _ROPE_ON_TOP.items():
      places = {key: given[key], f"rope_scaling.{key}": old.get(key), f"rope_parameters.{key}": new.get(key)}
      setattr(self, key, _agreed(places, default))
    if old and new:
      ours, theirs = (_complete_rope(rope, self.max_position_embeddings) for rope in (old, new))
      for key, value in ours.items():  # rope_type is the first
        _agreed({f"rope_scaling.{key}": value, f"rope_parameters.{key}": theirs[key]}, None)
    self._take_rope(old or new)

  @property
  def rope_scaling(self) -> dict[str, Any] | None:
    """YaRN's parameters; None without YaRN."""
    # Under the property's own name in __dict__, where transformers looks for what it writes to config.json.
    return self.__dict__.get("rope_scaling")

  @rope_scaling.setter
  def rope_scaling(self, value: dict[str, Any] | None) -> None:
    self._take_rope(_undamaged_rope("rope_scaling", value))

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
    self._take_rope(_undamaged_rope("rope_parameters", value))

  def _take_rope(self, rope: dict[str, Any]) -> None:
    for key in _ROPE_ON_TOP:
      setattr(self, key, rope.pop(key, getattr(self, key)))
    if rope.get("rope_type") == "yarn":
      rope["type"] = "yarn"  # old readers look for it
      original = rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
      rope.setdefault("factor", self.max_position_embeddings / original)
    self.__dict__["rope_scaling"] = rope if rope.get("rope_type") == "yarn" else None

  def to_dict(self) -> dict[str, Any]:
    """What config.json says, with what makes a folder load this code: auto_map, architectures and the guard."""
    written = super().to_dict()
    written["auto_map"] = {**(written.get("auto_map") or {}), **AUTO_MAP}
    written["architectures"] = written.get("architectures") or ["BailingMoeV2_5ForCausalLM"]
    written["transformers_weights"] = GUARD
    return written


def _refuse(problems: Iterator[str]) -> None:
  found = list(problems)
  if found:
    raise ValueError("\n".join(found))


def _even_share(hidden_size: int, heads: int) -> int:
  if hidden_size % heads:
    raise ValueError(
      f"hidden_size={hidden_size}: no multiple of num_attention_heads={heads}, as it must be without a head_dim"
    )
  return hidden_size // heads


def _bad_numbers(values: Mapping[str, Any]) -> Iterator[str]:
  """Values that are not of their key's type, or out of its range; of the keys that are there."""
  rules = {
    "a positive integer": (_SIZES, lambda value: type(value) is int and 0 < value < 2**31),
    "a positive integer up to 10000": (("num_hidden_layers",), lambda value: type(value) is int and 0 < value <= 10000),
    "a non-negative integer": (_COUNTS, lambda value: value is None or (type(value) is int and 0 <= value < 2**31)),
    "a positive number": (_POSITIVE, lambda value: _is_number(value) and value > 0),
    "a positive number up to 1": (("partial_rotary_factor",), lambda value: _is_number(value) and 0 < value <= 1),
    "a non-negative number": (("mtp_loss_scaling_factor",), lambda value: _is_number(value) and value >= 0),
    "true or false": (_SWITCHES, lambda value: type(value) is bool),
  }
  for what, (keys, right) in rules.items():
    yield from (f"{key}={values[key]!r}: not {what}" for key in keys if key in values and not right(values[key]))


def _is_number(value: Any) -> bool:
  """Whether a value is a finite number of a size that integers and floats hold exactly."""
  return type(value) in (int, float) and -(2**53) < value < 2**53


def _other_models(values: Mapping[str, Any]) -> Iterator[str]:
  """Values of keys that have one possible value, and keys that other models have."""
  for key, allowed in _ALLOWED.items():
    if key in values and values[key] not in allowed:
      yield f"{key}={values[key]!r}: not {allowed[0]!r}, the only value that this model computes"
  for key, value in values.items():
    if any(part in key for part in _OTHER_ATTENTION) and key != "num_kv_heads_for_linear_attn":
      yield f"{key}={value!r}: a key of another linear attention, which this model does not compute"


def _contradictions(config: BailingMoeV2_5Config, values: Mapping[str, Any]) -> Iterator[str]:
  """Values that do not go together."""
  c, heads, offset = config, config.num_attention_heads, config.gla_decay_layer_offset
  if offset is not None and (type(offset) is not int or offset not in (0, 1)):
    yield f"gla_decay_layer_offset={offset!r}: not 0 or 1"
  if c.linear_silu != c.use_linear_silu:
    yield f"linear_silu={c.linear_silu}, use_linear_silu={c.use_linear_silu}: not equal, but names of one switch"
  for key, allowed in _repeated(config).items():
    if values.get(key) is not None and values[key] not in allowed:
      yield f"{key}={values[key]!r}: not {' or '.join(map(repr, allowed))}, which follows from the other keys"
  if c.first_k_dense_replace is None or c.first_k_dense_replace > c.num_hidden_layers:
    yield f"first_k_dense_replace={c.first_k_dense_replace}: not from 0 to num_hidden_layers={c.num_hidden_layers}"
  if heads * c.head_dim % c.group_norm_size:
    yield f"group_norm_size={c.group_norm_size}: does not divide heads * head_dim = {heads * c.head_dim}"
  if c.num_experts % c.n_group:
    yield f"n_group={c.n_group}: does not divide num_experts={c.num_experts}"
  if c.topk_group > c.n_group:
    yield f"topk_group={c.topk_group}: not between 1 and n_group={c.n_group}"
  elif c.num_experts_per_tok > c.topk_group * (c.num_experts // c.n_group):
    yield f"num_experts_per_tok={c.num_experts_per_tok}: more experts than topk_group groups have"
  rotated = int(c.head_dim * c.partial_rotary_factor)
  if rotated != c.qk_rope_head_dim:
    yield (
      f"partial_rotary_factor={c.partial_rotary_factor}: head_dim * factor is {rotated}, not qk_rope_head_dim="
      f"{c.qk_rope_head_dim}, but both attentions rotate with the same frequencies"
    )


def _repeated(config: BailingMoeV2_5Config) -> dict[str, tuple[Any, ...]]:
  """Keys that some files have and that follow from others: the values they may have, beside None."""
  c, layers = config, range(config.num_hidden_layers)
  return {
    "num_key_value_heads": (c.num_attention_heads,),
    "num_kv_heads_for_linear_attn": (c.num_attention_heads, 0),
    "qk_head_dim": (c.qk_nope_head_dim + c.qk_rope_head_dim,),
    "rotary_dim": (c.qk_rope_head_dim,),
    "n_routed_experts": (c.num_experts,),
    "num_local_experts": (c.num_experts,),
    "moe_shared_expert_intermediate_size": (
      c.moe_intermediate_size,
      c.moe_intermediate_size * (c.num_shared_experts or 0),
    ),
    "layer_types": (["full_attention" if is_mla(c, i) else "linear_attention" for i in layers],),
    "mlp_layer_types": (["dense" if i < (c.first_k_dense_replace or 0) else "sparse" for i in layers],),
  }


def _undamaged_rope(layout: str, rope: Any) -> dict[str, Any]:
  """rope_scaling or rope_parameters without its nulls, with `rope_type` for `type`. A copy; {} where there is none.

  Raises:
    ValueError: it is not YaRN with YaRN's parameters, or says what nobody would read.
  """
  if rope is None:
    return {}
  if not isinstance(rope, dict):
    raise ValueError(f"{layout}={rope!r}: a {type(rope).__name__}, not a dictionary")
  rope = {key: value for key, value in rope.items() if value is not None}
  old, kind = rope.pop("type", None), rope.get("rope_type")
  if old is not None and kind is not None and old != kind:
    raise ValueError(f"{layout}.type={old!r}: not {layout}.rope_type={kind!r}, of which one would be ignored")
  kind = old if kind is None else kind
  stretches = sorted(set(rope) - {"rope_type", *_ROPE_ON_TOP})
  if kind is None:
    if stretches or (rope and layout == "rope_scaling"):
      raise ValueError(f"{layout}={rope!r}: without a rope_type, so it says nothing about how it scales")
    return rope
  if kind not in ("default", "yarn"):
    raise ValueError(f"{layout}.rope_type={kind!r}: not 'yarn' or 'default', the only types of this model")
  for key in stretches:
    value, name = rope[key], f"{layout}.{key}={rope[key]!r}"
    if kind == "default":
      raise ValueError(f"{name}: rope_type 'default' has no such parameter")
    if key not in (*_YARN, "truncate"):
      raise ValueError(f"{name}: not a parameter of YaRN that this model knows")
    if key == "truncate" and type(value) is not bool:
      raise ValueError(f"{name}: not true or false")
    if key in _YARN and not (_is_number(value) and value >= _YARN[key]):
      raise ValueError(f"{name}: not a number of at least {_YARN[key]}")
  return {**rope, "rope_type": kind}


def _agreed(places: Mapping[str, Any], default: Any) -> Any:
  """The value that is given, once or several times, or the default.

  Raises:
    ValueError: two places say different things; both are named.
  """
  written = {place: value for place, value in places.items() if value is not None}
  first = next(iter(written.values()), default)
  if any(value != first for value in [*written.values()][1:]):
    values = ", ".join(f"{place}={value!r}" for place, value in written.items())
    raise ValueError(f"{values}: not equal, so one of them would be ignored; make them agree, or leave one out")
  return first


def _complete_rope(rope: dict[str, Any], longest: int) -> dict[str, Any]:
  """A rope_type with all parameters that it has, those that are absent at their defaults; not what is on top."""
  if rope.get("rope_type") != "yarn":
    return {"rope_type": "default"}
  original = rope.get("original_max_position_embeddings", longest)
  given = {key: value for key, value in rope.items() if key not in _ROPE_ON_TOP}
  defaults = {"factor": longest / original, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}
  first = {"rope_type": "yarn", "original_max_position_embeddings": original, "truncate": True}
  complete = {**first, **defaults, **given}
  return {**complete, "attention_factor": _attention_factor({**rope, "factor": complete["factor"]})}


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
  return _attention_factor(rope) if rope["rope_type"] == "yarn" else 1.0


def _attention_factor(rope: Mapping[str, Any]) -> float:
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
