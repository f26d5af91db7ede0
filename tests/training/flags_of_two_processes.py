"""One of two processes that choose XLA flags and run one program with them. Arguments: its number, the port."""

import json
import sys
import types

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from maxtext_ling2.training import xla_flags

FLAGS = {"xla_cpu_prefer_vector_width": "128", "xla_backend_optimization_level": "1", "xla_of_another_version": "1"}


def main(number: int, port: str) -> None:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
  lines: list[str] = []
  xla_flags._FLAGS = {"cpu": FLAGS}
  xla_flags._log = lines.append
  config = types.SimpleNamespace(tuned_xla_flags=True)
  options = xla_flags.compiler_options(config, jax.local_devices()[0], {})
  mesh = jax.make_mesh((jax.device_count(),), ("all",))
  sharding = jax.sharding.NamedSharding(mesh, jax.P("all"))
  x = multihost_utils.host_local_array_to_global_array(
    jnp.full(jax.local_device_count(), number + 1.0), mesh, jax.P("all")
  )
  total = jax.jit(jnp.sum, in_shardings=sharding, compiler_options=options)(x)
  print("FOUND " + json.dumps([options, float(total), lines]))


main(int(sys.argv[1]), sys.argv[2])
