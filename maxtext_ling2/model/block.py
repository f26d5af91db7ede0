"""One cycle of layers as the body of a layer scan: `cycle - 1` GLA layers, themselves scanned, then one MLA layer."""

from typing import Any

import jax
from flax import nnx
from maxtext.layers import nnx_scan

from maxtext_ling2.model import remat
from maxtext_ling2.model.layer import Ling2DecoderLayer

Carry = tuple[jax.Array, jax.Array]
"""Hidden states [B, T, C] and the 0-based index of the next layer, int32."""


class Ling2Block(nnx.Module):
  """A whole cycle of layers with experts. All blocks share one graph, so the layer index is part of the carry.

  Each layer is rematerialised on its own; the caller must not wrap the block in `jax.checkpoint` again.
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
    """Applies the cycle to the carry; the other arguments are those of a layer."""
    args = (decoder_segment_ids, decoder_positions, deterministic, model_mode)

    def apply(layer: Ling2DecoderLayer, carry: Carry) -> Carry:
      x, layer_idx = carry  # [B, T, C], []
      y, _ = layer(x, *args, previous_chunk=previous_chunk, slot=slot, layer_idx=layer_idx)
      return y, layer_idx + 1

    if self.num_gla_layers:
      # The scan stacks all random streams of its layers. Qwix gives all modules of a model one and the same for LoRA.
      streams = jax.tree.map(lambda value: value, nnx.state(self.gla_layers, nnx.RngState))  # a copy
      carry = nnx_scan.apply_scanned_layers(
        self.gla_layers,
        carry,
        length=self.num_gla_layers,
        param_scan_axis=self.config.param_scan_axis,
        apply_fn=apply,
        remat=remat.uses_remat(self.config),
        remat_policy=self.remat_policy,
        prevent_cse=remat.prevents_cse(self.config, in_scan=True),
      )
      nnx.update(self.gla_layers, streams)  # MaxText does not keep them after a scan, either
    return remat.apply_layer(self.mla_layer, carry, apply, self.config, self.remat_policy, in_scan=True), None
