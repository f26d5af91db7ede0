"""Mixture of experts with DeepSeek-V3's routing: MaxText's RoutedMoE with a view of the config and LING2's own router.

The router computes in float32 at the highest precision, whatever the model's dtype, and adds its bias in float32: a token
sent to another expert is another model.

Padding (segment 0) passes through the experts like any token, since MaxText's layer knows no segments. It is left out of
what is counted or averaged over tokens: expert counts, z-loss and load-balance loss, as in Megatron-LM.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.common.common_types import get_weight_dtype
from maxtext.layers import linears, moe
from maxtext.layers.initializers import nd_dense_init
from maxtext.utils import maxtext_utils

from maxtext_ling2.configs import experts as experts_config
from maxtext_ling2.host.seams.weight_variables import MARK
from maxtext_ling2.model import fused_experts
from maxtext_ling2.model.moe_view import DeepSeekRoutingView, placement
from maxtext_ling2.model.precision import matmul_precision

Z_LOSS_NAME = "moe_z_loss"
"""The name under which a router sows its z-loss, before its weight."""


@dataclasses.dataclass
class Routing:
  """State shared by `Ling2MoE`, which knows the segments, and the router, which MaxText calls, during one call.

  Attributes:
    valid: [B, T] bool, False at padding; None: there is no padding.
    scores: (biased, unbiased) scores [B, T, E] of the router, set by its call.
  """

  valid: jax.Array | None
  scores: tuple[jax.Array, jax.Array] | None = None


_ROUTING: contextvars.ContextVar[Routing | None] = contextvars.ContextVar("routing", default=None)


@contextlib.contextmanager
def _routing(valid: jax.Array | None) -> Iterator[Routing]:
  routing = Routing(valid)
  token = _ROUTING.set(routing)
  try:
    yield routing
  finally:
    _ROUTING.reset(token)


def mean_over_tokens(x: jax.Array, valid: jax.Array | None, axis: int | None = None) -> jax.Array:
  """Mean of x [B, T, ...] over the valid tokens of the batch, or of each sequence with axis=1; 0 without valid tokens.

  Args:
    x: one value or vector per token.
    valid: [B, T] bool, or None: all are valid.
    axis: None (x is [B, T]; returns []) or 1 (returns [B, ...]).
  """
  if valid is None:
    return jnp.mean(x, axis=axis)
  mask = valid.reshape(*valid.shape, *(1,) * (x.ndim - 2))  # [B, T, 1, ...]
  number = jnp.sum(mask, axis=axis, dtype=x.dtype)
  return jnp.sum(jnp.where(mask, x, 0), axis=axis) / jnp.maximum(number, 1)


def weighs_microbatches(config: Any) -> bool:
  """True if the z-loss is the mean over all tokens of the global batch, not the mean of its microbatches' means."""
  return bool(config.gradient_accumulation_steps > 1 and config.calculate_per_token_loss)


