"""Floating point operations of a LING2 training step: the one count behind TFLOP/s, MFU, and `plan`.

They are the model's operations, not the program's: the same for every chip, kernel, chunk size and remat policy.

Forward pass, per token. C hidden, V vocabulary, H heads, D head dimension; F, M, S widths of the dense MLP, of an expert,
and of all shared experts together; E experts, k experts per token, T sequence; n, r, v MLA's nope, rope and value
dimensions, q, l its query and key-value latents. A matrix [a, b] times a vector [b] is 2ab operations:

  GLA layer   weights 2 * 5 C H D (qkv, gate, output);  recurrence 4 H D^2
  MLA layer   weights 2 (C q + q H (n + r)) or 2 C H (n + r), + 2 (C (l + r) + l H (n + v) + H v C)
              attention H (n + r + v) T: the causal half of the T x T scores, and the same of scores times values
  dense MLP   6 C F;   experts  2 C E + 6 C (k M + S)
  head        2 C V;   MTP layer  4 C^2 + an MLA layer with experts + the head

GLA's recurrence has two products per token and head: the update k v^T of the state and the output q S, 2 D^2 each.
MaxText (calculate_gated_delta_net_flops_per_device) and Megatron-LM count linear attention this way. Chunkwise kernels
also compute the [chunk, chunk] scores within each chunk, 4 chunk D per token and head. The chunk size differs between
chips, so these do not count, and neither do decays, which are elementwise.

A training step counts as three forward passes; rematerialisation is not counted.
"""

import dataclasses
from typing import Any

from maxtext_ling2.model.layer_layout import is_dense, is_mla, shared_expert_width


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
  """Operations of the forward pass per token.

  Attributes:
    weights: of products with parameters.
    gla: of the recurrence of linear attention.
    mla: of causal softmax attention without its projections.
  """

  weights: float = 0.0
  gla: float = 0.0
  mla: float = 0.0

  def __add__(self, other: "ForwardFlops") -> "ForwardFlops":
    return ForwardFlops(self.weights + other.weights, self.gla + other.gla, self.mla + other.mla)


def forward_flops(config: Any) -> ForwardFlops:
  """Operations per token of a sequence of max_target_length tokens: all layers, MTP and the head."""
  c = config
  total = _head(c)
  for layer in range(c.num_decoder_layers):
    mla = is_mla(layer, c.num_decoder_layers, c.inhomogeneous_layer_cycle_interval)
    total += mla_layer(c) if mla else gla_layer(c)
    total += _dense(c) if is_dense(layer, c.first_num_dense_layers) else _experts(c)
  for _ in range(c.mtp_num_layers):
    total += ForwardFlops(weights=4 * c.emb_dim**2) + mla_layer(c) + _experts(c) + _head(c)
  return total


def training_tflops_per_device(config: Any) -> tuple[float, float, float]:
  """(total, matmuls with parameters, attention) TFLOP per optimizer step and device, as MaxText's function returns."""
  forward = forward_flops(config)
  tokens = config.per_device_batch_size * config.max_target_length * config.gradient_accumulation_steps
  scale = 3 * tokens / 1e12
  weights, attention = forward.weights * scale, (forward.gla + forward.mla) * scale
  reference_model = (weights + attention) / 3 if config.use_dpo else 0.0
  return weights + attention + reference_model, weights, attention


def gla_layer(c: Any) -> ForwardFlops:
  """Operations per token of the linear attention of one layer."""
  heads, dim = c.num_query_heads, c.head_dim
  return ForwardFlops(weights=10 * c.emb_dim * heads * dim, gla=4 * heads * dim**2)


def mla_layer(c: Any) -> ForwardFlops:
  """Operations per token of the latent attention of one layer."""
  embed, heads, rank, latent = c.emb_dim, c.num_query_heads, c.q_lora_rank, c.kv_lora_rank
  query_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
  query = embed * rank + rank * heads * query_dim if rank else embed * heads * query_dim
  key_value = embed * (latent + c.qk_rope_head_dim) + latent * heads * (c.qk_nope_head_dim + c.v_head_dim)
  output = heads * c.v_head_dim * embed
  attention = heads * (query_dim + c.v_head_dim) * c.max_target_length
  return ForwardFlops(weights=2 * (query + key_value + output), mla=attention)


def _dense(c: Any) -> ForwardFlops:
  return ForwardFlops(weights=6 * c.emb_dim * c.mlp_dim)


def _experts(c: Any) -> ForwardFlops:
  shared = c.shared_experts * shared_expert_width(c)
  width = c.num_experts_per_tok * c.moe_mlp_dim + shared
  return ForwardFlops(weights=2 * c.emb_dim * c.num_experts + 6 * c.emb_dim * width)


def _head(c: Any) -> ForwardFlops:
  return ForwardFlops(weights=2 * c.emb_dim * c.vocab_size)
