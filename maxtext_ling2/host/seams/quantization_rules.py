"""Seam: Qwix's rules for the layers of a scanned cycle.

MaxText's rule is for modules whose path is `decoder/.*layers.*`. The MLA layer of a scanned cycle is
`decoder/scanned_blocks/mla_layer`, a name that checkpoints hold: it would be left out without a word.
"""

import dataclasses
from typing import Any

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use

_LAYERS, _ALL_LAYERS = "decoder/.*layers.*", "decoder/.*layers?.*"


class QuantizationRulesSeam(Seam):
  """Lets MaxText's rule for decoder layers match all layers of LING2."""

  name = "quantization rules"
  module = "maxtext.layers.quantizations"
  use = Use(
    "use_qwix_quantization=true",
    lambda config: config.use_qwix_quantization and config.quantization,
    "set use_qwix_quantization=false and quantization=''",
  )
  expectations = expect(module, "get_quantization_rule(config)")

  def handlers(self) -> Handlers:
    return {"get_quantization_rule": _rules}


def _rules(call: Call) -> Any:
  rules = call.original()
  if rules is None:
    return rules
  paths = [rule.module_path.replace(_LAYERS, _ALL_LAYERS) for rule in rules]
  if paths == [rule.module_path for rule in rules]:
    raise ValueError(
      f"quantization={call.config.quantization!r}: MaxText's rules for it, {paths}, have no part {_LAYERS!r} any more, "
      "so which layers of LING2 they reach is unknown; set quantization=''"
    )
  return [dataclasses.replace(rule, module_path=path) for rule, path in zip(rules, paths, strict=True)]
