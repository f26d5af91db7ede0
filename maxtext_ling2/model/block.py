"""One cycle of layers as the body of a layer scan: `cycle - 1` GLA layers, themselves scanned, then one MLA layer."""

import types
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from maxtext.layers import nnx_scan
from maxtext.utils import maxtext_utils

from maxtext_ling2.model.layer import Ling2DecoderLayer

Carry = tuple[jax.Array, jax.Array]
"""Hidden states [B, T, C] and the 0-based index of the next layer, int32."""


class Ling2Block(nnx.Module):
  """A whole cycle of expert layers. All blocks share one graph, so the layer index comes with the carry.

  Each layer rematerialises for itself (the caller must not do it again for the block).
  """

  def __init__(
    self, config: Any, mesh: Any, model_mode: str, rngs: nnx.Rngs, quant: Any = None, remat_policy: Any = None
  ) -> None:
    self.config = config
    self.remat_policy = remat_policy
    self.num_gla_layers = config.inhomogeneous_layer_cycle_interval - 1

    def layer(layer_rngs: nnx.Rngs, mla: bool) -> Ling2DecoderLayer:
      return Ling2DecoderLayer(config, mesh, model_mode, layer_rngs, quant, mla=mla, dense=False)

    if self.num_gla_layers:
      self.gla_layers = nnx_scan.create_scanned_layers(
        lambda layer_rngs: layer(layer_rngs, mla=False),
        length=self.num_gla_layers,
        param_scan_axis=config.param_scan_axis,
        metadata_axis_name="local_layers",  # an axis for which MaxText has sharding rules
        rngs=rngs,
      )
    self.mla_layer = layer(rngs, mla=True)

  def __call__(
    self,
    carry: Carry,
    decoder_segment_ids: jax.Array | None,
    decoder_positions: jax.Array,
    deterministic: bool,
    model_mode: str,
    slot: int | None = None,
    previous_chunk: Any = None,
  ) -> tuple[Carry, None]:
    """Applies the cycle; the arguments are those of a layer."""
    args = (decoder_segment_ids, decoder_positions, deterministic, model_mode)

    def one(layer: Ling2DecoderLayer, carry: Carry) -> Carry:
      x, index = carry
      y, _ = layer(x, *args, previous_chunk=previous_chunk, slot=slot, layer_index=index)
      return y, index + 1

    if self.num_gla_layers:
      carry = nnx_scan.apply_scanned_layers(
        self.gla_layers,
        carry,
        length=self.num_gla_layers,
        param_scan_axis=self.config.param_scan_axis,
        apply_fn=one,
        remat=rematerialises(self.config),
        remat_policy=self.remat_policy,
        prevent_cse=_prevents_cse(self.config, in_scan=True),
      )
    return apply_layer(self.mla_layer, carry, one, self.config, self.remat_policy, in_scan=True), None


def rematerialises(config: Any) -> bool:
  """Whether layers are wrapped in jax.checkpoint at all; `full` has no policy either, so the policy does not tell."""
  return config.remat_policy not in (None, "none")  # MaxText makes None of the word


def _prevents_cse(config: Any, in_scan: bool) -> bool:
  """Whether XLA must be kept from merging a layer's second forward pass with its first, which would undo the remat.

  MaxText's rule says no for a whole model whose layers are scanned. Right in the body of a loop, where XLA cannot merge;
  but a scanned LING2 has unrolled layers before and after its loop.
  """
  seen = types.SimpleNamespace(
    scan_layers=in_scan, gradient_accumulation_steps=config.gradient_accumulation_steps, hardware=config.hardware
  )
  return bool(maxtext_utils.should_prevent_cse_in_remat(seen))


def apply_layer[T](
  layer: nnx.Module, carry: T, apply: Callable[[Any, T], T], config: Any, remat_policy: Any, in_scan: bool = False
) -> T:
  """Applies one unrolled layer under the remat policy and writes its new state back.

  Args:
    layer: the layer.
    carry: what goes through the layers.
    apply: returns the next carry for (layer, carry).
    config: MaxText config.
    remat_policy: MaxText's resolved policy.
    in_scan: whether it stands in the body of a loop over layers.
  """
  graph, state = nnx.split(layer)

  def pure(state: Any, carry: T) -> tuple[T, Any]:
    merged = nnx.merge(graph, state)
    return apply(merged, carry), nnx.state(merged)

  if rematerialises(config):
    pure = jax.checkpoint(pure, policy=remat_policy, prevent_cse=_prevents_cse(config, in_scan))
  carry, state = pure(state, carry)
  nnx.update(layer, state)
  return carry
