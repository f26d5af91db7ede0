"""A device mesh in text, such as `--mesh fsdp=2,tensor=2` of `maxtext-ling2 verify` and `plan`."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.maxtext_api import overrides

Array = NDArray[Any]

AXES = (
  *("data", "fsdp", "fsdp_transpose", "tensor", "tensor_transpose", "tensor_sequence", "expert", "context"),
  *("context_usp_ulysses", "autoregressive"),
)
"""MaxText's mesh axes within a slice, except those of pipelines and DiLoCo, which change the computation."""

_BATCH = ("data", "fsdp", "fsdp_transpose", "expert")  # axes that shard the batch
_SEQUENCE = ("context", "context_usp_ulysses")  # axes that shard the sequence


class MeshError(Ling2Error, ValueError):
  """The text is not a mesh, or JAX has another number of devices."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """Sizes of mesh axes by name; all others are 1."""

  sizes: Mapping[str, int]

  @classmethod
  def read(cls, text: str) -> Self:
    """Reads axis=size,axis=size.

    Raises:
      MeshError: an axis is unknown or named twice, or a size is not a positive number.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
      axis, size = (text.strip() for text in overrides.split(part) or (part, ""))
      if axis not in AXES or axis in sizes:
        why = "occurs twice" if axis in sizes else "is not an axis of MaxText's mesh"
        raise MeshError(f"--mesh {text}: {axis!r} {why}; name each of {', '.join(AXES)} at most once, as fsdp=2,tensor=4")
      if not size.isdecimal() or int(size) < 1:
        raise MeshError(f"--mesh {text}: {axis} has size {size!r}; sizes are positive numbers, as in fsdp=2,tensor=4")
      sizes[axis] = int(size)
    return cls(sizes)

  @property
  def devices(self) -> int:
    """Number of devices."""
    return math.prod(self.sizes.values())

  @property
  def batch_shards(self) -> int:
    """Number of shards of the batch, which must divide the number of sequences."""
    return self._product(_BATCH)

  @property
  def length(self) -> int:
    """Number of shards of a sequence, which must divide its number of tokens."""
    return self._product(_SEQUENCE)

  def _product(self, axes: tuple[str, ...]) -> int:
    return math.prod(self.sizes.get(axis, 1) for axis in axes)

  def settings(self) -> dict[str, Any]:
    """MaxText's settings for it; its load balancing of attention over context would reorder tokens, which GLA forbids."""
    sizes: dict[str, Any] = {f"ici_{axis}_parallelism": size for axis, size in self.sizes.items()}
    return sizes | ({"context_parallel_load_balance": False} if self.length > 1 else {})

  def pad(self, tokens: Array, value: int) -> Array:
    """Pads [B, T] at the end of both axes to multiples of the numbers of shards."""
    extra = [(0, -size % shards) for size, shards in zip(tokens.shape, (self.batch_shards, self.length), strict=True)]
    return np.pad(tokens, extra, constant_values=value)

  def force_devices(self) -> None:
    """Makes XLA create `devices` CPU devices; to be called before JAX initialises."""
    flags = os.environ.get("XLA_FLAGS", "")
    if self.devices > 1 and "xla_force_host_platform_device_count" not in flags:
      os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={self.devices}".strip()

  def check_devices(self) -> None:
    """Raises MeshError if JAX has another number of devices."""
    import jax

    if jax.device_count() != self.devices:
      raise MeshError(
        f"--mesh needs {self.devices} devices, but JAX has {jax.device_count()} ({jax.devices()[0].device_kind}); choose "
        "a mesh of all of them, or set JAX_PLATFORMS=cpu, where any number is available"
      )


ONE_DEVICE = MeshSpec({})
