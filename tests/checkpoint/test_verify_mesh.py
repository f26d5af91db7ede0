"""`maxtext-ling2 verify --mesh`: reading the mesh, padding the inputs, and the check itself on eight CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maxtext_ling2.maxtext_api.mesh import ONE_DEVICE, MeshError, MeshSpec

GOLDEN = Path(__file__).parent.parent / "golden"


def test_reading():
  mesh = MeshSpec.read("fsdp=2, expert=3,context=4")
  assert (mesh.devices, mesh.batch_shards, mesh.length) == (24, 6, 4)
  sizes = {"ici_fsdp_parallelism": 2, "ici_expert_parallelism": 3, "ici_context_parallelism": 4}
  assert mesh.settings() == sizes | {"context_parallel_load_balance": False}
  assert MeshSpec.read("tensor=2").settings() == {"ici_tensor_parallelism": 2}
  assert MeshSpec.read("") == ONE_DEVICE and ONE_DEVICE.devices == 1


@pytest.mark.parametrize(
  ("text", "why"),
  [
    ("fsp=2", "'fsp' is not an axis"),
    ("pipeline=2", "'pipeline' is not an axis"),
    ("fsdp=2,fsdp=2", "'fsdp' occurs twice"),
    ("fsdp=0", "fsdp has size '0'"),
    ("fsdp=-1", "fsdp has size '-1'"),
    ("fsdp", "fsdp has size ''"),
    ("fsdp=two", "fsdp has size 'two'"),
  ],
)
def test_what_is_no_mesh(text, why):
  with pytest.raises(MeshError, match=why):
    MeshSpec.read(text)


def test_padding():
  tokens = np.arange(15).reshape(3, 5)
  padded = MeshSpec.read("fsdp=2,context=4").pad(tokens, -100)
  assert padded.shape == (4, 8)
  np.testing.assert_array_equal(padded[:3, :5], tokens)
  assert (padded[3] == -100).all() and (padded[:, 5:] == -100).all()
  np.testing.assert_array_equal(ONE_DEVICE.pad(tokens, 0), tokens)


@pytest.mark.mesh
@pytest.mark.parametrize(
  ("mesh", "passes"), [pytest.param("context=4,tensor=2", True, marks=pytest.mark.slow), ("context=2", False)]
)
def test_the_command(mesh, passes):
  """Logits and gradients of a reference, with MTP, rows and tokens that the mesh does not divide; too few devices."""
  folder = GOLDEN / "trailing_mtp"
  command = ["verify", str(folder), "--reference", str(folder / "io_short.npz"), "--decay-offset", "1", "--mesh", mesh]
  command += ["--grads", str(folder / "grads_b1_short.npz"), "--rows", "1"]
  environment = dict(os.environ)
  if not passes:
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=3"
  done = subprocess.run(
    [sys.executable, "-m", "maxtext_ling2", *command], env=environment, capture_output=True, text=True
  )
  assert done.returncode == (0 if passes else 1), done.stderr[-3000:]
  if passes:
    assert "442 of 442 tensors within tolerance" in done.stdout
  else:
    assert "--mesh needs 2 devices, but JAX has 3" in done.stderr
