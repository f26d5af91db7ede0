# SPDX-License-Identifier: Apache-2.0
# Part of maxtext-ling2.
"""LING2 (BailingMoeV2_5) in plain PyTorch for transformers 4.57 and 5: no CUDA-only code and no other package.

Most layers have gated linear attention (GLA), whose cache is one state [B, H, D, D] however many tokens it has seen; the
last layer of each group has multi-head latent attention (MLA), whose cache holds keys and values. After the first layers
the MLPs are mixtures of experts. Multi-token prediction (MTP) adds layers that are used in training only.

Shapes: B batch, T tokens, S tokens including those in the cache, N = B * T; C hidden, H heads, D head_dim; E experts, k
experts of a token, G groups of experts; V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .attention_ling2 import (
  Batch,
  GatedLinearAttention,
  MultiLatentAttention,
  RMSNorm,
  float32_region,
  linear,
  with_recurrent_states,
)
from .configuration_ling2 import BailingMoeV2_5Config, attention_factor, inverse_frequencies, is_mla

logger = logging.get_logger(__name__)

IGNORED_LABEL = -100
_CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the cache in outputs: newer releases of transformers 5 have renamed it."""


@dataclass
class Ling2ModelOutput(BaseModelOutputWithPast):
  """Output of the model without head; mtp_hidden_states: for each MTP layer [B, T, C]."""

  mtp_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class Ling2CausalLMOutput(CausalLMOutputWithPast):
  """Output of the language model. `loss` has mtp_loss in it, times its weight; mtp_logits: for each layer [B, T, V]."""

  mtp_loss: Tensor | None = None
  mtp_logits: tuple[Tensor, ...] | None = None


class SwiGLU(nn.Module):
  """The MLP of a dense layer, of an expert, and of the shared experts."""

  def __init__(self, hidden: int, width: int):
    super().__init__()
    self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
    self.down_proj = linear(width, hidden)

  def forward(self, x: Tensor) -> Tensor:
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
  """Chooses the experts of each token, in float32."""

  expert_bias: Tensor

  def __init__(self, config: BailingMoeV2_5Config):
    super().__init__()
    self.config = config
    self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
    self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

  def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
    """Keeps the bias in float32 through .bfloat16(), .half() and .to(dtype)."""
    before = self.expert_bias
    super()._apply(fn, recurse)
    if self.expert_bias.dtype != torch.float32:
      self.expert_bias = before.to(self.expert_bias.device, torch.float32)
    return self

  def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
    """(experts [N, k], their weights [N, k] float32) for x [N, C]."""
    c = self.config
    with float32_region(x):
      scores = torch.sigmoid(F.linear(x.float(), self.weight.float()))  # (N, E)
    chosen = self._chosen(scores.detach() + self.expert_bias)
    weights = scores.gather(1, chosen)
    if c.num_experts_per_tok > 1:
      weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * c.routed_scaling_factor

  def _chosen(self, biased: Tensor) -> Tensor:
    """The best experts [N, k] of the best groups, by biased scores [N, E]."""
    c = self.config
    grouped = biased.unflatten(1, (c.n_group, -1))  # (N, G, E / G)
    best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(c.topk_group, -1).indices
    allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
    return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1).topk(c.num_experts_per_tok, -1).indices


class MixtureOfExperts(nn.Module):
  """The weighted sum of a token's experts, and the shared experts."""

  def __init__(self, config: BailingMoeV2_5Config):
    super().__init__()
    hidden, width, shared = config.hidden_size, config.moe_intermediate_size, config.num_shared_experts
    self.gate = Router(config)
    self.experts = nn.ModuleList(SwiGLU(hidden, width) for _ in range(config.num_experts))
    self.shared_experts = SwiGLU(hidden, width * shared) if shared else None

  def forward(self, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)  # (N, C)
    chosen, weights = self.gate(flat)
    y = torch.zeros_like(flat, dtype=torch.float32)
    order = chosen.flatten().argsort(stable=True)  # places in (N, k), sorted by expert
    counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
    for expert, places in zip(self.experts, order.split(counts), strict=True):
      # In training all experts run, also without tokens: with sharded weights all processes must gather the same ones.
      if len(places) or self.training:
        tokens = places // chosen.shape[1]
        y.index_add_(0, tokens, expert(flat[tokens]).float() * weights.flatten()[places, None])
    y = y.to(x.dtype).view_as(x)
    return y if self.shared_experts is None else y + self.shared_experts(x)


