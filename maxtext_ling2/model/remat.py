"""Rematerialisation of single layers: MaxText's policies, for layers outside a scan and in the body of one."""

import types
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from maxtext.utils import maxtext_utils


def uses_remat(config: Any) -> bool:
  """True if layers are wrapped in `jax.checkpoint`. The policy does not tell: that of `full` is None, too."""
  return config.remat_policy not in (None, "none")  # MaxText makes None of the word


def prevents_cse(config: Any, in_scan: bool) -> bool:
  """True if XLA must be kept from merging a layer's second forward pass with its first, which would undo the remat.

  MaxText answers no for every layer of a model with `scan_layers`. That is right in the body of a loop, where XLA cannot
  merge them; but a scanned LING2 has unscanned layers before and after its loop.
  """
  layer_config = types.SimpleNamespace(
    scan_layers=in_scan, gradient_accumulation_steps=config.gradient_accumulation_steps, hardware=config.hardware
  )
  return bool(maxtext_utils.should_prevent_cse_in_remat(layer_config))


def apply_layer[T](
  layer: nnx.Module, carry: T, apply: Callable[[Any, T], T], config: Any, remat_policy: Any, in_scan: bool = False
) -> T:
  """Applies one layer under the remat policy and writes its new state back.

  Args:
    layer: the layer.
    carry: input of the layer, such as its hidden states [B, T, C].
    apply: returns the next carry for (layer, carry).
    config: MaxText config.
    remat_policy: MaxText's resolved policy.
    in_scan: whether the layer is in the body of a loop over layers.
  """
  graph, state = nnx.split(layer)

  def pure(state: Any, carry: T) -> tuple[T, Any]:
    merged = nnx.merge(graph, state)
    return apply(merged, carry), nnx.state(merged)

  if uses_remat(config):
    pure = jax.checkpoint(pure, policy=remat_policy, prevent_cse=prevents_cse(config, in_scan))
  carry, state = pure(state, carry)
  nnx.update(layer, state)
  return carry
