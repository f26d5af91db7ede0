"""Mixture of experts with DeepSeek-V3 routing: MaxText's RoutedMoE behind a config view, with LING2's own router.

The router computes in float32 at the highest precision whatever the model's dtype is, and adds its bias in float32: one
expert chosen differently is a different model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.common.common_types import get_weight_dtype
from maxtext.layers import linears, moe
from maxtext.layers.initializers import nd_dense_init
from maxtext.utils import maxtext_utils

from maxtext_ling2.host.moe_view import DeepSeekRoutingView
from maxtext_ling2.host.weight_variables import MARK
from maxtext_ling2.model.precision import matmul_precision

Z_LOSS_NAME = "moe_z_loss"
"""Under this name a router sows its raw z-loss."""


class Router(nnx.Module):
  """Scores of all experts for each token: x [B, T, C] -> (biased [B, T, E], unbiased [B, T, E]), float32.

  The bias only selects experts; the weights come from the unbiased scores. During a training step the router also has
  the sums that `training/statistics.py` attaches: `expert_counts` and, with a z-loss, `z_loss`.
  """

  expert_counts: nnx.Variable[jax.Array]
  z_loss: nnx.Variable[jax.Array]

  def __init__(self, config: Any, rngs: nnx.Rngs):
    self.has_z_loss = config.moe_z_loss_weight > 0.0
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
    logits = self.logits(x)
    if self.has_z_loss:
      self._keep_z_loss(logits)
    scores = jax.nn.sigmoid(logits)
    if self.bias is None:
      return scores, scores
    return scores + self.bias[...].astype(jnp.float32), scores

  def _keep_z_loss(self, logits: jax.Array) -> None:
    """mean(logsumexp(logits)^2) over all positions (ST-MoE, Zoph et al. 2022), sown for the objective."""
    z_loss = jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
    self.sow(nnx.Intermediate, Z_LOSS_NAME, z_loss)
    if self.counting:
      self.z_loss[...] += jax.lax.stop_gradient(z_loss)

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

  Called as MaxText's; returns (output [B, T, C], load balance loss or None, expert counts [E] int32 in a training step).
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
    self, x: jax.Array, deterministic: bool, intermediate_sharding: Any = None, out_sharding: Any = None
  ) -> tuple[jax.Array, jax.Array | None]:
    """Applies the experts; the shared ones are neither scaled nor gated."""
    with matmul_precision(self.config):
      y, load_balance_loss, counts = self.MoeBlock_0(x, out_sharding=out_sharding)
    if counts is not None:
      self.MoeBlock_0.gate.count(counts)
    if self.shared_experts is not None:
      y = y + self.shared_experts(
        x, deterministic=deterministic, intermediate_sharding=intermediate_sharding, out_sharding=out_sharding
      )
    return y, load_balance_loss
