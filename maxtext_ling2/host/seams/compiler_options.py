"""Seam: the options with which XLA compiles the train and eval step, those of `compile_xla_flags` among them.

MaxText's trainer gives `compile_xla_flags` to a program that it compiles only to print its memory. The step that runs is
compiled a second time, by `jax.jit`, without them (docs/upstream_patch.md). Here `jax.jit` gets the options, and what the
trainer compiles beforehand is compiled with the same, so that JAX finds that program again when the step is called. Where
there are no options, the step is MaxText's own object.

`train_compile` makes a step of its own, and may run as `__main__`. There the parsed flags are extended: whoever asks
`parse_libtpu_flags_to_dict` from within `jit_and_compile` gets all options. Mesh and config are read off that frame.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

from maxtext_ling2.configs.validation import is_ling2
from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host.contract import CommandExpectation, Expectation
from maxtext_ling2.host.patches import Call, running
from maxtext_ling2.host.seam import Seam, Use

_TRAIN = "maxtext.utils.train_utils"
_FLAGS = "maxtext.utils.max_utils"
_AHEAD_OF_TIME = "maxtext.trainers.pre_train.train_compile"
_COMPILES = "jit_and_compile"

Options = Callable[[Any, Any, Mapping[str, str]], dict[str, str]]


def _is_jax(value: Any) -> bool:
  import jax

  return value is jax


def _calls_jit(function: Any) -> bool:
  return {"jax", "jit"} <= set(inspect.unwrap(function).__code__.co_names)


def _asks_for_flags(function: Any) -> bool:
  return "parse_libtpu_flags_to_dict" in function.__code__.co_names


class CompilerOptionsSeam(Seam):
  """Compiles the steps of LING2 runs with options.

  Args:
    options: `options(config, device, flags)` returns the options for a step on a mesh with that device, from those that
      the user sets.
  """

  name = "compiler options"
  module = _TRAIN
  use = Use(
    "tuned_xla_flags=true or compile_xla_flags",
    lambda config: config.tuned_xla_flags or config.compile_xla_flags,
    "set tuned_xla_flags=false and leave compile_xla_flags out",
  )
  expectations = (
    *(
      Expectation(
        f"{_TRAIN}:{name}", parameters=("config", "data_sharding"), holds=_calls_jit, meaning="which calls jax.jit"
      )
      for name in ("jit_train_step", "jit_eval_step")
    ),
    Expectation(f"{_TRAIN}:jax", holds=_is_jax, meaning="the module jax"),
    Expectation(f"{_FLAGS}:parse_libtpu_flags_to_dict", parameters=("flags_str",)),
    CommandExpectation(
      f"{_AHEAD_OF_TIME}:{_COMPILES}",
      parameters=("mesh", "config"),
      holds=_asks_for_flags,
      meaning="which calls parse_libtpu_flags_to_dict",
    ),
  )

  def __init__(self, options: Options):
    super().__init__()
    self.options = options

  def apply(self) -> None:
    from maxtext.utils import max_utils, train_utils

    self._parse = max_utils.parse_libtpu_flags_to_dict
    self.patches.wrap_for_ling2(train_utils, "jit_train_step", self._jit)
    self.patches.wrap_for_ling2(train_utils, "jit_eval_step", self._jit)
    self.patches.wrap(max_utils, "parse_libtpu_flags_to_dict", self._parse_ahead_of_time)

  def _jit(self, call: Call) -> Any:
    import jax

    config = call.config
    # A program that comes from a file has its options; DiLoCo's step is MaxText's.
    if config.compiled_trainstep_file or config.enable_diloco:
      return call.original()
    mesh = jax.tree.leaves(call["data_sharding"])[0].mesh
    options = self.options(config, _device(mesh), self._parse(config.compile_xla_flags))
    return _jit_with(options, call) if options else call.original()

  def _parse_ahead_of_time(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    flags = original(*args, **kwargs)
    compiling = running(_COMPILES, ("mesh", "config"))
    if compiling is None or not is_ling2(compiling["config"]) or compiling["config"].enable_diloco:
      return flags
    return self.options(compiling["config"], _device(compiling["mesh"]), flags)


class StepWithOptions:
  """A jitted step that is compiled with its own options however it is compiled.

  Args:
    step: what `jax.jit(compiler_options=...)` returned.
    options: those options.
  """

  def __init__(self, step: Any, options: Mapping[str, str]):
    self._step = step
    self._options = options

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._step(*args, **kwargs)

  def lower(self, *args: Any, **kwargs: Any) -> "_Lowered":
    return _Lowered(self._step.lower(*args, **kwargs), self._options)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._step, name)


class _Lowered:
  """A lowered step. Its own options given to `compile` once more would make another program than its call looks for."""

  def __init__(self, lowered: Any, options: Mapping[str, str]):
    self._lowered = lowered
    self._options = options

  def compile(self, compiler_options: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    more = {name: value for name, value in (compiler_options or {}).items() if self._options.get(name) != value}
    return self._lowered.compile(**kwargs, **({"compiler_options": more} if more else {}))

  def __getattr__(self, name: str) -> Any:
    return getattr(self._lowered, name)


class _JaxWithOptions:
  """The module jax, but for options in every `jit`; counts them."""

  def __init__(self, options: Mapping[str, str]):
    self._options = dict(options)
    self.jitted = 0

  def jit(self, *args: Any, **kwargs: Any) -> Any:
    import jax

    self.jitted += 1
    return jax.jit(*args, **kwargs, compiler_options=self._options)

  def __getattr__(self, name: str) -> Any:
    import jax

    return getattr(jax, name)


def _jit_with(options: Mapping[str, str], call: Call) -> StepWithOptions:
  """What MaxText's function returns, jitted with options.

  Raises:
    Ling2Error: it did not call `jax.jit` once.
  """
  from maxtext.utils import train_utils

  with_options = _JaxWithOptions(options)
  with mock.patch.object(train_utils, "jax", with_options):
    step = call.original()
  if with_options.jitted != 1:
    raise Ling2Error(
      f"MaxText's {call.function.__name__} called jax.jit {with_options.jitted} times, not once: the step would be "
      f"compiled without the XLA flags {', '.join(options)}; set tuned_xla_flags=false and remove compile_xla_flags to "
      "run without"
    )
  return StepWithOptions(step, options)


def _device(mesh: Any) -> Any:
  """A device of a mesh, one that this process can compile for: one of its own, or any of a topology without chips."""
  import jax

  devices = list(mesh.devices.flat)
  process = jax.process_index()
  return next((device for device in devices if device.process_index == process), devices[0])
