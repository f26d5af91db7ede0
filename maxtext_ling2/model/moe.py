"""Mixture of experts with DeepSeek-V3 routing: MaxText's RoutedMoE behind a config view, with LING2's own router.

The router computes in float32 at the highest precision whatever the model's dtype is, and adds its bias in float32: one
expert chosen differently is a different model.

Padding (segment 0) goes through the experts like any token, as MaxText's layer knows no segments, but takes no part in
what is counted or averaged over tokens: expert counts, z-loss and load-balance loss (Megatron-LM does the same).
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

from maxtext_ling2.host.seams.weight_variables import MARK
from maxtext_ling2.model.moe_view import DeepSeekRoutingView
from maxtext_ling2.model.precision import matmul_precision

Z_LOSS_NAME = "moe_z_loss"
"""Under this name a router sows its raw z-loss."""


@dataclasses.dataclass
class Routing:
  """One call of the routed experts, between `Ling2MoE`, which knows the segments, and the router, which MaxText calls.

  Attributes:
    real: [B, T] bool, False where there is padding; None: there is none.
    scores: (biased, unbiased) scores [B, T, E] of the router, once it has been called.
  """

  real: jax.Array | None
  scores: tuple[jax.Array, jax.Array] | None = None


_ROUTING: contextvars.ContextVar[Routing | None] = contextvars.ContextVar("routing", default=None)


@contextlib.contextmanager
def _routing(real: jax.Array | None) -> Iterator[Routing]:
  routing = Routing(real)
  token = _ROUTING.set(routing)
  try:
    yield routing
  finally:
    _ROUTING.reset(token)


def mean_over_tokens(x: jax.Array, real: jax.Array | None, axis: int | None = None) -> jax.Array:
  """Mean of x [B, T, ...] over the real tokens of all rows, or of each row with axis=1; 0 where there is none.

  Args:
    x: one value or vector per token.
    real: [B, T] bool, or None: all are.
    axis: None (x is [B, T]) or 1.
  """
  if real is None:
    return jnp.mean(x, axis=axis)
  mask = real.reshape(*real.shape, *(1,) * (x.ndim - 2))
  number = jnp.sum(mask, axis=axis, dtype=x.dtype)
  return jnp.sum(jnp.where(mask, x, 0), axis=axis) / jnp.maximum(number, 1)


def weighs_microbatches(config: Any) -> bool:
  """Whether the z-loss of a batch is the mean over its tokens, not the mean of its microbatches' means."""
  return bool(config.gradient_accumulation_steps > 1 and config.calculate_per_token_loss)


