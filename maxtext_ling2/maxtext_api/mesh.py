"""A mesh for `maxtext-ling2 verify --mesh fsdp=2,tensor=2`, of forced CPU devices where there are no others."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.errors import Ling2Error

Array = NDArray[Any]

AXES = (
  *("data", "fsdp", "fsdp_transpose", "tensor", "tensor_transpose", "tensor_sequence", "expert", "context"),
  *("context_usp_ulysses", "autoregressive"),
)
"""MaxText's mesh axes within a slice; those of pipelines and of diloco compute something else."""

_ROWS = ("data", "fsdp", "fsdp_transpose", "expert")  # the axes that cut the batch
_LENGTH = ("context", "context_usp_ulysses")  # and those that cut the sequence


class MeshError(Ling2Error, ValueError):
  """The text of a mesh cannot be read, or its devices cannot be had."""


@dataclasses.dataclass(frozen=True)
class VerifyMesh:
  """Sizes of mesh axes by name; those left out are 1."""

  sizes: Mapping[str, int]

  @classmethod
  def read(cls, text: str) -> Self:
    """Reads axis=size,axis=size.

    Raises:
      MeshError: an axis is unknown or named twice, or a size is no positive number.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
      axis, _, size = (word.strip() for word in part.partition("="))
      if axis not in AXES or axis in sizes:
        why = "is there twice" if axis in sizes else "is no axis of MaxText's mesh"
        raise MeshError(f"--mesh {text}: {axis!r} {why}; name each of {', '.join(AXES)} at most once, as fsdp=2,tensor=4")
      if not size.isdecimal() or int(size) < 1:
        raise MeshError(f"--mesh {text}: {axis} has size {size!r}; sizes are positive numbers, as in fsdp=2,tensor=4")
      sizes[axis] = int(size)
    return cls(sizes)

  @property
  def devices(self) -> int:
    """Devices in all."""
    return math.prod(self.sizes.values())

  @property
  def rows(self) -> int:
    """What the number of rows must be a multiple of."""
    return self._product(_ROWS)

  @property
  def length(self) -> int:
    """What the number of tokens of a row must be a multiple of."""
    return self._product(_LENGTH)

  def _product(self, axes: tuple[str, ...]) -> int:
    return math.prod(self.sizes.get(axis, 1) for axis in axes)

  def settings(self) -> dict[str, Any]:
    """MaxText's settings for it; experts are multiplied densely, all that XLA has on CPUs over an expert axis."""
    sizes = {f"ici_{axis}_parallelism": size for axis, size in ({"fsdp": 1} | dict(self.sizes)).items()}
    return sizes | {"context_parallel_load_balance": False, "sparse_matmul": False}

  def fill(self, tokens: Array, value: int) -> Array:
    """[B, T] filled up at the end of both axes, so that the mesh can cut it evenly."""
    extra = [(0, -size % multiple) for size, multiple in zip(tokens.shape, (self.rows, self.length), strict=True)]
    return np.pad(tokens, extra, constant_values=value)

  def force_devices(self) -> None:
    """Asks XLA for so many CPU devices; to be called before JAX looks for devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if self.devices > 1 and "xla_force_host_platform_device_count" not in flags:
      os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={self.devices}".strip()

  def check_devices(self) -> None:
    """Raises MeshError if JAX has another number of devices."""
    import jax

    if jax.device_count() != self.devices:
      raise MeshError(
        f"--mesh needs {self.devices} devices, but JAX has {jax.device_count()} ({jax.devices()[0].device_kind}); choose "
        "a mesh of all of them, or set JAX_PLATFORMS=cpu, where any number can be had"
      )


ONE_DEVICE = VerifyMesh({})
