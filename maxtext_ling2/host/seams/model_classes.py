"""Seam: which decoder and which multi-token-prediction block MaxText builds for a decoder block.

`maxtext.models.models` uses both classes once, as module globals; each is replaced by a function that builds LING2's for
a LING2 config, and otherwise what was there before.
"""

import inspect
from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation, expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam
from maxtext_ling2.model import contract as model_contract

_MODELS = "maxtext.models.models"
_DECODERS = "maxtext.layers.nnx_decoders"


def _asks_for_qwen3_next(function: Any) -> bool:
  return "is_qwen3_next" in inspect.unwrap(function).__code__.co_names


class ModelClassesSeam(Seam):
  """Builds LING2's decoder and multi-token-prediction block.

  Args:
    decoder: makes the decoder, from the arguments of `NNXDecoder`.
    mtp_block: makes the multi-token-prediction block, from those of `MultiTokenPredictionBlock`.
  """

  name = "model classes"
  module = _MODELS
  expectations = (
    Expectation(f"{_MODELS}:NNXDecoder", holds=callable, meaning="the name by which Transformer builds its decoder"),
    Expectation(
      f"{_MODELS}:MultiTokenPredictionBlock", holds=callable, meaning="the name by which Transformer builds its MTP block"
    ),
    Expectation(
      f"{_DECODERS}:NNXDecoder.__call__",
      parameters=("shared_embedding", "decoder_input_tokens"),
      holds=_asks_for_qwen3_next,
      meaning="which asks for is_qwen3_next",
    ),
    # What LING2's decoder overrides or calls.
    *expect(
      _DECODERS,
      "NNXDecoder.__init__(config, mesh, quant, model_mode, rngs)",
      "NNXDecoder.get_decoder_layers()",
      "NNXDecoder.get_norm_layer(num_features, rngs)",
      "NNXDecoder._init_sequential_layers(decoder_block_classes, rngs)",
      "NNXDecoder._init_scanned_layers(decoder_block_classes, rngs, mesh)",
      "NNXDecoder._apply_qwen3_next_scanned_blocks(y, layer_args, layer_kwargs)",
      "NNXDecoder._create_and_register_layer(layer_cls, rngs, base_name, i)",
      "NNXDecoder._apply_embedding(shared_embedding, decoder_input_tokens)",
      "NNXDecoder.apply_output_head(shared_embedding, y, deterministic, model_mode, normalize_y)",
      "NNXDecoder.get_remat_policy()",
    ),
    *model_contract.EXPECTATIONS,
  )

  def __init__(self, decoder: Callable[..., Any], mtp_block: Callable[..., Any]):
    super().__init__()
    self.decoder = decoder
    self.mtp_block = mtp_block

  def handlers(self) -> Handlers:
    return {"NNXDecoder": self._build_decoder, "MultiTokenPredictionBlock": lambda call: call.to(self.mtp_block)}

  def _build_decoder(self, call: Call) -> Any:
    decoder = call.to(self.decoder)
    # MaxText's __call__ hands scanned layers to a method of their family; Qwen3-Next's is the closest to LING2.
    decoder.is_qwen3_next = call.config.scan_layers
    return decoder
