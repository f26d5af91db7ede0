"""The name of the device that a program is traced for, as the tables of this package have it."""

from typing import Any, Final

import jax

_ALIASES: Final = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
"""Other names of a generation that JAX knows (jax/_src/tpu_info.py)."""


def kind_of(device: Any) -> str:
  """The `device_kind` of a device, concrete or abstract, under the one name that the tables have."""
  kind = str(device.device_kind)
  return _ALIASES.get(kind, kind)


def device_kind() -> str:
  """The kind of device a program is traced for: that of the mesh in use, else that of the first device."""
  return kind_of(jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0])
