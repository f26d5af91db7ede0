"""LING2's decoder: MaxText's, with LING2's layers."""

import functools
from typing import Any

from flax import nnx
from maxtext.layers.nnx_decoders import NNXDecoder
from maxtext.layers.normalizations import RMSNorm

from maxtext_ling2.model.layer import Ling2DecoderLayer, Ling2MtpLayer


class Ling2Decoder(NNXDecoder):
  """The stack of LING2 layers; embedding, final norm and head are MaxText's."""

  def get_decoder_layers(self) -> list[type[nnx.Module]]:
    """The layer classes; MaxText gives the last one to its multi-token-prediction layers."""
    return [Ling2DecoderLayer, Ling2MtpLayer]

  def get_norm_layer(self, num_features: int, rngs: nnx.Rngs) -> Any:
    """The final norm."""
    return functools.partial(RMSNorm, num_features=num_features, shard_mode=self.config.shard_mode, rngs=rngs)

  def _init_sequential_layers(self, decoder_block_classes: Any, rngs: nnx.Rngs) -> None:
    del decoder_block_classes
    for index in range(self.config.num_decoder_layers):
      self._create_and_register_layer(Ling2DecoderLayer, rngs, "layers", index, layer_idx=index)
