"""MaxText's config of what is planned, once all settings are merged: whether it is the model that was asked for."""

from collections.abc import Mapping
from typing import Any

from maxtext_ling2.configs.validation import is_ling2
from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host.compile_step import read_config
from maxtext_ling2.maxtext_api import overrides
from maxtext_ling2.plan.chips import slice_of


class ModelError(Ling2Error, ValueError):
  """The settings describe another model than the one that was asked for, or none of LING2."""


def planned_config(yml: str, topology: str, settings: Mapping[str, str], named: str | None) -> Any:
  """The config that a train step is compiled with. Nothing is compiled; the first call imports MaxText.

  Args:
    yml: base YAML.
    topology: as MaxText's compile_topology.
    settings: MaxText's, as text for its command line.
    named: the model_name that the user asks for; None: a YAML file that names none.

  Returns:
    MaxText's HyperParameters: base YAML and its parents, model YAML, command line and M_* variables merged.

  Raises:
    TopologyError: the topology is not known.
    ConfigError: MaxText refuses the settings.
    ModelError: they describe another model.
  """
  slice_of(topology)  # MaxText's own error for an unknown topology names no remedy
  config = read_config(yml, overrides.join({**settings, "compile_topology": topology}))
  if named is not None and config.model_name != named:
    raise ModelError(
      f"model_name={config.model_name}: this command plans {named}, so its figures would be listed under the wrong name; "
      f"leave model_name out, or name {config.model_name} in place of {named}"
    )
  if not is_ling2(config):
    block = getattr(config.decoder_block, "value", config.decoder_block)
    raise ModelError(
      f"model_name={config.model_name}, decoder_block={block}: not a LING2 model, and the parts, floors and kernel times "
      "of this command are LING2's; name a model such as ling2, or a YAML file with decoder_block: ling2. For other "
      "models use MaxText's own `python -m maxtext.trainers.pre_train.train_compile`"
    )
  return config
