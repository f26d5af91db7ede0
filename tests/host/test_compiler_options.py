"""Options of XLA reach the step that runs, in one compilation; without options the step is MaxText's own object."""

import inspect
import json
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handlers import wrapped
from jax._src import compiler

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host.seams.compiler_options import CompilerOptionsSeam, StepWithOptions
from maxtext_ling2.training import xla_flags

FLAGS = {"xla_cpu_prefer_vector_width": "128", "xla_backend_optimization_level": "1"}
WORDS = " ".join(f"--{name}={value}" for name, value in FLAGS.items())


def config(**changes):
  """What MaxText's functions that make a step look at."""
  given = {"decoder_block": "ling2", "compile_xla_flags": WORDS, "compiled_trainstep_file": "", "enable_diloco": False}
  return types.SimpleNamespace(**given | changes)


def users(cfg, device, given):
  """The user's flags alone."""
  assert device in jax.devices()
  return dict(given)


@pytest.fixture
def compiled(monkeypatch):
  """The options of each compilation of a step, as the compiler gets them."""
  seen, original = [], compiler.compile_or_get_cached

  def spy(backend, module, devices, options, *args, **kwargs):
    if "step" in module.operation.attributes["sym_name"].value:
      seen.append(dict(options.env_option_overrides))
    return original(backend, module, devices, options, *args, **kwargs)

  monkeypatch.setattr(compiler, "compile_or_get_cached", spy)
  return seen


def train_step(model, cfg, state_shardings, params_shardings, state, batch):
  return state * 2 + batch.sum(), {"sum": batch.sum()}


def eval_step(model, cfg, state, batch):
  return (state * batch).sum()


class Steps:
  """MaxText's two functions that make steps, with the seam around them."""

  def __init__(self, cfg, options=users):
    from maxtext.utils import max_utils, maxtext_utils, train_utils

    seam = CompilerOptionsSeam(options)
    seam._parse = inspect.unwrap(max_utils.parse_libtpu_flags_to_dict)
    self.mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    self.sharding = jax.sharding.NamedSharding(self.mesh, jax.P())
    train, evaluate = (inspect.unwrap(getattr(train_utils, f"jit_{kind}_step")) for kind in ("train", "eval"))
    names = [f"get_functional_{kind}_with_signature" for kind in ("train", "eval")]
    own = {name: inspect.unwrap(getattr(maxtext_utils, name)) for name in names}
    with mock.patch.multiple(maxtext_utils, **own):  # without the seam that gives LING2 runs steps of their own
      self.train = wrapped(seam._jit, train)(
        cfg, None, None, self.sharding, self.sharding, train_step, None, mesh=self.mesh
      )
      self.evaluate = wrapped(seam._jit, evaluate)(
        cfg, None, state_mesh_shardings=self.sharding, data_sharding=self.sharding, eval_step=eval_step
      )

  def array(self, size):
    return jax.device_put(jnp.arange(float(size)), self.sharding)

  def shape(self, size):
    return jax.ShapeDtypeStruct((size,), jnp.float32, sharding=self.sharding)


def test_what_is_compiled_to_print_memory_is_what_runs(compiled):
  steps = Steps(config())
  with jax.set_mesh(steps.mesh):
    state = steps.array(5)
    ahead = steps.train.lower(state, steps.shape(5)).compile(compiler_options=dict(FLAGS))
    assert ahead.memory_analysis().output_size_in_bytes > 0
    new, metrics = steps.train(state, steps.array(5))
    steps.train(new, steps.array(5))
  assert compiled == [FLAGS]
  assert metrics["sum"] == 10 and state.is_deleted()  # donated, as in MaxText


def test_further_options_of_the_caller_act(compiled):
  steps = Steps(config())
  with jax.set_mesh(steps.mesh):
    steps.train.lower(steps.array(5), steps.shape(5)).compile(
      compiler_options=FLAGS | {"xla_backend_optimization_level": "2"}
    )
  assert compiled == [FLAGS | {"xla_backend_optimization_level": "2"}]


def test_another_shape_is_compiled_with_the_same_options(compiled):
  steps = Steps(config())
  with jax.set_mesh(steps.mesh):
    for size in (5, 6, 6):
      new, _ = steps.train(steps.array(size), steps.array(3))
      np.testing.assert_array_equal(new, np.arange(size) * 2.0 + 3)
  assert compiled == [FLAGS, FLAGS]


