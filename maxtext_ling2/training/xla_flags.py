"""XLA flags with which a LING2 step is compiled, by TPU generation: data, from programs compiled ahead of time.

What each was seen to do (libtpu 0.0.52, one mesh axis over the whole slice; tests/training/test_xla_flags.py compiles
it again). The threshold keeps XLA from turning a product with sharded weights into a windowed einsum, a loop over the
devices that reads and writes its accumulator in every round: v5p and v4 make it, v5e, v6e and tpu7x do not. The
SparseCore flags make gathers of weights and reductions of gradients asynchronous, and leave a reduce-scatter where XLA
otherwise reduces the whole gradient on every device and then slices it. `all_gather` and `reduce_scatter` alone change
nothing; the variant of the gather has as many dimensions as the generation's torus. tpu7x does both by default; v5e has
no SparseCore; on v4 the collectives stay synchronous.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.ops.devices import kind_of

_OFFLOAD: Final = "xla_tpu_enable_sparse_core_collective_offload_"

_NO_WINDOWED_EINSUM: Final = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""Larger than any operand, MiB."""


def _on_sparse_core(*collectives: str) -> dict[str, str]:
  return {_OFFLOAD + collective: "true" for collective in collectives}


_FLAGS: Final[Mapping[str, Mapping[str, str]]] = {
  "TPU v4": _NO_WINDOWED_EINSUM,
  "TPU v5": _NO_WINDOWED_EINSUM | _on_sparse_core("all_gather", "reduce_scatter", "3d_all_gather", "nd_reduce_scatter"),
  "TPU v6 lite": _on_sparse_core("all_gather", "reduce_scatter", "2d_all_gather", "nd_reduce_scatter"),
}
"""By `device_kind`, as the tiles of `ops.gla`; a generation that is not listed gets none."""


class FlagError(Ling2Error, ValueError):
  """XLA refuses a flag of compile_xla_flags."""


def compiler_options(config: Any, device: Any, given: Mapping[str, str]) -> dict[str, str]:
  """The options with which XLA compiles a step of a LING2 run: the generation's flags, and the user's, which win.

  Args:
    config: MaxText's config, with `tuned_xla_flags`.
    device: one of the mesh; it may be of a topology, without a chip.
    given: the user's `compile_xla_flags`, parsed.

  Returns:
    Flags by name, without those in LIBTPU_INIT_ARGS. Off a TPU, or with `tuned_xla_flags=false`, only the user's.

  Raises:
    FlagError: XLA refuses one of the user's.
  """
  for name, value in given.items():
    reason = refusal(device, name, value)
    if reason is not None:
      raise FlagError(
        f"compile_xla_flags: XLA for {device.device_kind} refuses --{name}={value} ({reason}); remove it, or use the "
        "name that this version of libtpu or XLA knows"
      )
  tuned = _tuned(device) if config.tuned_xla_flags else {}
  by_user = {*given, *_in_environment()}
  ours = {name: value for name, value in tuned.items() if name not in by_user}
  if config.tuned_xla_flags:
    ours = _agreed(_FLAGS.get(kind_of(device), {}), ours)
  if ours:
    listed = ", ".join(f"{name}={value}" for name, value in ours.items())
    _log(f"LING2: XLA flags for {device.device_kind}: {listed} (tuned_xla_flags=false turns them off)")
  return ours | dict(given)


def _agreed(flags: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
  """Those of `ours` that every process of the run takes: with other options each would compile another program.

  Args:
    flags: all of the generation, the same in every process.
    ours: what this process takes of them.
  """
  if not flags or jax.process_count() == 1:
    return dict(ours)
  taken = multihost_utils.process_allgather(np.array([name in ours for name in flags])).all(axis=0)
  agreed = {name: value for (name, value), everywhere in zip(flags.items(), taken, strict=True) if everywhere}
  for name in ours.keys() - agreed.keys():
    _log(f"LING2: without the XLA flag {name}={ours[name]}: another process of this run refuses it or has its own value")
  return agreed


def _in_environment() -> set[str]:
  """Flags that the user gives to libtpu itself, which an option of the compiler would replace."""
  words = os.environ.get("LIBTPU_INIT_ARGS", "").split()
  return {word.lstrip("-").partition("=")[0] for word in words}


def _tuned(device: Any) -> dict[str, str]:
  """The flags of the device's generation that this libtpu accepts; another one is named in the log and dropped."""
  accepted = {}
  for name, value in _FLAGS.get(kind_of(device), {}).items():
    reason = refusal(device, name, value)
    if reason is None:
      accepted[name] = value
    else:
      _log(f"LING2: without the XLA flag {name}={value}: this libtpu refuses it for {device.device_kind} ({reason})")
  return accepted


_REFUSALS: Final[dict[tuple[str, str, str], str | None]] = {}
"""What `refusal` found, by generation, flag and value: a process has one libtpu."""


def refusal(device: Any, name: str, value: str) -> str | None:
  """Why XLA does not compile a small program with a flag for a device, in its words; None: it does."""
  key = (device.device_kind, name, value)
  if key not in _REFUSALS:
    _REFUSALS[key] = _compile_with(device, name, value)
  return _REFUSALS[key]


def _compile_with(device: Any, name: str, value: str) -> str | None:
  sharding = jax.sharding.SingleDeviceSharding(device)
  program = jax.jit(lambda x: x + 1, in_shardings=sharding, out_shardings=sharding, compiler_options={name: value})
  try:
    program.lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile()
  except jax.errors.JaxRuntimeError as error:
    if "INVALID_ARGUMENT" not in str(error) and "No such compile option" not in str(error):
      raise  # not about the flag: a device that is lost, no memory
    return str(error).splitlines()[0]
  return None


@functools.cache
def _log(text: str) -> None:
  """Logs a line once per process: several steps are compiled with the same flags."""
  from maxtext.utils import max_logging

  max_logging.log(text)
