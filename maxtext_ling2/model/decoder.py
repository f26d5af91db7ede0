"""LING2's decoder: MaxText's, with LING2's layers, scanned or unscanned."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.layers.nnx_decoders import NNXDecoder
from maxtext.layers.normalizations import RMSNorm

from maxtext_ling2.model.block import Carry, Ling2Block
from maxtext_ling2.model.layer import Ling2DecoderLayer, Ling2MtpLayer
from maxtext_ling2.model.layer_layout import ScanLayout, is_dense, is_mla
from maxtext_ling2.model.remat import apply_layer


class Ling2Decoder(NNXDecoder):
  """The stack of LING2 layers; embedding, final norm and head are MaxText's.

  With `scan_layers`, whole cycles are stacked in `scanned_blocks`; the layers before and after them are unscanned and
  named `layers_{index}`, as all layers are without `scan_layers`.
  """

  def get_decoder_layers(self) -> list[type[nnx.Module]]:
    """The layer classes; MaxText gives the last one to its multi-token-prediction layers."""
    return [Ling2DecoderLayer, Ling2MtpLayer]

  def get_norm_layer(self, num_features: int, rngs: nnx.Rngs) -> Any:
    """The final norm."""
    return functools.partial(RMSNorm, num_features=num_features, shard_mode=self.config.shard_mode, rngs=rngs)

  def apply_output_head(self, *args: Any, **kwargs: Any) -> Any:
    """MaxText's logits."""
    with jax.named_scope("logits"):
      return super().apply_output_head(*args, **kwargs)

  def _init_sequential_layers(self, decoder_block_classes: Any, rngs: nnx.Rngs) -> None:
    del decoder_block_classes
    self._create_layers(range(self.config.num_decoder_layers), rngs)

  def _init_scanned_layers(self, decoder_block_classes: Any, rngs: nnx.Rngs, mesh: Any) -> None:
    del decoder_block_classes, mesh
    c = self.config
    self.scan_layout = ScanLayout.of(c.num_decoder_layers, c.inhomogeneous_layer_cycle_interval, c.first_num_dense_layers)
    for indices in self.scan_layout.unscanned:
      self._create_layers(indices, rngs)
    if self.scan_layout.num_blocks:
      self.scanned_blocks = self._create_scanned_layers(
        Ling2Block,
        length=self.scan_layout.num_blocks,
        metadata_axis_name="layers",
        rngs=rngs,
        remat_policy=self.get_remat_policy(),
      )

  def _create_layers(self, indices: Iterable[int], rngs: nnx.Rngs) -> None:
    c = self.config
    for index in indices:
      mla = is_mla(index, c.num_decoder_layers, c.inhomogeneous_layer_cycle_interval)
      dense = is_dense(index, c.first_num_dense_layers)
      self._create_and_register_layer(Ling2DecoderLayer, rngs, "layers", index, mla=mla, dense=dense, layer_idx=index)

  def _apply_qwen3_next_scanned_blocks(
    self, y: jax.Array, layer_args: tuple[Any, ...], layer_kwargs: dict[str, Any], kv_caches: Any = None
  ) -> jax.Array:
    """Applies all layers, y [B, T, C] -> [B, T, C]; MaxText's `__call__` calls it, see `host/seams/model_classes.py`."""
    if kv_caches is not None:
      raise ValueError("kv_caches: LING2's layers keep their own caches; vLLM's external ones are not supported")
    before, after = self.scan_layout.unscanned
    y = self._apply_unscanned(before, y, layer_args, layer_kwargs)
    if self.scan_layout.num_blocks:
      carry: Carry = (y, jnp.asarray(self.scan_layout.start, jnp.int32))  # [B, T, C], []
      (y, _), self.scanned_blocks, _ = self._apply_layers_sequentially(
        self.scanned_blocks,
        carry,
        *layer_args,
        length=self.scan_layout.num_blocks,
        skip_block_remat=True,  # each layer of a block is rematerialised on its own
        **layer_kwargs,
      )
    return self._apply_unscanned(after, y, layer_args, layer_kwargs)

  def _apply_unscanned(
    self, indices: Iterable[int], y: jax.Array, layer_args: tuple[Any, ...], layer_kwargs: dict[str, Any]
  ) -> jax.Array:
    def apply(layer: Ling2DecoderLayer, y: jax.Array) -> jax.Array:
      return layer(y, *layer_args, **layer_kwargs)[0]

    for index in indices:
      y = apply_layer(getattr(self, f"layers_{index}"), y, apply, self.config, self.get_remat_policy())
    return y