def test_the_eval_step_too(compiled):
  steps = Steps(config())
  with jax.set_mesh(steps.mesh):
    steps.evaluate.lower(steps.shape(4), steps.shape(4)).compile(compiler_options=dict(FLAGS))
    assert steps.evaluate(steps.array(4), steps.array(4)) == 14
  assert compiled == [FLAGS]


def test_maxtext_can_still_look_through():
  step = Steps(config()).train
  assert isinstance(step, StepWithOptions)
  assert inspect.unwrap(step).func is train_step  # `dump_jaxpr` traces what is wrapped
  assert step.lower(jnp.zeros(2), jnp.zeros(2)).as_text().startswith("module @jit_train_step")


@pytest.mark.parametrize(
  "changes",
  [{"decoder_block": "llama2"}, {"compile_xla_flags": ""}, {"compile_xla_flags": "", "decoder_block": "llama2"}],
  ids=str,
)
def test_otherwise_the_step_is_maxtexts_own(compiled, changes):
  steps = Steps(config(**changes))
  assert type(steps.train) is type(steps.evaluate) is type(jax.jit(len))
  with jax.set_mesh(steps.mesh):
    steps.train(steps.array(5), steps.array(5))
    steps.evaluate(steps.array(5), steps.array(5))
  assert compiled == [{}, {}]


def test_a_step_from_elsewhere_is_left_alone():
  def never(*_):
    raise AssertionError("asked for options")

  def jit_train_step(config, data_sharding):
    return "MaxText's"

  seam = CompilerOptionsSeam(never)
  for changes in ({"compiled_trainstep_file": "step.bin"}, {"enable_diloco": True}):
    assert wrapped(seam._jit, jit_train_step)(config(**changes), data_sharding=None) == "MaxText's"


def test_a_maxtext_that_does_not_jit_there_is_refused():
  def jit_train_step(config, data_sharding):
    return None

  seam = CompilerOptionsSeam(users)
  seam._parse = lambda text: FLAGS
  sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), jax.P())
  with pytest.raises(Ling2Error, match=r"jit_train_step called jax.jit 0 times.*xla_cpu_prefer_vector_width"):
    wrapped(seam._jit, jit_train_step)(config(), sharding)


def test_ahead_of_time_the_parsed_flags_are_all_options():
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  parsed = {"a": "1"}
  seam = CompilerOptionsSeam(lambda cfg, device, given: {"first": device.platform} | given)

  def parse(flags_str):
    return dict(parsed)

  def jit_and_compile(func, mesh, config):
    return seam._parse_ahead_of_time(parse, config.compile_xla_flags)

  assert jit_and_compile(None, mesh, config()) == {"first": "cpu", "a": "1"}
  assert jit_and_compile(None, mesh, config(decoder_block="llama2")) == parsed
  assert seam._parse_ahead_of_time(parse, WORDS) == parsed  # from anywhere else


RUN = Path(__file__).with_name("counted_run.py")
COMMANDS = "maxtext.trainers.pre_train."


def counted(command, folder, *words):
  """(name and options of each compilation of a step, all that was printed), of a very small LING2."""
  run = subprocess.run([sys.executable, RUN, command, folder, *words], capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr[-3000:]
  lines = [line.removeprefix("COMPILED ") for line in run.stdout.splitlines() if line.startswith("COMPILED ")]
  return [json.loads(line) for line in lines], run.stdout + run.stderr


@pytest.mark.slow
def test_a_run_compiles_each_step_once_with_the_flags(tmp_path):
  steps, printed = counted(f"{COMMANDS}train", tmp_path, f"compile_xla_flags={WORDS}")
  assert steps == [["jit_train_step", FLAGS], ["jit_eval_step", FLAGS]]
  assert "LING2: XLA flags" not in printed  # ours are for TPUs


@pytest.mark.slow
@pytest.mark.parametrize("command", [f"{COMMANDS}train_compile", "plan"])
def test_ahead_of_time_the_flags_are_those_of_the_topology(tmp_path, command):
  threshold = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
  words = ("compile_topology=v5p-8", "compile_topology_num_slices=1", "hardware=tpu")
  steps, _ = counted(command, tmp_path, *words, f"compile_xla_flags=--{threshold}=5")
  assert steps == [["jit_train_step", xla_flags._FLAGS["TPU v5"] | {threshold: "5"}]]
