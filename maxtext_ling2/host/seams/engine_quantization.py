"""Seam: MaxEngine with weights quantised by AQT, which MaxText 0.2.5 cannot trace in a model with experts, LING2 or not.

Flax refuses AQT's variables that MaxText's `RoutedMoE` keeps in a static attribute, `quant_einsum_wi_0`. Nor
does it write a quantised checkpoint: load_and_quantize_checkpoint loads the weights and ends without a word.
"""

from typing import Any

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam


class EngineQuantizationSeam(Seam):
  """Refuses such weights, before they are loaded."""

  name = "engine quantization"
  module = "maxtext.inference.maxengine.maxengine"
  needed_for_training = False
  expectations = expect(module, "MaxEngine.__init__(config)")

  def handlers(self) -> Handlers:
    return {"MaxEngine.__init__": _check}


def _check(call: Call) -> Any:
  config = call.config
  if config.quantization and not config.use_qwix_quantization:
    quantization = getattr(config.quantization, "value", config.quantization)
    if config.save_quantized_params_path:
      raise ValueError(
        f"save_quantized_params_path={config.save_quantized_params_path}: MaxEngine of MaxText 0.2.5 loads weights and "
        "saves nothing there; leave it and quantization empty"
      )
    raise ValueError(
      f"quantization={quantization!r}: MaxEngine of MaxText 0.2.5 cannot trace experts that AQT quantises, of any "
      "model (\"Found data ... assigned to static attribute 'quant_einsum_wi_0'\"); leave it empty"
    )
  return call.original()
