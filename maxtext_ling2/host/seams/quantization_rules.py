"""Seam: Qwix's rules for the layers of a scanned cycle.

MaxText's rule is for modules whose path is `decoder/.*layers.*`. The MLA layer of a scanned cycle is
`decoder/scanned_blocks/global_layer`, a name that checkpoints hold: it would be left out without a word.
"""

import dataclasses
from typing import Any

from maxtext_ling2.host.contract import Expectation
from maxtext_ling2.host.patches import bound
from maxtext_ling2.host.seam import Seam, Use

_QUANTIZATIONS = "maxtext.layers.quantizations"
_LAYERS, _ALL_LAYERS = "decoder/.*layers.*", "decoder/.*layers?.*"


class QuantizationRulesSeam(Seam):
  """Lets MaxText's rule for decoder layers match all layers of the plugin's decoder block.

  Args:
    decoder_block: the plugin's value of `decoder_block`.
  """

  name = "quantization rules"
  module = _QUANTIZATIONS
  use = Use(
    "use_qwix_quantization=true",
    lambda config: config.use_qwix_quantization and config.quantization,
    "set use_qwix_quantization=false and quantization=''",
  )
  expectations = (Expectation(f"{_QUANTIZATIONS}:get_quantization_rule", parameters=("config",)),)

  def __init__(self, decoder_block: str):
    super().__init__()
    self.decoder_block = decoder_block

  def apply(self) -> None:
    from maxtext.layers import quantizations

    self.patches.wrap(quantizations, "get_quantization_rule", self._rules)

  def _rules(self, original: Any, *args: Any, **kwargs: Any) -> Any:
    rules = original(*args, **kwargs)
    config = bound(original, args, kwargs).arguments["config"]
    if rules is None or getattr(config.decoder_block, "value", config.decoder_block) != self.decoder_block:
      return rules
    paths = [rule.module_path.replace(_LAYERS, _ALL_LAYERS) for rule in rules]
    if paths == [rule.module_path for rule in rules]:
      raise ValueError(
        f"quantization={config.quantization!r}: MaxText's rules for it, {paths}, have no part {_LAYERS!r} any more, so "
        "that it is unknown which layers of LING2 they reach; set quantization=''"
      )
    return [dataclasses.replace(rule, module_path=path) for rule, path in zip(rules, paths, strict=True)]
