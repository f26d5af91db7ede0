"""A layer of linear attention with TPU kernels, in the interpreter, against the same layer in plain JAX."""

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import mesh_runs
from gla_layer import kernels, output_and_gradients, prompt_and_step

OPTIONS = {
  "as in LING2": {},
  "all dimensions rotated": {"partial_rotary_factor": 1.0},
  "no norm of q and k": {"use_qk_norm": False},
  "silu": {"use_linear_silu": True},
  "one group, offset 1": {"group_norm_size": 1, "gla_decay_layer_offset": 1},
  "heads of 32, groups of 64": {"head_dim": 32},  # four heads and two groups fill a register
  "heads of 24": {"head_dim": 24},  # nothing fills a register: plain JAX around the kernel
}


SLOW = tuple(OPTIONS)[1:5] + ("heads of 24",)
"""Whose kernels the tests of the ops have at every shape, too, or that have none around GLA's."""


@pytest.mark.parametrize(
  "options",
  [pytest.param(value, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, value in OPTIONS.items()],
)
def test_fused_is_the_plain_composition(options):
  with pltpu.force_tpu_interpret_mode():
    found = output_and_gradients("pallas", **options)
  expected = output_and_gradients("chunked", **options)
  assert set(found) == set(expected) and len(found) == (8 if options.get("use_qk_norm", True) else 6)
  for name, value in expected.items():
    assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name


@pytest.mark.slow
def test_fused_in_bfloat16_is_as_near_to_float32_as_the_plain_composition():
  with pltpu.force_tpu_interpret_mode():
    found = output_and_gradients("pallas", "bfloat16")
  plain, exact = output_and_gradients("chunked", "bfloat16"), output_and_gradients("chunked")
  for name, value in exact.items():
    ours, theirs = (np.linalg.norm(x[name] - value) / np.linalg.norm(value) for x in (found, plain))
    assert ours < 0.02 and ours < 1.1 * theirs + 1e-3, name


def test_fused_layer_is_made_of_kernels():
  """On a TPU; heads that fill no register leave only GLA's."""
  gla = {"gla_forward", "gla_backward"}
  stages = {"rotated_norm", "rotated_norm_gradient", "gated_norm", "gated_norm_gradient"}
  assert kernels("pallas") == gla | stages
  assert kernels("pallas", head_dim=32) == gla | stages
  assert kernels("pallas", head_dim=24) == gla
  assert kernels("chunked") == set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_layer_is_what_one_writes_at_first(dtype):
  """Modules in a row on [B, T, H, D], which the benchmark measures against and which shares no stage with the layer."""
  from benchmarks.layer_cases import PlainComposition

  found = output_and_gradients("chunked", dtype)
  expected = output_and_gradients("chunked", dtype, kind=PlainComposition)
  assert set(found) == set(expected)
  for name, value in expected.items():
    error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
    assert error < {"float32": 1e-5, "bfloat16": 0.02}[dtype], name


MESHES = (
  {"fsdp": 2, "context": 2, "tensor": 2},  # batch, sequence and heads
  {"expert": 2, "tensor": 4},  # two groups on four devices
)


@pytest.mark.mesh
@pytest.mark.slow
@pytest.mark.parametrize("meshes", [MESHES[:1], MESHES[1:]], ids=str)
def test_fused_on_a_mesh_is_the_plain_composition_on_one_device(tmp_path, meshes):
  """Each device has kernels for its part."""
  cases = []
  for mesh in meshes:
    sizes = {f"ici_{axis}_parallelism": size for axis, size in mesh.items()}
    cases.append(("gla_layer", {"backend": "pallas", "context_parallel_load_balance": False, **sizes}))
  # In a process of its own, too: other tests here set JAX's random generator, from which the weights come.
  (expected,) = mesh_runs.run(tmp_path, 1, [("gla_layer", {"backend": "chunked"})])
  for mesh, found in zip(meshes, mesh_runs.run(tmp_path, 8, cases), strict=True):
    assert set(found) == set(expected)
    for name, value in expected.items():
      assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), (mesh, name)


def test_fused_prefill_is_the_plain_composition():
  """Of padded prompts: outputs where there are tokens, the state that decoding goes on from, and its first step."""
  with pltpu.force_tpu_interpret_mode():
    found = prompt_and_step("pallas")
  expected = prompt_and_step("chunked")
  for name, value in expected.items():
    assert np.abs(value).max() > 0.01, name
    assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name