class Router(nnx.Module):
  """Scores of all experts for each token: x [B, T, C] -> (biased [B, T, E], unbiased [B, T, E]), float32.

  The bias only selects experts; the weights come from the unbiased scores. During a training step the router also has
  the sums that `training/statistics.py` attaches: `expert_counts`; with a z-loss, `z_loss`: of the microbatches' means
  or, where these are weighed, of their sums over tokens; with record_internal_nn_metrics, `score_sums`, over tokens.
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
    """A parameter with gradient and optimizer state, or a variable that only loss-free balancing moves."""
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
      logits = self.logits(x)
      if self.has_z_loss:
        self._keep_z_loss(logits, routing.real if routing else None)
      scores = jax.nn.sigmoid(logits)
      biased = scores if self.bias is None else scores + self.bias[...].astype(jnp.float32)
    if routing:
      routing.scores = biased, scores
    return biased, scores

  def _keep_z_loss(self, logits: jax.Array, real: jax.Array | None) -> None:
    """mean(logsumexp(logits)^2) over all tokens (ST-MoE, Zoph et al. 2022), sown for the objective."""
    z_loss = mean_over_tokens(jnp.square(jax.nn.logsumexp(logits, axis=-1)), real)
    self.sow(nnx.Intermediate, Z_LOSS_NAME, z_loss)
    if self.counting:
      tokens = (logits[..., 0].size if real is None else jnp.sum(real)) if self.weighs_microbatches else 1
      self.z_loss[...] += jax.lax.stop_gradient(z_loss) * tokens

  @property
  def counting(self) -> bool:
    """Whether a training step is listening."""
    return hasattr(self, "expert_counts")

  def count(self, counts: jax.Array) -> None:
    """Adds the tokens that this batch sent to each expert: [E], or [..., E] of parts of the batch.

    With defer_small_all_reduces MaxText's ring of experts returns parts: [devices, token chunks, E].
    """
    self.expert_counts[...] += jnp.sum(counts.reshape(-1, counts.shape[-1]), axis=0)


class RoutedMoE(moe.RoutedMoE):  # MaxText finds MoE modules by this class name
  """MaxText's RoutedMoE, routing as DeepSeek-V3 with LING2's router.

  Called as MaxText's; returns (output [B, T, C], 0 or None, expert counts [E] int32 of all positions in a training step).
  `padding_counts` and `balance_loss` tell the rest, from the scores of such a call.
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

  def should_update_load_balance(self) -> bool:
    """Whether MaxText counts the tokens of each expert and returns the counts."""
    return self.gate.counting

  def apply_ffn_activation(self, layer_w0: jax.Array, layer_w1: jax.Array) -> jax.Array:
    """silu(gate) * up of the routed experts, in `dtype`: with activations_in_float32 rounded once, as in dense MLPs.

    With sparse_matmul=true MaxText's own layer leaves that setting out.
    """
    if self.config.activations_in_float32:
      layer_w0, layer_w1 = layer_w0.astype(jnp.float32), layer_w1.astype(jnp.float32)
    return super().apply_ffn_activation(layer_w0, layer_w1)

  def load_balance_loss(self, top_k_indices: jax.Array, logits: jax.Array, density_prob: Any = None) -> jax.Array:
    """0: MaxText computes it from the positions of one device or token chunk, padding among them. See `balance_loss`."""
    del top_k_indices, logits, density_prob
    return jnp.zeros((), jnp.float32)

  def balance_loss(self, routing: Routing) -> jax.Array:
    """MaxText's loss of uneven loads over real tokens: weight * E^2 * mean over rows and experts of f * P, [] float32.

    f [B, E] is the share of a row's choices that went to an expert, P [B, E] the row's mean softmax of unbiased scores;
    with moe_use_megatron_seq_aux_loss choices are the top k of the unbiased scores, without groups, and P the mean of
    normalised scores. A row of nothing but padding counts as 0.
    """
    assert routing.scores is not None
    biased, scores = routing.scores
    if moe.uses_megatron_seq_aux_loss(self.config):
      probabilities, chosen = moe.megatron_aux_loss_inputs(scores, self.num_experts_per_tok)
    else:
      probabilities, chosen = jax.nn.softmax(scores, axis=-1), self.get_topk(biased, scores)[1]
    choices = jnp.sum(jax.nn.one_hot(chosen, self.num_experts, dtype=jnp.float32), axis=2)  # [B, T, E]
    share = mean_over_tokens(choices, routing.real, axis=1) / self.num_experts_per_tok
    mean = mean_over_tokens(probabilities, routing.real, axis=1)
    return jnp.mean(share * mean) * self.num_experts**2 * self.config.load_balance_loss_weight

  def padding_counts(self, routing: Routing) -> jax.Array:
    """How many positions of padding were sent to each expert, [E] int32.

    Experts are chosen once more for it, but only in a batch that has padding.
    """
    real, scores = routing.real, routing.scores
    none = jnp.zeros(self.num_experts, jnp.int32)
    if real is None or scores is None or self.config.use_random_routing:  # random choices cannot be had again
      return none

    def count(_: Any) -> jax.Array:
      chosen = self.get_topk(*scores)[1]
      return moe.calculate_expert_counts(jnp.where(real[..., None], -1, chosen), self.num_experts)

    return jax.lax.cond(jnp.all(real), lambda _: none, count, None)

  def score_sums(self, routing: Routing) -> jax.Array:
    """Sums over real tokens of two numbers each: the mean score of its chosen experts, and the standard deviation of its
    scores over all experts; [2] float32.

    Of unbiased scores, before they are normalised and scaled to weights; experts are chosen once more for it.
    """
    assert routing.scores is not None
    biased, scores = map(jax.lax.stop_gradient, routing.scores)
    chosen, _ = self.deepseek_routing(biased, scores)
    of_tokens = jnp.stack([jnp.mean(chosen, axis=-1), jnp.std(scores, axis=-1)])  # [2, B, T]
    if routing.real is not None:
      of_tokens = jnp.where(routing.real, of_tokens, 0.0)
    return jnp.sum(of_tokens, axis=(1, 2))

  def deepseek_scale_weights(self, weights: jax.Array) -> jax.Array:
    """Normalises the chosen scores to sum 1 and scales them; a single expert keeps its raw score (Hugging Face code)."""
    if self.num_experts_per_tok == 1:
      return weights * self.config.routed_scaling_factor
    return super().deepseek_scale_weights(weights)

  def reshape_and_update_weights(self, weights: jax.Array, indices: jax.Array, safe_updates: bool = False) -> jax.Array:
    """Weights [B, T, k] of experts `indices` as [B, T, E] in their own float32 (MaxText's rounds them to `dtype`)."""
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
    """Applies the experts; the shared ones are neither scaled nor gated. `segment_ids` [B, T] are 0 at padding."""
    routed, router = self.MoeBlock_0, self.MoeBlock_0.gate
    real = None if segment_ids is None else segment_ids != 0
    with matmul_precision(self.config), jax.named_scope("experts"), _routing(real) as routing:
      y, load_balance_loss, counts = routed(x, out_sharding=out_sharding)
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