class Router(nnx.Module):
  """Scores of all experts for each token: x [B, T, C] -> (biased [B, T, E], unbiased [B, T, E]), float32.

  The bias only selects experts; their weights come from the unbiased scores. In a training step the router also has the
  sums over microbatches that `training/statistics.py` attaches: `expert_counts`; with a z-loss, `z_loss`, the sum of the
  microbatches' means or, with `weighs_microbatches`, of their sums over tokens; with record_internal_nn_metrics,
  `score_sums` over tokens.
  """

  expert_counts: nnx.Variable[jax.Array]
  z_loss: nnx.Variable[jax.Array]
  score_sums: nnx.Variable[jax.Array]

  def __init__(self, config: Any, rngs: nnx.Rngs):
    self.has_z_loss = config.moe_z_loss_weight > 0.0
    self.weighs_microbatches = weighs_microbatches(config)
    init = nd_dense_init(config.dense_init_scale, "fan_in", "truncated_normal")
    shape = (config.emb_dim, config.num_experts)
    kernel = init(rngs.params(), shape, get_weight_dtype(config, "gate"), 0, 1)
    self.kernel = nnx.Param(kernel, out_sharding=("embed_router", None))
    self.bias = self._bias(config) if config.routed_bias else None

  def _bias(self, config: Any) -> nnx.Variable[jax.Array]:
    """[E]: a parameter with gradient and optimizer state, or a variable that only loss-free balancing changes."""
    bias = jnp.zeros((config.num_experts,), config.routed_bias_dtype or config.weight_dtype)
    variable = nnx.Param if config.enable_routed_bias_grad else moe.MoEBiasVar
    return variable(bias, out_sharding=(None,), **{MARK: True})

  def logits(self, x: jax.Array) -> jax.Array:
    """Raw router logits [B, T, E], float32."""
    kernel = self.kernel[...].astype(jnp.float32)
    return jnp.einsum("btc,ce->bte", x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (scores + bias, scores)."""
    routing = _ROUTING.get()
    with jax.named_scope("router"):
      logits = self.logits(x)  # [B, T, E]
      if self.has_z_loss:
        self._sow_z_loss(logits, routing.valid if routing else None)
      scores = jax.nn.sigmoid(logits)
      biased = scores if self.bias is None else scores + self.bias[...].astype(jnp.float32)
    if routing:
      routing.scores = biased, scores
    return biased, scores

  def _sow_z_loss(self, logits: jax.Array, valid: jax.Array | None) -> None:
    """Sows mean(logsumexp(logits)^2) over valid tokens (ST-MoE, Zoph et al. 2022) for the objective."""
    z_loss = mean_over_tokens(jnp.square(jax.nn.logsumexp(logits, axis=-1)), valid)  # [B, T] -> []
    self.sow(nnx.Intermediate, Z_LOSS_NAME, z_loss)
    if self.tracks_load:
      tokens = (logits[..., 0].size if valid is None else jnp.sum(valid)) if self.weighs_microbatches else 1
      self.z_loss[...] += jax.lax.stop_gradient(z_loss) * tokens

  @property
  def tracks_load(self) -> bool:
    """True if a training step has attached counts to this router."""
    return hasattr(self, "expert_counts")

  def count(self, counts: jax.Array) -> None:
    """Adds the numbers of tokens sent to each expert: [E] of the batch, or [..., E] of parts of it.

    With defer_small_all_reduces MaxText's ring of experts returns [devices, token chunks, E].
    """
    self.expert_counts[...] += jnp.sum(counts.reshape(-1, counts.shape[-1]), axis=0)


class RoutedMoE(moe.RoutedMoE):  # MaxText finds MoE modules by this class name
  """MaxText's RoutedMoE, routing as DeepSeek-V3 with LING2's router.

  Called like MaxText's class; returns (output [B, T, C], 0 or None, expert counts or None). In a training step the counts
  [E] int32 are of all positions; `padding_counts` and `balance_loss` compute the rest from the scores of that call.
  """

  def __init__(self, config: Any, mesh: Any, quant: Any, rngs: nnx.Rngs):
    super().__init__(
      config=DeepSeekRoutingView(config, mesh),
      num_experts=config.num_experts,
      num_experts_per_tok=config.num_experts_per_tok,
      mesh=mesh,
      kernel_init=nd_dense_init(config.dense_init_scale, "fan_in", "truncated_normal"),
      kernel_axes=("embed_router", None),
      intermediate_dim=config.moe_mlp_dim,
      dtype=config.dtype,
      weight_dtype=config.weight_dtype,
      quant=quant,
      rngs=rngs,
    )
    self.gate = Router(config, rngs)
    self.only_maxtext = experts_config.only_maxtext(config)

  def sparse_matmul(
    self,
    inputs: jax.Array,
    gate_logits: jax.Array,
    pre_bias_logits: jax.Array,
    w0_kernel: Any,
    w1_kernel: Any,
    wo_kernel: Any,
    *biases: Any,
    input_ids: Any = None,
    forced_routed_experts: jax.Array | None = None,
  ) -> Any:
    """The experts of inputs [B, T, C], by `ops.experts` or by MaxText's own path (`fused_experts.why_maxtext`)."""
    matrices = fused_experts.Matrices(w0_kernel, w1_kernel, wo_kernel)
    scores = gate_logits, pre_bias_logits
    if fused_experts.computes(self, inputs, matrices, placement(self.mesh).kind):
      return fused_experts.apply(self, inputs, scores, matrices, forced_routed_experts)
    return super().sparse_matmul(
      inputs, *scores, *matrices, *biases, input_ids=input_ids, forced_routed_experts=forced_routed_experts
    )

  def should_update_load_balance(self) -> bool:
    """True if MaxText counts the tokens of each expert and returns the counts."""
    return self.gate.tracks_load

  def apply_ffn_activation(self, layer_w0: jax.Array, layer_w1: jax.Array) -> jax.Array:
    """silu(gate) * up of the routed experts, in `dtype`; with activations_in_float32 rounded once, as in dense MLPs.

    MaxText's own layer ignores that setting with sparse_matmul=true.
    """
    if self.config.activations_in_float32:
      layer_w0, layer_w1 = layer_w0.astype(jnp.float32), layer_w1.astype(jnp.float32)
    return super().apply_ffn_activation(layer_w0, layer_w1)

  def load_balance_loss(self, top_k_indices: jax.Array, logits: jax.Array, density_prob: Any = None) -> jax.Array:
    """0: MaxText averages over the positions of one device or token chunk, with padding. See `balance_loss`."""
    del top_k_indices, logits, density_prob
    return jnp.zeros((), jnp.float32)

  def balance_loss(self, routing: Routing) -> jax.Array:
    """MaxText's load-balance loss over valid tokens: weight * E^2 * mean(f * P) over sequences and experts, [] float32.

    f [B, E] is the fraction of a sequence's choices that went to an expert, P [B, E] the sequence's mean softmax of
    unbiased scores. With moe_use_megatron_seq_aux_loss choices are the top k of the unbiased scores, without groups, and
    P is the mean of normalised scores. A sequence of padding alone counts as 0.
    """
    assert routing.scores is not None
    biased, scores = routing.scores
    if moe.uses_megatron_seq_aux_loss(self.config):
      probabilities, chosen = moe.megatron_aux_loss_inputs(scores, self.num_experts_per_tok)  # [B, T, E], [B, T, k]
    else:
      probabilities, chosen = jax.nn.softmax(scores, axis=-1), self.get_topk(biased, scores)[1]
    choices = jnp.sum(jax.nn.one_hot(chosen, self.num_experts, dtype=jnp.float32), axis=2)  # [B, T, E]
    f = mean_over_tokens(choices, routing.valid, axis=1) / self.num_experts_per_tok  # [B, E]
    p = mean_over_tokens(probabilities, routing.valid, axis=1)  # [B, E]
    return jnp.mean(f * p) * self.num_experts**2 * self.config.load_balance_loss_weight

  def padding_counts(self, routing: Routing) -> jax.Array:
    """How many positions of padding were sent to each expert, [E] int32; 0 with random routing.

    Experts are chosen a second time for this, but only in a batch with padding.
    """
    valid, scores = routing.valid, routing.scores
    no_counts = jnp.zeros(self.num_experts, jnp.int32)
    if valid is None or scores is None or self.config.use_random_routing:  # random choices cannot be repeated
      return no_counts

    def count(_: Any) -> jax.Array:
      chosen = self.get_topk(*scores)[1]  # [B, T, k]
      return moe.calculate_expert_counts(jnp.where(valid[..., None], -1, chosen), self.num_experts)

    return jax.lax.cond(jnp.all(valid), lambda _: no_counts, count, None)

  def score_sums(self, routing: Routing) -> jax.Array:
    """Sums over valid tokens of the mean score of a token's experts, and of the standard deviation of its scores over all
    experts; [2] float32.

    The scores are unbiased, before they are normalised and scaled to weights. Experts are chosen a second time for this.
    """
    assert routing.scores is not None
    biased, scores = map(jax.lax.stop_gradient, routing.scores)
    chosen_scores, _ = self.deepseek_routing(biased, scores)  # [B, T, k]
    per_token = jnp.stack([jnp.mean(chosen_scores, axis=-1), jnp.std(scores, axis=-1)])  # [2, B, T]
    if routing.valid is not None:
      per_token = jnp.where(routing.valid, per_token, 0.0)
    return jnp.sum(per_token, axis=(1, 2))  # [2]

  def deepseek_scale_weights(self, weights: jax.Array) -> jax.Array:
    """Normalises the chosen scores [B, T, k] to sum 1 and scales them; k = 1 keeps raw scores, as Hugging Face does."""
    if self.num_experts_per_tok == 1:
      return weights * self.config.routed_scaling_factor
    return super().deepseek_scale_weights(weights)

  def reshape_and_update_weights(self, weights: jax.Array, indices: jax.Array, safe_updates: bool = False) -> jax.Array:
    """Weights [B, T, k] of experts `indices` [B, T, k] as [B, T, E], in float32 (MaxText rounds them to `dtype`)."""
    del safe_updates  # one_hot of an index out of range is zero
    chosen = jax.nn.one_hot(indices, self.num_experts, dtype=weights.dtype)  # [B, T, k, E]
    return jnp.einsum("btk,btke->bte", weights, chosen, precision=jax.lax.Precision.HIGHEST)


class Ling2MoE(nnx.Module):
  """Routed experts plus shared experts: x [B, T, C] -> (y [B, T, C], load balance loss or None)."""

  def __init__(self, config: Any, mesh: Any, quant: Any, rngs: nnx.Rngs):
    self.config = config
    # MaxText's checkpoint conversion recognises expert weights by "MoeBlock" in their path.
    self.MoeBlock_0 = RoutedMoE(config, mesh, quant, rngs)
    self.shared_experts = self._shared(config, mesh, quant, rngs) if config.shared_experts else None

  def _shared(self, config: Any, mesh: Any, quant: Any, rngs: nnx.Rngs) -> linears.MlpBlock:
    return linears.MlpBlock(
      mesh=mesh,
      in_features=config.emb_dim,
      intermediate_dim=config.shared_experts * maxtext_utils.get_shared_expert_mlp_dim(config),
      activations=config.mlp_activations,
      kernel_init=nd_dense_init(config.dense_init_scale, "fan_in", "truncated_normal"),
      intermediate_dropout_rate=config.dropout_rate,
      dtype=config.dtype,
      weight_dtype=config.weight_dtype,
      config=config,
      quant=quant,
      rngs=rngs,
    )

  def __call__(
    self,
    x: jax.Array,
    deterministic: bool,
    intermediate_sharding: Any = None,
    out_sharding: Any = None,
    segment_ids: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Applies the experts; shared experts are neither scaled nor gated. `segment_ids` [B, T] are 0 at padding."""
    routed, router = self.MoeBlock_0, self.MoeBlock_0.gate
    valid = None if segment_ids is None else segment_ids != 0  # [B, T]
    with matmul_precision(self.config), jax.named_scope("experts"), _routing(valid) as routing:
      y, load_balance_loss, counts = routed(x, out_sharding=out_sharding)  # [B, T, C], [] or None, [E] or None
    with jax.named_scope("router"):
      if counts is not None:
        router.count(counts)
        router.count(-routed.padding_counts(routing))
        if hasattr(router, "score_sums"):
          router.score_sums[...] += routed.score_sums(routing)
      if load_balance_loss is not None:
        load_balance_loss = routed.balance_loss(routing)
    if self.shared_experts is not None:
      with jax.named_scope("shared_experts"):
        y = y + self.shared_experts(
          x, deterministic=deterministic, intermediate_sharding=intermediate_sharding, out_sharding=out_sharding
        )
    return y, load_balance_loss
