"""XLA flags by TPU generation: what libtpu makes of them, without a TPU, and what becomes of one that it refuses."""

import functools
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from maxtext_ling2.training import xla_flags

THRESHOLD = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"


@functools.cache
def compiled(topology, *only):
  """What compile_with_flags.py prints."""
  script = Path(__file__).with_name("compile_with_flags.py")
  run = subprocess.run([sys.executable, script, topology, *only], capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr[-3000:]
  (line,) = (line for line in run.stdout.splitlines() if line.startswith("FOUND "))
  return json.loads(line.removeprefix("FOUND "))


def test_off_a_tpu_nothing_is_compiled_and_nothing_is_on(monkeypatch):
  monkeypatch.setattr(xla_flags, "_compile_with", lambda *_: pytest.fail("compiled"))
  config = types.SimpleNamespace(tuned_xla_flags=True)
  assert xla_flags.compiler_options(config, jax.devices()[0], {}) == {}
  gpu = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu")
  assert xla_flags.compiler_options(config, gpu, {}) == {}


def test_a_flag_of_the_user_that_xla_refuses_is_named():
  config = types.SimpleNamespace(tuned_xla_flags=True)
  with pytest.raises(
    xla_flags.FlagError, match=r"compile_xla_flags: XLA for cpu refuses --xla_nonsense=1 .*'xla_nonsense'"
  ):
    xla_flags.compiler_options(config, jax.devices()[0], {"xla_nonsense": "1"})
  good = {"xla_cpu_prefer_vector_width": "128"}
  assert xla_flags.compiler_options(config, jax.devices()[0], good) == good


def test_the_offload_has_the_dimensions_of_the_torus():
  found = {kind: {name.removeprefix(OFFLOAD) for name in flags} for kind, flags in xla_flags._FLAGS.items()}
  both = {"all_gather", "reduce_scatter", "nd_reduce_scatter"}
  assert found == {
    "TPU v4": {THRESHOLD},
    "TPU v5": {THRESHOLD, "3d_all_gather"} | both,
    "TPU v6 lite": {"2d_all_gather"} | both,
  }


def test_of_which_libtpu_refuses_none():
  found = compiled("v5p-8", "--accepted")["accepted"]
  options, (line,) = found["plain"]
  assert options == xla_flags._FLAGS["TPU v5"]
  assert line.startswith(f"LING2: XLA flags for TPU v5: {THRESHOLD}=1000000, {OFFLOAD}all_gather=true, ")
  assert line.endswith(" (tuned_xla_flags=false turns them off)")


def test_one_that_libtpu_refuses_is_dropped_by_name():
  found = compiled("v5p-8", "--accepted")["accepted"]
  options, (dropped, on) = found["unknown"]
  assert options == found["plain"][0] and on == found["plain"][1][0]
  assert dropped.startswith("LING2: without the XLA flag xla_of_another_libtpu=true: this libtpu refuses it for TPU v5 (")
  assert "No such compile option: 'xla_of_another_libtpu'" in dropped


def test_the_users_flag_wins():
  options, (line,) = compiled("v5p-8", "--accepted")["accepted"]["user"]
  assert options == xla_flags._FLAGS["TPU v5"] | {THRESHOLD: "5"}
  assert THRESHOLD not in line and f"{OFFLOAD}all_gather=true" in line


def test_one_setting_turns_them_off():
  assert compiled("v5p-8", "--accepted")["accepted"]["off"] == [{}, []]


def test_the_users_bad_flag_is_named_for_a_tpu():
  text = compiled("v5p-8", "--accepted")["accepted"]["refused"]
  assert text.startswith("compile_xla_flags: XLA for TPU v5 refuses --xla_nonsense=true (")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p-64", "v6e-64"])
def test_gradients_of_experts_are_scattered_and_everything_is_asynchronous(topology):
  without, with_flags = compiled(topology)["experts"]
  assert without == {"all-gather": 1, "all-reduce": 1, "dynamic-slice": 1}
  assert with_flags == {"all-gather": 1, "reduce-scatter": 1, "on SparseCore": 2}


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p-64", "v4-64"])
def test_no_windowed_einsum(topology):
  without, with_flags = compiled(topology)["product"]
  assert without["while"] == 2 and without["collective-permute-start"] == 10
  assert "while" not in with_flags and "collective-permute-start" not in with_flags


@pytest.mark.slow
def test_v6e_makes_none():
  for program in compiled("v6e-64")["product"]:
    assert "while" not in program and "collective-permute-start" not in program


def test_two_processes_take_the_same_flags():
  """The second one has a flag of the user's in LIBTPU_INIT_ARGS, which the first does not know: neither takes ours."""
  script = Path(__file__).with_name("flags_of_two_processes.py")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  root = str(Path(__file__).parents[2])
  own = ({}, {"LIBTPU_INIT_ARGS": "--xla_backend_optimization_level=3"})
  started = [
    subprocess.Popen(
      [sys.executable, script, str(number), port],
      env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), **more},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number, more in enumerate(own)
  ]
  outputs = [process.communicate(timeout=300) for process in started]
  found = []
  for process, (printed, errors) in zip(started, outputs, strict=True):
    assert process.returncode == 0, errors[-3000:]
    (line,) = (line for line in printed.splitlines() if line.startswith("FOUND "))
    found.append(json.loads(line.removeprefix("FOUND ")))
  devices = sum(1 for _ in jax.devices())
  for options, total, _ in found:
    assert options == {"xla_cpu_prefer_vector_width": "128"}
    assert total == devices * (1 + 2)
  lost = "LING2: without the XLA flag xla_backend_optimization_level=1: another process of this run"
  assert [any(line.startswith(lost) for line in lines) for _, _, lines in found] == [True, False]
  for _, _, lines in found:
    assert any(
      line.startswith("LING2: without the XLA flag xla_of_another_version=1: this libtpu refuses") for line in lines
    )
