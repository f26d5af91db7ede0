"""Multi-head latent attention: MaxText's own, with LING2's rotary layout and latent norms."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.common.common_types import MODEL_MODE_TRAIN, AttentionType
from maxtext.layers import attention_mla, quantizations

from maxtext_ling2.model import yarn
from maxtext_ling2.model.rope import rotary_embedding

LATENT_EPSILON = 1e-6
"""Epsilon of the norms of the q and kv latents, whatever the model's: the class default in Hugging Face's code."""

LARGEST_LOGIT = "largest_logit"
"""Attribute for the largest logit of each head, [H] float32; `training/qk_clip.py` attaches the variable."""


class MultiHeadLatentAttention(attention_mla.MLA):
  """MaxText's MLA for LING2: no qk-norm, no gate, RoPE on all of qk_rope_head_dim.

  `mla_interleaved_rope` says how the checkpoint stores rotary pairs. Called like MaxText's MLA.
  """

  largest_logit: nnx.Variable[jax.Array]

  def __init__(self, config: Any, mesh: Any, model_mode: str, quant: Any, inputs_shape: tuple[int, ...], rngs: nnx.Rngs):
    if model_mode != MODEL_MODE_TRAIN:
      _check_room_to_decode(config)
    mscale = yarn.softmax_mscale(config)
    super().__init__(
      config=config,
      num_query_heads=config.num_query_heads,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      max_target_length=config.max_target_length,
      max_prefill_predict_length=config.max_prefill_predict_length,
      attention_kernel=config.attention,
      attention_type=AttentionType(config.attention_type),
      inputs_q_shape=inputs_shape,
      inputs_kv_shape=inputs_shape,
      mesh=mesh,
      dtype=config.dtype,
      weight_dtype=config.weight_dtype,
      dropout_rate=config.dropout_rate,
      float32_qk_product=config.float32_qk_product,
      float32_logits=config.float32_logits,
      quant=quant,
      kv_quant=quantizations.configure_kv_quant(config),
      q_lora_rank=config.q_lora_rank,
      kv_lora_rank=config.kv_lora_rank,
      qk_nope_head_dim=config.qk_nope_head_dim,
      qk_rope_head_dim=config.qk_rope_head_dim,
      v_head_dim=config.v_head_dim,
      # MaxText scales the softmax if the first of these exceeds the second, and uses them for nothing else.
      max_position_embeddings=0 if mscale is None else 1,
      original_max_position_embeddings=0,
      mscale=mscale,
      rope_factor=config.rope_factor,
      attn_logits_soft_cap=config.attn_logits_soft_cap,
      model_mode=model_mode,
      rngs=rngs,
    )
    self.kv_norm.epsilon = LATENT_EPSILON
    if self.q_lora_rank:
      self.q_norm.epsilon = LATENT_EPSILON

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls MaxText's; in a step with QK-clip it also updates the largest logit of each head."""
    result = super().__call__(*args, **kwargs)
    if hasattr(self, LARGEST_LOGIT):
      logits = jax.lax.stop_gradient(self.attention_op.max_logits.get_value())  # [B, H]
      self.largest_logit[...] = jnp.maximum(self.largest_logit[...], jnp.max(logits, axis=0))  # [H]
    return result

  def init_rotary_embedding(self) -> nnx.Module:
    """The rotary embedding of the rotary dimensions of q and k, [B, T, H, qk_rope_head_dim]."""
    return rotary_embedding(
      self.config, self.mesh, self.qk_rope_head_dim, interleaved=self.config.mla_interleaved_rope, rngs=self.rngs
    )


def _check_room_to_decode(config: Any) -> None:
  """Raises ValueError if a decode cache has no room after the prompt, as with ling2.yml, which is for training."""
  prompt, total = config.max_prefill_predict_length, config.max_target_length
  if prompt >= total:
    raise ValueError(
      f"max_prefill_predict_length={prompt}: this command builds a decode cache, whose prompt must be shorter than "
      f"max_target_length={total}; pass max_prefill_predict_length={max(1, total // 2)} override_model_config=true"
    )
