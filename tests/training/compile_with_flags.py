"""Compiles small sharded programs for a TPU slice that is not there, with and without the flags of its generation.

`python compile_with_flags.py TOPOLOGY` (as MaxText names them, v5p-64) prints a line of JSON; with `--accepted` only what
became of the flags of one device. A process of its own, because libtpu reads its settings once.
"""

import collections
import json
import os
import re
import sys
import types
from pathlib import Path
from unittest import mock

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", DECOUPLE_GCLOUD="TRUE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from maxtext_ling2.training import xla_flags

TOKENS, WIDTH = 1024, 1024  # per device; of the square product
EXPERTS, ROWS, IN, OUT = 64, 16, 512, 256  # rows per expert and device


def devices(topology):
  from maxtext.utils.accelerator_to_spec_map import UserFacingNameToSystemCharacteristics

  spec = UserFacingNameToSystemCharacteristics[topology]
  slice_ = topologies.get_topology_desc(
    platform="tpu",
    topology_name=spec.topology_name,
    chip_config_name=spec.chip_config_name,
    chips_per_host_bounds=spec.chips_per_host_bounds,
    num_slices=1,
    wrap=spec.wrap,
  )
  return slice_.devices


def product(mesh):
  """(gradient of a product in its weights, arguments, specs): x [n T, K] by rows, w [K, N] by K."""
  shapes = ((WIDTH, WIDTH), jnp.bfloat16), ((mesh.size * TOKENS, WIDTH), jnp.bfloat16)
  return jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w).astype(jnp.float32))), shapes, jax.P("fsdp", None)


def experts(mesh):
  """The same for products of experts, whose weights [E, K, N] are gathered as they are in MaxText's MoE: whole."""
  spec = jax.P(None, "fsdp", None)

  @jax.shard_map(mesh=mesh, in_specs=(jax.P(), spec), out_specs=spec, check_vma=False)
  def layer(w, x):
    return jnp.einsum("emk,ekn->emn", jnp.tanh(x), w)

  def loss(w, x):
    return jnp.sum(jnp.square(layer(w.astype(jnp.bfloat16), x).astype(jnp.float32)))

  shapes = ((EXPERTS, IN, OUT), jnp.float32), ((EXPERTS, mesh.size * ROWS, IN), jnp.bfloat16)
  return jax.grad(loss), shapes, spec


def compile_program(make, mesh, options):
  """What a compiled program holds: {opcode: how often} of loops and collectives."""
  function, shapes, spec = make(mesh)
  sharding = jax.sharding.NamedSharding(mesh, spec)
  program = jax.jit(function, in_shardings=sharding, out_shardings=sharding, compiler_options=options)
  text = program.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile().as_text()
  names = re.findall(r" (while|all-gather|all-reduce|reduce-scatter|collective-permute-start|dynamic-slice)\(", text)
  names += ["on SparseCore"] * len(re.findall(r'custom-call-start\(\), async_execution_thread="sparsecore"', text))
  return dict(collections.Counter(names))


def options_of(device, **changes):
  """(the options for a device, the lines that the log gets)"""
  given = {"tuned_xla_flags": True, "given": {}} | changes
  said = []
  with mock.patch.object(xla_flags, "_log", said.append):
    config = types.SimpleNamespace(tuned_xla_flags=given["tuned_xla_flags"])
    return xla_flags.compiler_options(config, device, given["given"]), said


def accepted(device):
  """What becomes of the flags: plain, switched off, with a flag of the user, a bad one of the user, a bad one of ours."""
  unknown = {device.device_kind: {**xla_flags._FLAGS.get(device.device_kind, {}), "xla_of_another_libtpu": "true"}}
  try:
    refused = options_of(device, given={"xla_nonsense": "true"})
  except xla_flags.FlagError as error:
    refused = str(error)
  found = {"plain": options_of(device), "off": options_of(device, tuned_xla_flags=False), "refused": refused}
  found["user"] = options_of(device, given={"xla_jf_spmd_threshold_for_windowed_einsum_mib": "5"})
  with mock.patch.object(xla_flags, "_FLAGS", unknown):
    found["unknown"] = options_of(device)
  return found


def main(topology, *only):
  found = devices(topology)
  result = {"kind": found[0].device_kind, "accepted": accepted(found[0])}
  if not only:
    mesh = jax.sharding.Mesh(np.array(found), ("fsdp",))
    options = result["accepted"]["plain"][0]
    for make in (product, experts):
      result[make.__name__] = [compile_program(make, mesh, {}), compile_program(make, mesh, options)]
  print("FOUND " + json.dumps(result))


if __name__ == "__main__":
  main(*sys.argv[1:])