class Block(GradientCheckpointingLayer):
  """Attention and MLP, each after a norm and added to its input: what both kinds of layers have."""

  def __init__(self, config: BailingMoeV2_5Config, layer: int):
    super().__init__()
    self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.attention = (MultiLatentAttention if is_mla(config, layer) else GatedLinearAttention)(config, layer)
    self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    dense = layer < config.first_k_dense_replace
    self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)

  def block(self, x: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
    """(B, T, C) -> (B, T, C)."""
    x = x + self.attention(self.input_layernorm(x), batch, cache)
    return x + self.mlp(self.post_attention_layernorm(x))


class DecoderLayer(Block):
  """A layer of the main stack."""

  def forward(self, x: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
    return self.block(x, batch, cache)


class MtpLayer(Block):
  """Multi-token prediction: a layer over the next token's embedding and what the layers before made of this one."""

  def __init__(self, config: BailingMoeV2_5Config, layer: int):
    super().__init__(config, layer)
    hidden, epsilon = config.hidden_size, config.rms_norm_eps
    self.enorm, self.hnorm = RMSNorm(hidden, epsilon), RMSNorm(hidden, epsilon)
    self.eh_proj = linear(2 * hidden, hidden)
    self.final_layernorm = RMSNorm(hidden, epsilon)

  def forward(self, x: Tensor, next_embedding: Tensor, batch: Batch) -> Tensor:
    u = self.eh_proj(torch.cat([self.enorm(next_embedding), self.hnorm(x)], -1))  # (B, T, C)
    return self.final_layernorm(self.block(u, batch, None))


class BailingMoeV2_5PreTrainedModel(PreTrainedModel):
  """What transformers asks of both models."""

  config_class = BailingMoeV2_5Config
  base_model_prefix = "model"
  supports_gradient_checkpointing = True
  _input_embed_layer = "word_embeddings"
  _no_split_modules = ["DecoderLayer", "MtpLayer"]
  _skip_keys_device_placement = ["cache", "past_key_values"]
  _supports_sdpa = True
  _is_stateful = True  # the state of linear attention cannot go back, as speculative decoding would need

  def __init__(self, config: BailingMoeV2_5Config, *args: Any, **kwargs: Any):
    if config.gla_decay_layer_offset is None:
      config.gla_decay_layer_offset = 1
      logger.warning_once("gla_decay_layer_offset is not in config.json: taking 1, as the official PyTorch code does")
    config.refuse_contradictions()
    super().__init__(config, *args, **kwargs)

  @classmethod
  def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
    # With layers on disk, transformers 4 would otherwise leave the routers' biases at zero.
    return super().from_pretrained(*args, **{"offload_buffers": True, **kwargs})

  def post_init(self) -> None:
    super().post_init()
    # Whatever dtype the model is loaded in. Not as a class attribute: transformers 4 takes no buffers there.
    self._keep_in_fp32_modules_strict = {"expert_bias"}

  def _init_weights(self, module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding, Router)):
      nn.init.normal_(module.weight, std=self.config.initializer_range)
    if isinstance(module, RMSNorm):
      nn.init.ones_(module.weight)
    if isinstance(module, Router):
      nn.init.zeros_(module.expert_bias)


class BailingMoeV2_5Model(BailingMoeV2_5PreTrainedModel):
  """The model without head. MTP's layers stand after the others in `layers`."""

  _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

  def __init__(self, config: BailingMoeV2_5Config):
    super().__init__(config)
    depth = config.num_hidden_layers
    self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
    self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(depth))
    self.layers.extend(MtpLayer(config, depth + i) for i in range(config.num_nextn_predict_layers))
    self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.inverse_frequencies, self.attention_factor = inverse_frequencies(config), attention_factor(config)
    self.gradient_checkpointing = False
    self.post_init()

  def forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    cache: Cache | None = None,
    with_mtp: bool = False,
    **kwargs: Any,
  ) -> Ling2ModelOutput | tuple[Any, ...]:
    """Runs all layers.

    Args:
      input_ids: [B, T]; or inputs_embeds [B, T, C].
      attention_mask: 0 for padding, on whichever side, [B, S]: also for the tokens in the cache.
      position_ids: [B, T]; None counts the tokens that are no padding.
      past_key_values: what an earlier call returned; `cache` is its name in newer releases of transformers 5.
      with_mtp: also returns the hidden states of MTP's layers.
    """
    c = self.config
    refuse_unsupported(kwargs)
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("pass either input_ids or inputs_embeds")
    cache = past_key_values if cache is None else cache
    use_cache = c.use_cache and not self.training if use_cache is None else use_cache
    recomputed = self.gradient_checkpointing and self.training  # would put its tokens into the cache twice
    cache = with_recurrent_states(cache, c) if (use_cache or cache is not None) and not recomputed else None
    x = embedded = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
    batch = self._batch(x, attention_mask, position_ids, cache.get_seq_length() if cache is not None else 0)
    hidden_states = [x]
    for layer in self.layers[: c.num_hidden_layers]:
      x = layer(x, batch, cache)
      hidden_states.append(x)
    x = hidden_states[-1] = self.norm(x)
    keep = c.output_hidden_states if output_hidden_states is None else output_hidden_states
    output = Ling2ModelOutput(
      last_hidden_state=x,
      hidden_states=tuple(hidden_states) if keep else None,
      mtp_hidden_states=self._mtp(x, embedded, batch) if with_mtp else None,
      **{_CACHE: cache if use_cache else None},
    )
    return output if (c.return_dict if return_dict is None else return_dict) else output.to_tuple()

  def _mtp(self, x: Tensor, embedded: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """The outputs of MTP's layers; beyond the end each row is taken to have token 0."""
    outputs = []
    beyond = self.word_embeddings(torch.zeros_like(embedded[:, :1, 0], dtype=torch.long))  # (B, 1, C)
    for layer in self.layers[self.config.num_hidden_layers :]:
      embedded = torch.cat([embedded[:, 1:], beyond], 1)
      x = layer(x, embedded, batch)
      outputs.append(x)
    return tuple(outputs)

  def _batch(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int) -> Batch:
    length, total = x.shape[1], past + x.shape[1]
    is_token = None  # of all keys, (B, S)
    if attention_mask is not None:
      if attention_mask.shape != (x.shape[0], total):
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}, not [B, S] = {[x.shape[0], total]}")
      is_token = None if attention_mask.bool().all() else attention_mask.bool()
    place = torch.arange(total, device=x.device)[None]  # (1, S)
    if position_ids is None:
      position_ids = (place if is_token is None else (is_token.cumsum(1) - 1).clamp(min=0))[:, past:]
    frequencies = torch.tensor(self.inverse_frequencies, dtype=torch.float32, device=x.device)
    angle = position_ids[..., None].float() * frequencies  # (B, T, rotated / 2)
    cos, sin = angle.cos() * self.attention_factor, angle.sin() * self.attention_factor
    if is_token is None and (past == 0 or length == 1):
      return Batch(cos, sin, None, None, past == 0)
    query, key = place[0, past:, None], place  # (T, 1), (1, S)
    mask = (key <= query)[None]  # (1, T, S)
    if is_token is not None:
      # Padding sees itself, as a softmax over nothing would be NaN.
      mask = mask & is_token[:, None] | (key == query)
      is_token = is_token[:, past:]
    return Batch(cos, sin, is_token, mask[:, None], False)


