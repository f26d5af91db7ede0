# SPDX-License-Identifier: Apache-2.0
# Part of maxtext-ling2.
"""The two attentions of LING2 and their caches: gated linear attention (GLA) and multi-head latent attention (MLA).

Shapes: B batch, T tokens, S tokens including those in the cache, C hidden, H heads, D head_dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .configuration_ling2 import BailingMoeV2_5Config, is_mla, log_decays, softmax_scale

CHUNK_SIZE = 64
"""Tokens of linear attention that are computed as one matrix product."""
LATENT_EPSILON = 1e-6
"""Of the norms of MLA's latents, whatever rms_norm_eps is."""


class Batch(NamedTuple):
  """What all layers need to know of the tokens.

  Attributes:
    cos: of the rotary embedding, times YaRN's attention factor, [B or 1, T, rotated / 2] float32.
    sin: see cos.
    is_token: False for padding, [B, T] bool; None without padding.
    mask: which keys each query sees, [B or 1, 1, T, S] bool; None where `is_causal` says it all.
    is_causal: each query sees the keys up to its own, and there are as many keys as queries.
  """

  cos: Tensor
  sin: Tensor
  is_token: Tensor | None
  mask: Tensor | None
  is_causal: bool


class RecurrentStateLayer(CacheLayerMixin):
  """The cache of one GLA layer: its state [B, H, D, D] float32, and how many tokens it has seen."""

  is_sliding = False
  supports_early_init = False

  def __init__(self) -> None:
    super().__init__()
    self.state: Tensor | None = None
    self.seen = 0

  def update(self, state: Tensor, length: int, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces the state by the one `length` tokens later."""
    self.state, self.seen, self.is_initialized = state, self.seen + length, True
    return state

  def _change(self, function: Callable[[Tensor], Tensor]) -> None:
    self.state = None if self.state is None else function(self.state)

  def reorder_cache(self, beam_idx: Tensor) -> None:
    self._change(lambda state: state.index_select(0, beam_idx.to(state.device)))

  def batch_repeat_interleave(self, repeats: int) -> None:
    """Repeats each row."""
    self._change(lambda state: state.repeat_interleave(repeats, dim=0))

  def batch_select_indices(self, indices: Tensor) -> None:
    """Keeps these rows."""
    self._change(lambda state: state[indices])

  def reset(self) -> None:
    self.state, self.seen, self.is_initialized = None, 0, False

  def crop(self, *args: Any) -> None:
    """Refuses: what a state has seen cannot be taken out of it again."""
    raise ValueError("linear attention cannot drop tokens from its cache; start from an empty cache instead")

  def get_seq_length(self) -> int:
    return self.seen

  def get_mask_sizes(self, queries: int | Tensor) -> tuple[int, int]:
    return self.seen + (len(queries) if isinstance(queries, Tensor) else queries), 0

  def get_max_length(self) -> int:
    """No limit, in the words of transformers 5."""
    return -1

  get_max_cache_shape = get_max_length  # transformers 4

  def lazy_initialization(self, *args: Any) -> None:
    """There is nothing to reserve."""

  def offload(self) -> None:
    """The state stays where it is: it is small."""

  prefetch = offload


def with_recurrent_states(cache: Cache | None, config: BailingMoeV2_5Config) -> Cache:
  """The cache, after putting a state in place of the keys and values of each GLA layer; a new one for None.

  Raises:
    ValueError: the cache is of fixed length, or holds keys and values of another model.
  """
  cache = DynamicCache() if cache is None else cache
  for i in range(config.num_hidden_layers):
    if i == len(cache.layers):
      cache.layers.append(DynamicLayer())
    layer = cache.layers[i]
    if not is_mla(config, i) and not isinstance(layer, RecurrentStateLayer) and not layer.get_seq_length():
      layer = cache.layers[i] = RecurrentStateLayer()
    if not isinstance(layer, DynamicLayer if is_mla(config, i) else RecurrentStateLayer):
      raise ValueError(f"layer {i} of the cache is a {type(layer).__name__}; pass a new DynamicCache(), or no cache")
  lengths = {layer.get_seq_length() for layer in cache.layers[: config.num_hidden_layers]}
  if len(lengths) > 1:  # as after reset() of transformers 4, which keeps keys of zero
    raise ValueError(f"layers of the cache hold {sorted(lengths)} tokens; pass a new DynamicCache(), or no cache")
  return cache


def float32_region(x: Tensor) -> torch.autocast:
  """Turns off autocast, which would take the products of float32 tensors in bfloat16."""
  return torch.autocast(x.device.type, enabled=False)


def rotate(x: Tensor, batch: Batch) -> Tensor:
  """Rotates pairs (j, j + d / 2) of x [B, T, H, d] by the token's position; float32."""
  first, second = x.float().chunk(2, -1)
  cos, sin = batch.cos[:, :, None], batch.sin[:, :, None]  # (B, T, 1, d / 2)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def deinterleaved(x: Tensor) -> Tensor:
  """The last axis with its even places first, then the odd ones: checkpoints store MLA's rotated pairs side by side."""
  return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def gated_linear_attention(
  q: Tensor, k: Tensor, v: Tensor, g_gamma: Tensor, is_token: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
  """S_t = exp(g_gamma) S_{t-1} + k_t v_t^T and o_t = D^-0.5 q_t S_t, a chunk of tokens at a time. All is float32.

  Padding neither enters the state nor lets it decay.

  Args:
    q: [B, T, H, D]; k, v: the same.
    g_gamma: the log of each head's decay, [H].
    is_token: False for padding, [B, T]; None without padding.
    state: S before the first token, [B, H, D, D]; None for zero.

  Returns:
    (o [B, T, H, D], S after the last token [B, H, D, D])
  """
  if is_token is None:
    is_token = torch.ones(1, q.shape[1], dtype=torch.bool, device=q.device)
  q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k * is_token[..., None, None], v))  # (B, H, T, D)
  state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state  # (B, H, D, D)
  outputs = []
  chunks = (*(x.split(CHUNK_SIZE, 2) for x in (q, k, v)), is_token.split(CHUNK_SIZE, 1))
  for q_c, k_c, v_c, is_token_c in zip(*chunks, strict=True):
    position = is_token_c.cumsum(1)  # (B, c), from 1
    log_decay = g_gamma[:, None] * position[:, None]  # since the chunk began, (B, H, c)
    between = (log_decay[..., :, None] - log_decay[..., None, :]).clamp(max=0)  # (B, H, c, c)
    scores = q_c @ k_c.transpose(2, 3) * between.exp().tril()
    outputs.append(scores @ v_c + q_c @ state * log_decay.exp()[..., None])  # (B, H, c, D)
    until_end = (log_decay[..., -1:] - log_decay).exp()[..., None]  # (B, H, c, 1)
    state = state * log_decay[..., -1, None, None].exp() + (k_c * until_end).transpose(2, 3) @ v_c
  return torch.cat(outputs, 2).transpose(1, 2), state  # (B, T, H, D)


