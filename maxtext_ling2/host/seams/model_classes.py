"""Seam: which decoder and which multi-token-prediction block MaxText builds for a decoder block.

`maxtext.models.models` uses both classes once, as module globals; each is replaced by a function that builds LING2's for
a LING2 config, and otherwise what was there before.
"""

import inspect
from collections.abc import Callable
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Seam
from maxtext_ling2.model import contract as model_contract

_MODELS = "maxtext.models.models"
_DECODERS = "maxtext.layers.nnx_decoders"
_MTP = "maxtext.layers.multi_token_prediction"
_MLA = "maxtext.layers.attention_mla"
_MOE = "maxtext.layers.moe"


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
    Expectation(f"{_DECODERS}:NNXDecoder.__init__", parameters=("config", "mesh", "quant", "model_mode", "rngs")),
    Expectation(
      f"{_MTP}:MultiTokenPredictionBlock.__init__",
      parameters=("config", "mesh", "transformer_layer_module", "decoder", "rngs"),
    ),
    # What the plugin's decoder overrides or calls.
    Expectation(f"{_DECODERS}:NNXDecoder.get_decoder_layers", parameters=()),
    Expectation(f"{_DECODERS}:NNXDecoder.get_norm_layer", parameters=("num_features", "rngs")),
    Expectation(f"{_DECODERS}:NNXDecoder._init_sequential_layers", parameters=("decoder_block_classes", "rngs")),
    Expectation(f"{_DECODERS}:NNXDecoder._init_scanned_layers", parameters=("decoder_block_classes", "rngs", "mesh")),
    Expectation(
      f"{_DECODERS}:NNXDecoder._apply_qwen3_next_scanned_blocks", parameters=("y", "layer_args", "layer_kwargs")
    ),
    Expectation(f"{_DECODERS}:NNXDecoder._create_and_register_layer", parameters=("layer_cls", "rngs", "base_name", "i")),
    Expectation(
      f"{_DECODERS}:NNXDecoder.__call__",
      parameters=("shared_embedding", "decoder_input_tokens"),
      holds=_asks_for_qwen3_next,
      meaning="which asks for is_qwen3_next",
    ),
    Expectation(f"{_DECODERS}:NNXDecoder._apply_embedding", parameters=("shared_embedding", "decoder_input_tokens")),
    Expectation(
      f"{_DECODERS}:NNXDecoder.apply_output_head",
      parameters=("shared_embedding", "y", "deterministic", "model_mode", "normalize_y"),
    ),
    Expectation(f"{_DECODERS}:NNXDecoder.get_remat_policy", parameters=()),
    # What its layers build on.
    Expectation(f"{_MTP}:MultiTokenPredictionBlock.__call__", parameters=("shared_embedding", "main_hidden_state")),
    Expectation(f"{_MTP}:MultiTokenPredictionLayer.__call__", parameters=("prev_hidden_state", "target_token_embedding")),
    Expectation(f"{_MTP}:roll_and_mask_by_segment", parameters=("x", "segment_ids")),
    Expectation(f"{_MLA}:MLA.init_rotary_embedding", parameters=()),
    Expectation(f"{_MLA}:MLA.mla_query_projection", parameters=("inputs_q", "inputs_positions", "model_mode")),
    Expectation(f"{_MOE}:RoutedMoE.deepseek_scale_weights", parameters=("weights",)),
    Expectation(f"{_MOE}:RoutedMoE.deepseek_routing", parameters=("gate_logits", "pre_bias_logits")),
    Expectation(f"{_MOE}:RoutedMoE.get_topk", parameters=("gate_logits", "pre_bias_logits")),
    Expectation(f"{_MOE}:RoutedMoE.apply_ffn_activation", parameters=("layer_w0", "layer_w1")),
    Expectation(f"{_MOE}:RoutedMoE.load_balance_loss", parameters=("top_k_indices", "logits")),
    Expectation(f"{_MOE}:calculate_expert_counts", parameters=("top_k_indices", "num_experts")),
    Expectation(f"{_MOE}:megatron_aux_loss_inputs", parameters=("scores", "num_experts_per_tok")),
    Expectation(f"{_MOE}:uses_megatron_seq_aux_loss", parameters=("config",)),
    Expectation(f"{_MOE}:MoEBiasVar"),
    *model_contract.EXPECTATIONS,
  )

  def __init__(self, decoder: Callable[..., Any], mtp_block: Callable[..., Any]):
    super().__init__()
    self.decoder = decoder
    self.mtp_block = mtp_block

  def apply(self) -> None:
    from maxtext.models import models

    self.patches.wrap_for_ling2(models, "NNXDecoder", self._build_decoder)
    self.patches.wrap_for_ling2(models, "MultiTokenPredictionBlock", lambda call: call.to(self.mtp_block))

  def _build_decoder(self, call: Call) -> Any:
    decoder = call.to(self.decoder)
    # MaxText's __call__ hands scanned layers to a method of their family; Qwen3-Next's is the closest to LING2.
    decoder.is_qwen3_next = call.config.scan_layers
    return decoder