class BailingMoeV2_5ForCausalLM(BailingMoeV2_5PreTrainedModel, GenerationMixin):
  """The language model."""

  def __init__(self, config: BailingMoeV2_5Config):
    super().__init__(config)
    self.model = BailingMoeV2_5Model(config)
    self.lm_head = linear(config.hidden_size, config.vocab_size)
    self.post_init()

  def forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    cache: Cache | None = None,
    num_items_in_batch: int | Tensor | None = None,
    **kwargs: Any,
  ) -> Ling2CausalLMOutput | tuple[Any, ...]:
    """Logits [B, T, V] float32, and the loss where there are labels. See `BailingMoeV2_5Model.forward`.

    Args:
      labels: [B, T], not shifted: position t is scored against labels[t + 1]; -100 is not scored.
      logits_to_keep: without labels, how many of the last positions get logits (0: all), or which ones.
      num_items_in_batch: what the sum of losses is divided by (transformers' Trainer); None: the scored positions.
    """
    c, weight = self.config, self.config.mtp_loss_scaling_factor
    with_mtp = bool(self.training and labels is not None and weight and c.num_nextn_predict_layers)
    output = self.model(
      input_ids=input_ids,
      attention_mask=attention_mask,
      position_ids=position_ids,
      past_key_values=past_key_values,
      inputs_embeds=inputs_embeds,
      use_cache=use_cache,
      output_hidden_states=output_hidden_states,
      return_dict=True,
      cache=cache,
      with_mtp=with_mtp,
      **kwargs,
    )
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    hidden = output.last_hidden_state if labels is not None else output.last_hidden_state[:, kept]
    logits = self.lm_head(hidden).float()
    loss = mtp_loss = mtp_logits = None
    if labels is not None:
      loss = token_loss(logits, labels, 1, num_items_in_batch)
    if with_mtp:
      mtp_logits = tuple(self.lm_head(x).float() for x in output.mtp_hidden_states)
      losses = [token_loss(x, labels, ahead, num_items_in_batch) for ahead, x in enumerate(mtp_logits, 2)]
      mtp_loss = torch.stack(losses).mean()
      loss = loss + weight * mtp_loss
    result = Ling2CausalLMOutput(
      loss=loss,
      logits=logits,
      hidden_states=output.hidden_states,
      mtp_loss=mtp_loss,
      mtp_logits=mtp_logits,
      **{_CACHE: output.get(_CACHE)},
    )
    return result if (c.return_dict if return_dict is None else return_dict) else result.to_tuple()


def refuse_unsupported(arguments: dict[str, Any]) -> None:
  """Raises ValueError for what would otherwise be ignored, or computed as something else."""
  if arguments.get("output_attentions"):
    raise ValueError("output_attentions: linear attention has no attention weights")
  if any(arguments.get(key) is not None for key in ("cu_seq_lens_q", "cu_seq_lens_k")):
    raise ValueError("several documents in one row: the state would flow from one to the next; pad them instead")


def token_loss(logits: Tensor, labels: Tensor, ahead: int, count: int | Tensor | None) -> Tensor:
  """Mean cross entropy of logits [B, T, V] at t against labels [B, T] at t + ahead, or their sum over `count`."""
  targets = labels[:, ahead:].to(logits.device)
  flat = logits[:, :-ahead].flatten(0, 1)  # (B (T - ahead), V)
  total = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
  return total / ((targets != IGNORED_LABEL).sum().clamp(min=1) if count is None else count)


BailingMoeV2_5Model.register_for_auto_class("AutoModel")
BailingMoeV2_5ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