class RMSNorm(nn.Module):
  """x over the root mean square of its last axis, or of each of `groups` equal parts of it, times a scale."""

  def __init__(self, dims: int, epsilon: float, groups: int = 1):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(dims))
    self.epsilon, self.groups = epsilon, groups

  def forward(self, x: Tensor) -> Tensor:
    grouped = x.float().unflatten(-1, (self.groups, -1))
    normalised = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.epsilon)
    return self.weight * normalised.flatten(-2).to(x.dtype)


def linear(inputs: int, outputs: int) -> nn.Linear:
  """No layer of this model has a bias."""
  return nn.Linear(inputs, outputs, bias=False)


class GatedLinearAttention(nn.Module):
  """Linear attention with a constant decay per head, then a norm and an output gate."""

  def __init__(self, config: BailingMoeV2_5Config, layer: int):
    super().__init__()
    self.config, self.layer = config, layer
    heads, dim, epsilon = config.num_attention_heads, config.head_dim, config.rms_norm_eps
    # Numbers, not a buffer: buffers that are in no checkpoint do not survive loading in every release of transformers.
    self.g_gamma = log_decays(config, layer)
    self.query_key_value = linear(config.hidden_size, 3 * heads * dim)
    if config.use_qk_norm:
      self.query_layernorm = RMSNorm(dim, epsilon)
      self.key_layernorm = RMSNorm(dim, epsilon)
    self.g_proj = linear(config.hidden_size, heads * dim)
    self.g_norm = RMSNorm(heads * dim, epsilon, config.group_norm_size)
    self.dense = linear(heads * dim, config.hidden_size)

  def forward(self, x: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
    c = self.config
    qkv = self.query_key_value(x)
    qkv = F.silu(qkv) if c.linear_silu else qkv
    q, k, v = qkv.unflatten(-1, (3, c.num_attention_heads, c.head_dim)).unbind(2)  # (B, T, H, D)
    if c.use_qk_norm:
      q, k = self.query_layernorm(q), self.key_layernorm(k)
    rotated = c.qk_rope_head_dim
    q, k = (torch.cat([rotate(t[..., :rotated], batch), t[..., rotated:].float()], -1) for t in (q, k))
    g_gamma = torch.tensor(self.g_gamma, dtype=torch.float32, device=x.device)
    state = cache.layers[self.layer].state if cache is not None else None
    with float32_region(x):
      o, state = gated_linear_attention(q, k, v.float(), g_gamma, batch.is_token, state)
    if cache is not None:
      cache.layers[self.layer].update(state, x.shape[1])
    return self.dense(self.g_norm(o.flatten(2).to(x.dtype)) * torch.sigmoid(self.g_proj(x)))


class MultiLatentAttention(nn.Module):
  """Causal softmax attention whose queries, keys and values come from low-rank latents."""

  def __init__(self, config: BailingMoeV2_5Config, layer: int):
    super().__init__()
    self.config, self.layer, self.scale = config, layer, softmax_scale(config)
    heads, nope, rotated = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    if config.q_lora_rank:
      self.q_a_proj = linear(config.hidden_size, config.q_lora_rank)
      self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPSILON)
      self.q_b_proj = linear(config.q_lora_rank, heads * (nope + rotated))
    else:
      self.q_proj = linear(config.hidden_size, heads * (nope + rotated))
    self.kv_a_proj_with_mqa = linear(config.hidden_size, config.kv_lora_rank + rotated)
    self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_EPSILON)
    self.kv_b_proj = linear(config.kv_lora_rank, heads * (nope + config.v_head_dim))
    self.dense = linear(heads * config.v_head_dim, config.hidden_size)

  def forward(self, x: Tensor, batch: Batch, cache: Cache | None) -> Tensor:
    c = self.config
    heads, nope, rotated = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
    q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if c.q_lora_rank else self.q_proj(x)
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).split([nope, rotated], -1)  # (B, T, H, .)
    latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, rotated], -1)  # (B, T, .)
    kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
    k_nope, v = kv.split([nope, c.v_head_dim], -1)  # (B, T, H, .)
    q_rope, k_rope = (rotate(deinterleaved(t), batch).to(v.dtype) for t in (q_rope, k_rope[:, :, None]))
    q = torch.cat([q_nope, q_rope], -1).transpose(1, 2)  # (B, H, T, nope + rope)
    k = torch.cat([k_nope, k_rope.expand(-1, -1, heads, -1)], -1).transpose(1, 2)
    v = v.transpose(1, 2)  # (B, H, T, v)
    if cache is not None:
      k, v = cache.update(k, v, self.layer)  # (B, H, S, .)
    # PyTorch's kernels that never hold all T * S weights want values as wide as keys.
    v = F.pad(v, (0, max(0, q.shape[-1] - c.v_head_dim)))
    dropout = c.attention_dropout if self.training else 0.0
    o = F.scaled_dot_product_attention(q, k, v, batch.mask, dropout, batch.is_causal, scale=self.scale)
    return self.dense(o[..., : c.v_head_dim].transpose(1, 2).flatten(2))
