"""The kind of device that a program is traced for, as named in the tables of this package."""

from typing import Any, Final

import jax

_ALIASES: Final = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
"""Other names that JAX has for a generation (jax/_src/tpu_info.py)."""


def kind_of(device: Any) -> str:
  """The `device_kind` of a device, concrete or abstract, with aliases resolved."""
  kind = str(device.device_kind)
  return _ALIASES.get(kind, kind)


def device_kind() -> str:
  """The kind of device that a program is traced for: of the current mesh, else of the first device."""
  return kind_of(jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0])


def is_gpu(kind: str) -> bool:
  """Whether a device of this kind is a GPU, whose kinds are names of products."""
  return kind != "cpu" and not kind.startswith("TPU")
