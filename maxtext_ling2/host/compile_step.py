"""MaxText's train step compiled ahead of time, by MaxText's own `train_compile`, on a machine without the chips."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.maxtext_api import start
from maxtext_ling2.maxtext_api.start import ConfigError


class OutOfMemoryError(Ling2Error):
  """The program does not fit the memory of a chip; the text is the compiler's."""


class CompilerError(Ling2Error):
  """The program cannot be traced or compiled for these chips; the text is MaxText's, a kernel's, XLA's or Mosaic's."""


# "memory space hbm", "exceeds available HBM", "of 31.25G hbm"; not a kernel that overflows its own memory (vmem, smem).
_OUT_OF_HBM = re.compile(r"space hbm|available hbm|[\d.]+[KMG] (?:of )?hbm", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """A compiled train step.

  Attributes:
    config: MaxText's config.
    compiled: JAX's compiled program.
    tflops: of a step and device, as MaxText counts them for its MFU.
  """

  config: Any
  compiled: Any
  tflops: float


def compile_step(yml: str, words: Sequence[str]) -> CompiledStep:
  """Compiles a train step; what MaxText prints goes to stderr, and environment variables that it sets are reset.

  Args:
    yml: the base YAML file.
    words: KEY=VALUE settings of MaxText, compile_topology among them.

  Raises:
    OutOfMemoryError: it does not fit.
    CompilerError: it cannot be compiled for these chips.
    ConfigError: MaxText refuses the settings, or the mesh does not fit the topology.
  """
  start.set_environment()
  with contextlib.redirect_stdout(sys.stderr):
    from maxtext.trainers.pre_train import train_compile
    from maxtext.utils import maxtext_utils

  seen: list[tuple[Any, Any]] = []
  original = train_compile.jit_and_compile

  def keep(*args: Any) -> Any:
    *_, config, _ = args
    compiled = _made(original, args)
    seen.append((config, compiled))
    return compiled

  with mock.patch.object(train_compile, "jit_and_compile", keep), contextlib.redirect_stdout(sys.stderr):
    with _named_errors(yml), _same_environment():
      train_compile.main(["train_compile", yml, *words])
    config, compiled = seen[-1]
    total, _, _ = maxtext_utils.calculate_tflops_training_per_device(config, log=False)
  return CompiledStep(config, compiled, total)


def read_config(yml: str, words: Sequence[str]) -> Any:
  """MaxText's config of a step that `compile_step` would compile; environment variables that it sets are reset.

  Args: as for `compile_step`.

  Raises:
    ConfigError: MaxText refuses the settings.
  """
  start.set_environment()
  with contextlib.redirect_stdout(sys.stderr):
    from maxtext.configs import pyconfig

  with contextlib.redirect_stdout(sys.stderr), _named_errors(yml), _same_environment():
    return pyconfig.initialize(["train_compile", yml, *words])


def make_mesh(yml: str, words: Sequence[str]) -> dict[str, int]:
  """The size of each axis of the mesh of a step that `compile_step` would compile; nothing is compiled.

  Args: as for `compile_step`.

  Raises:
    ConfigError: MaxText refuses the settings, or the mesh does not fit the topology.
  """
  config = read_config(yml, words)
  with contextlib.redirect_stdout(sys.stderr):
    from maxtext.trainers.pre_train import train_compile

  with contextlib.redirect_stdout(sys.stderr), _named_errors(yml), _same_environment():
    return dict(train_compile.get_topology_mesh(config).shape)


def _made(compile_program: Callable[..., Any], args: Sequence[Any]) -> Any:
  """What `compile_program` returns; that it refuses the program, not the settings, is a CompilerError."""
  try:
    return compile_program(*args)
  except Ling2Error:
    raise
  except (ValueError, AssertionError, NotImplementedError) as error:  # such as a kernel that does not know a width
    raise CompilerError(str(error) or type(error).__name__) from error


def _same_environment() -> contextlib.AbstractContextManager[Any]:
  """Resets what MaxText sets: XLA_FLAGS, from dump_hlo_xla_flags, and LIBTPU_INIT_ARGS, which grows with each step.

  A second config of a process would differ from the first, or be refused because XLA_FLAGS is set.
  """
  return mock.patch.dict(os.environ)


@contextlib.contextmanager
def _named_errors(yml: str) -> Iterator[None]:
  """Turns errors of MaxText and the compiler into those of this module."""
  import yaml

  try:
    with start.refusals():
      yield
  except Ling2Error:
    raise
  except (ValueError, AssertionError, NotImplementedError) as error:  # the last: a mesh that its chips cannot form
    raise ConfigError(f"MaxText refuses this configuration: {error}") from error
  except (yaml.YAMLError, FileNotFoundError, RecursionError) as error:
    raise ConfigError(
      f"{yml}: MaxText cannot read it and the files that it inherits from ({error}); correct it, base_config first"
    ) from error
  except Exception as error:
    if _OUT_OF_HBM.search(str(error)):
      raise OutOfMemoryError(str(error)) from error
    if type(error).__name__ == "JaxRuntimeError":  # no import of JAX for it: a refused config needs none
      raise CompilerError(str(error)) from error
    raise
