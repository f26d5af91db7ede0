"""How MaxText's MoE is told to route like DeepSeek-V3 for a model of another name.

`RoutedMoE` decides by the model's name and by the decoder block; with any name it does not know it silently routes by a
softmax over biased scores, without groups. So it gets a view of the config that answers as a DeepSeek-V3 model would.
"""

from typing import Any


class DeepSeekRoutingView:
  """Read-only view of a config for MaxText's MoE layers: DeepSeek-V3's routing, whole expert counts.

  It becomes part of graph definitions, so it is equal to, and hashes like, any view of the same config object.
  `gradient_accumulation_steps` shows 2, for which `RoutedMoE` returns the expert counts themselves (int32 [E], of the
  whole batch) in place of a bias update computed from one microbatch.
  """

  __slots__ = ("_config",)

  def __init__(self, config: Any):
    config = config._config if isinstance(config, DeepSeekRoutingView) else config
    object.__setattr__(self, "_config", config)

  def __getattr__(self, name: str) -> Any:
    if name == "model_name":
      return "deepseek3-ling2"
    if name == "decoder_block":
      from maxtext.common.common_types import DecoderBlockType

      return DecoderBlockType.DEEPSEEK
    if name == "float32_gate_logits":
      return True
    if name == "gradient_accumulation_steps":
      return 2
    return getattr(object.__getattribute__(self, "_config"), name)

  def __setattr__(self, name: str, value: Any) -> None:
    raise AttributeError(f"{name}: a view of the config is read-only")

  def __eq__(self, other: object) -> bool:
    return isinstance(other, DeepSeekRoutingView) and other._config is self._config

  def __hash__(self) -> int:
    return hash((DeepSeekRoutingView, id(self._config)))
