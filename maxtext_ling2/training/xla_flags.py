"""XLA flags with which a LING2 step is compiled, by TPU generation, found by compiling ahead of time.

Effects seen with libtpu 0.0.52 and one mesh axis over the whole slice (tests/training/test_xla_flags.py compiles them
again):
- The threshold keeps XLA from turning a matmul with sharded weights into a windowed einsum, a loop over the devices that
  reads and writes its accumulator in each iteration. v5p and v4 do that; v5e, v6e and tpu7x do not.
- The SparseCore flags make all-gathers of weights and reductions of gradients asynchronous, and give a reduce-scatter
  where XLA otherwise all-reduces the whole gradient and slices it. `all_gather` and `reduce_scatter` alone change
  nothing; the dimensions in the gather's variant are those of the generation's torus. tpu7x does both by default, v5e
  has no SparseCore, and on v4 the collectives remain synchronous.
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
"""By device kind (`ops/devices.py`); a generation that is not listed gets none."""


class FlagError(Ling2Error, ValueError):
  """XLA refuses a flag in compile_xla_flags."""


def compiler_options(config: Any, device: Any, given: Mapping[str, str]) -> dict[str, str]:
  """The options with which XLA compiles a step of a LING2 run: the generation's flags, overridden by the user's.

  Args:
    config: MaxText's config, with `tuned_xla_flags`.
    device: a device of the mesh, or of a topology without chips.
    given: the user's `compile_xla_flags`, parsed.

  Returns:
    {flag: value}, without flags in LIBTPU_INIT_ARGS. Off a TPU, or with `tuned_xla_flags=false`, only the user's.

  Raises:
    FlagError: XLA refuses a flag of the user's.
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
  """Those of `ours` that every process of the run uses: all must compile the same program.

  Args:
    flags: all flags of the generation, the same in every process.
    ours: those that this process uses.
  """
  if not flags or jax.process_count() == 1:
    return dict(ours)
  taken = multihost_utils.process_allgather(np.array([name in ours for name in flags])).all(axis=0)
  agreed = {name: value for (name, value), everywhere in zip(flags.items(), taken, strict=True) if everywhere}
  for name in ours.keys() - agreed.keys():
    _log(f"LING2: without the XLA flag {name}={ours[name]}: another process of this run refuses it or has its own value")
  return agreed


def _in_environment() -> set[str]:
  """Flags that the user gives to libtpu; compiler options would override them."""
  words = os.environ.get("LIBTPU_INIT_ARGS", "").split()
  return {word.lstrip("-").partition("=")[0] for word in words}


def _tuned(device: Any) -> dict[str, str]:
  """The flags of the device's generation that this libtpu accepts; the log names the others."""
  accepted = {}
  for name, value in _FLAGS.get(kind_of(device), {}).items():
    reason = refusal(device, name, value)
    if reason is None:
      accepted[name] = value
    else:
      _log(f"LING2: without the XLA flag {name}={value}: this libtpu refuses it for {device.device_kind} ({reason})")
  return accepted


_REFUSALS: Final[dict[tuple[str, str, str], str | None]] = {}
"""Results of `refusal` by device kind, flag and value: a process has one libtpu."""


def refusal(device: Any, name: str, value: str) -> str | None:
  """XLA's error when it compiles a small program with a flag for a device; None: it compiles."""
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
      raise  # not about the flag: a lost device, no memory
    return str(error).splitlines()[0]
  return None


@functools.cache
def _log(text: str) -> None:
  """Logs a line once per process: several steps are compiled with the same flags."""
  from maxtext.utils import max_logging

  max_logging.log(text)
