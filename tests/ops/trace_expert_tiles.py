"""Traces ling2's routed experts and their gradients for TPUs that are not there, and prints the tiles of each kernel.

`python trace_expert_tiles.py CHIP [KEY=VALUE ...]` prints {"gmm | gmm_transposed | tgmm, K, N": [rows, k, n]}.

A process of its own, because libtpu reads its settings once, and not every machine lets two processes load it.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", DECOUPLE_GCLOUD="TRUE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies

from benchmarks.tpu_static import CHIPS
from maxtext_ling2.maxtext_api import session


def kernels(jaxpr):
  """The equations of Pallas kernels."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
      continue
    for value in equation.params.values():
      for item in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(item, "jaxpr", item)
        if hasattr(inner, "eqns"):
          yield from kernels(inner)


def product(equation):
  """(kernel, K, N)"""
  metadata = json.loads(dict(equation.params["metadata"])["xprof_metadata"])
  arrays = [x.aval for x in equation.invars if x.aval.dtype == jnp.bfloat16]
  result = equation.outvars[0].aval.shape
  kernel = "tgmm" if len(result) == 3 else "gmm_transposed" if metadata["transpose_rhs"] else "gmm"
  tiling = metadata["tiling"]
  return f"{kernel}, {arrays[0].shape[1]}, {result[-1]}", [tiling["tile_m"], tiling["tile_k"], tiling["tile_n"]]


def main(chip, *words):
  from maxtext_ling2.model.moe import RoutedMoE

  config = session.make_config(
    overrides=words, model_name="ling2", per_device_batch_size=4, megablox=True, base_num_decoder_layers=2
  )
  devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices
  sizes = [len(devices) if axis == "fsdp" else 1 for axis in config.mesh_axes]
  mesh = jax.sharding.Mesh(np.array(devices).reshape(sizes), config.mesh_axes)
  with session.model_context(config, mesh):
    graph, weights, rest = nnx.split(nnx.eval_shape(lambda: RoutedMoE(config, mesh, None, nnx.Rngs(0))), nnx.Param, ...)

    def loss(weights, x, rest):
      output, *_ = nnx.merge(graph, weights, rest)(x)
      return output.astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((len(devices), config.max_target_length, config.emb_dim), jnp.bfloat16)
    program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(weights, x, rest)
  print(json.dumps(dict(map(product, kernels(program.jaxpr)))))


if __name__ == "__main__":
  main(*sys.argv[1:])
