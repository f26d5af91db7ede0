"""Forms of a loss over the vocabulary that `loss_traffic.py` counts beside LING2's.

Each is `form(model, hidden, data, config) -> []`, the sum of the losses of hidden states [B, T, C] before the final norm;
`data` holds "targets" and "targets_segmentation" [B, T].
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from maxtext.layers.multi_token_prediction import _cross_entropy_with_integer_labels
from maxtext.utils import max_utils
from maxtext.utils.vocabulary_tiling import vocab_tiling_nnx_loss
from tokamax._src.ops.linear_softmax_cross_entropy_loss import pallas_mosaic_tpu_kernel as tokamax

from maxtext_ling2.model.cross_entropy import cross_entropy_with_logits

Form = Callable[[Any, jax.Array, dict[str, jax.Array], Any], jax.Array]
AXIS = "fsdp"
FORWARD, BACKWARD = (4096, 2048, 512), (2048, 2048, 512)
"""Tiles of tokamax's kernels: tokens, hidden width, vocabulary."""
KERNELS = "lce_"
"""How their names begin in a program."""


def one_hot(function: Callable[..., Any]) -> Form:
  """With a cross entropy of logits and one-hot targets, as MaxText's main loss."""

  def form(model: Any, hidden: jax.Array, data: dict[str, jax.Array], config: Any) -> jax.Array:
    losses, _ = function(_logits(model, hidden), jax.nn.one_hot(data["targets"], config.vocab_size), z_loss=0.0)
    return jnp.sum(losses * (data["targets_segmentation"] != 0))

  return form


def gathered(model: Any, hidden: jax.Array, data: dict[str, jax.Array], config: Any) -> jax.Array:
  """As MaxText's MTP: the logit of each target is gathered."""
  del config
  losses = _cross_entropy_with_integer_labels(_logits(model, hidden), data["targets"])
  return jnp.sum(losses * (data["targets_segmentation"] != 0))


def tiled(model: Any, hidden: jax.Array, data: dict[str, jax.Array], config: Any) -> jax.Array:
  """MaxText's `num_vocab_tiling`."""
  loss: jax.Array = vocab_tiling_nnx_loss(model, hidden, data, config, True)[0]
  return loss


def kernels(model: Any, hidden: jax.Array, data: dict[str, jax.Array], config: Any) -> jax.Array:
  """tokamax's kernels, called directly: its public function asks for the devices of the machine."""
  del config
  names = ("b_block_size", "h_block_size", "v_block_size")

  @jax.custom_vjp
  def loss(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    return forward(x, w, labels, weights)[0]

  def forward(x: Any, w: Any, labels: Any, weights: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    losses, lse = tokamax.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu(
      x, labels, w, reduction="none", **dict(zip(names, FORWARD, strict=True))
    )
    return jnp.sum(losses * weights), (x, w, labels, weights, lse)

  def backward(residuals: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    x, w, labels, weights, lse = residuals
    dx, dw = tokamax.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu(
      g * weights, lse, x, labels, w, reduction="none", **dict(zip(names, BACKWARD, strict=True))
    )
    return dx.astype(x.dtype), dw.astype(w.dtype), None, None

  loss.defvjp(forward, backward)
  return _by_device(loss, model, hidden, data)


def kernel_bytes(tokens: int, width: int, vocabulary: int) -> float:
  """What tokamax's kernels read and write, from their grids.

  Each block of tokens reads all weights, forward once and backward twice in bfloat16, and backward it reads and writes
  their gradient in float32.
  """
  passes, gradient_passes = (math.ceil(tokens / tiles[0]) for tiles in (FORWARD, BACKWARD))
  rows = tokens * width * (2 + 2 + 8)  # x twice, and its gradient, float32
  return float(width * vocabulary * (2 * passes + (2 * 2 + 8) * gradient_passes) + rows)


def at_once(model: Any, hidden: jax.Array, data: dict[str, jax.Array], config: Any) -> jax.Array:
  """Gradients in the forward pass, one sequence after the other: the loss is a sum, so they need nothing of the rest.

  The idea is that of Liger-Kernel's fused linear cross entropy (arXiv:2410.10989).
  """
  del config
  length = hidden.shape[1]

  def step(carry: tuple[Any, Any], sequence: tuple[Any, ...], w: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
    (total, dw), (x, labels, weights) = carry, sequence  # [T, C], [T], [T]
    logits = (x @ w).astype(jnp.float32)  # [T, V]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    hot = jax.nn.one_hot(labels, logits.shape[-1])
    total += jnp.sum((log_z - jnp.sum(hot * logits, axis=-1)) * weights)
    d = ((jnp.exp(logits - log_z[:, None]) - hot) * weights[:, None]).astype(x.dtype)
    return (total, dw + x.T @ d), d @ w.T

  @jax.custom_vjp
  def loss(x: jax.Array, w: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    return forward(x, w, labels, weights)[0]

  def forward(x: Any, w: Any, labels: Any, weights: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    sequences = jax.tree.map(lambda a: a.reshape(-1, length, *a.shape[1:]), (x, labels, weights))
    (total, dw), dx = jax.lax.scan(functools.partial(step, w=w), (jnp.zeros(()), jnp.zeros_like(w)), sequences)
    return total, (dx.reshape(x.shape), dw)

  loss.defvjp(forward, lambda kept, g: (*(jnp.asarray(part * g, part.dtype) for part in kept), None, None))
  return _by_device(loss, model, hidden, data)


def _by_device(loss: Callable[..., jax.Array], model: Any, hidden: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
  """`loss(x [N, C], w [C, V], labels [N], weights [N])` of each device's tokens, with gathered weights; their sum."""
  rows = jax.P(AXIS)

  @functools.partial(jax.shard_map, mesh=model.mesh, in_specs=(rows,) * 4, out_specs=jax.P(), check_vma=False)
  def run(x: Any, w: Any, labels: Any, segments: Any) -> jax.Array:
    w = jax.lax.all_gather(w.astype(x.dtype), AXIS, axis=0, tiled=True)  # [C, V]
    weights = (segments.reshape(-1) != 0).astype(jnp.float32)
    return jax.lax.psum(loss(x.reshape(-1, x.shape[-1]), w, labels.reshape(-1), weights), AXIS)

  kernel = model.decoder.logits_dense.kernel[...]
  return run(model.decoder.decoder_norm(hidden), kernel, data["targets"], data["targets_segmentation"])


def _logits(model: Any, hidden: jax.Array) -> jax.Array:
  logits: jax.Array = model.decoder.apply_output_head(model.token_embedder, hidden, True, "train")
  return logits


FORMS: dict[str, Form] = {
  "here": one_hot(cross_entropy_with_logits),
  "MaxText's loss": one_hot(max_utils.cross_entropy_with_logits),
  "MaxText's MTP loss": gathered,
  "num_vocab_tiling": tiled,
  "tokamax": kernels,
  "gradients at once": at_once,
}
