"""The backend "auto": TPU kernels where the program is compiled for a TPU, plain JAX elsewhere.

The platform is known only when a program is lowered: a program compiled ahead of time for a TPU is traced on a machine
whose own devices are CPUs. So both are traced, and the one that is not wanted is never lowered.
"""

import functools
from typing import Any

import jax

from maxtext_ling2.ops.gla.chunked import in_chunks_of
from maxtext_ling2.ops.gla.pallas_tpu import pallas
from maxtext_ling2.ops.gla.vjp import Implementation

_plain = in_chunks_of(None)


def _forward(*args: Any, **static: Any) -> Any:
  """`Implementation.forward`."""
  tpu, default = (functools.partial(x.forward, **static) for x in (pallas, _plain))
  return jax.lax.platform_dependent(*args, tpu=tpu, default=default)


def _backward(*args: Any, **static: Any) -> Any:
  """`Implementation.backward`."""
  tpu, default = (functools.partial(x.backward, **static) for x in (pallas, _plain))
  return jax.lax.platform_dependent(*args, tpu=tpu, default=default)


by_platform = Implementation(_forward, _backward)
