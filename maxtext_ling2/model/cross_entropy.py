"""The cross entropy of the main loss and of MTP, in a form that XLA fuses with the product of the logits' gradient."""

import jax
import jax.numpy as jnp


def cross_entropy_with_logits(logits: jax.Array, targets: jax.Array, z_loss: float = 0.0) -> tuple[jax.Array, jax.Array]:
  """MaxText's `max_utils.cross_entropy_with_logits`: the same numbers from fewer bytes.

  The loss is log Z * sum(targets) - sum(targets * logits), differentiated by JAX. Both terms need the logits only as the
  matmul wrote them, and the gradient, targets aside, is exp(logits - log Z), which XLA computes within the matmuls that
  read it. MaxText's function keeps exp(logits - max) for its own gradient, and MTP's gathers the target's logit: XLA
  writes an array [..., V] more, in float32 or bfloat16. Figures: docs/kernels.md, "The loss".

  Args:
    logits: [..., V] float.
    targets: [..., V] float, one-hot or zeros.
    z_loss: weight of (log Z)^2, which is added.

  Returns:
    (loss with the z-loss, the z-loss alone), [...] each.
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)  # [...]
  total_z_loss = z_loss * jnp.square(log_z)
  loss = log_z * jnp.sum(targets, axis=-1) - jnp.sum(targets * logits, axis=-1)
  return loss + total_z_loss, total_z_loss
