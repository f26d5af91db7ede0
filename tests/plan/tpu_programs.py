"""Compiles small programs for TPUs that are not here, and prints {name: the text of its HLO} as JSON.

A process of its own, because libtpu reads its settings once. Four v5e chips, or one chip of a v5p.
"""

import json
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

P = jax.P
F32 = jnp.float32


def array(*shape, dtype=F32):
  return jax.ShapeDtypeStruct(shape, dtype)


def scan(x, weights):
  """Ten products of [256, 512] by [512, 512], one after the other."""
  return jax.lax.scan(lambda x, weight: (x @ weight, None), x, weights)[0]


def cond(first, x, weight):
  """One product, or three."""
  return jax.lax.cond(first, lambda: jnp.sin(x @ weight @ weight @ weight), lambda: x @ weight)


def batched(x, y):
  """Sixteen products of [64, 128] by [128, 256]."""
  return jnp.einsum("bij,bjk->bik", x, y)


def mapped(function, in_specs, out_specs):
  return lambda *args: jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


def exchange(rows, room, offsets, sizes):
  """Rows that each device has for each other one."""
  return jax.lax.ragged_all_to_all(rows, room, offsets, sizes, offsets, sizes, axis_name="d")


def grouped(lhs, rhs, sizes):
  """A grouped product with tiles (128, 256, 256)."""
  from maxtext.kernels.megablox import backend

  return backend.gmm(lhs, rhs, sizes, jnp.bfloat16, (128, 256, 256))


def grouped_gradient(lhs, rhs, sizes):
  """The gradient of its weights."""
  from maxtext.kernels.megablox import backend

  return backend.tgmm(lhs.swapaxes(0, 1), rhs, sizes, jnp.bfloat16, (128, 512, 256))


def grouped_v2(lhs, rhs, sizes):
  """The second version, with the transposed weights that its gradient uses."""
  from maxtext.kernels.megablox import pallas_mosaic_tpu_v2_gmm_kernel as kernel

  tiles = kernel.TileSizes(128, 512, 256)
  return kernel.gmm_v2(
    lhs=lhs, rhs=rhs.swapaxes(1, 2), group_sizes=sizes, tile_info=tiles, preferred_element_type=jnp.bfloat16
  )


BF16 = {"dtype": jnp.bfloat16}
SIZES = array(8, dtype=jnp.int32)
FOUR = {
  "scan": (scan, (array(256, 512), array(10, 512, 512))),
  "cond": (cond, (array(dtype=jnp.bool_), array(1024, 1024), array(1024, 1024))),
  "batched": (batched, (array(16, 64, 128), array(16, 128, 256))),
  "gather": (mapped(lambda x: jax.lax.all_gather(x, "d", tiled=True), P("d"), P()), (array(8192, 8192),)),
  "reduce": (mapped(lambda x: jax.lax.psum(x, "d"), P("d"), P()), (array(4096, 4096),)),
  "scatter": (
    mapped(lambda x: jax.lax.psum_scatter(x, "d", tiled=True), P(None, "d"), P("d", None)),
    (array(4096, 4096),),
  ),
  "exchange": (
    mapped(exchange, (P("d"), P("d"), P("d"), P("d")), P("d")),
    (array(4 * 1024, 512), array(4 * 4096, 512), array(16, dtype=jnp.int32), array(16, dtype=jnp.int32)),
  ),
}
ONE = {
  "grouped": (grouped, (array(1024, 512, **BF16), array(8, 512, 256, **BF16), SIZES)),
  "grouped_gradient": (grouped_gradient, (array(1024, 512, **BF16), array(1024, 256, **BF16), SIZES)),
  "grouped_v2": (grouped_v2, (array(1024, 512, **BF16), array(8, 256, 512, **BF16), SIZES)),
}


def compiled(programs, topology, devices, sharded=("gather", "reduce", "scatter", "exchange")):
  found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:devices]
  mesh = jax.sharding.Mesh(np.array(found), ("d",))
  with jax.set_mesh(mesh):
    for name, (function, arguments) in programs.items():
      shardings = {} if name in sharded else {"in_shardings": jax.NamedSharding(mesh, P())}
      yield name, jax.jit(function, **shardings).trace(*arguments).lower().compile().as_text()


def main():
  texts = dict(compiled(FOUR, "v5e:2x2", 4)) | dict(compiled(ONE, "v5p:2x2x1", 1))
  json.dump(texts, sys.stdout)


if __name__ == "__main__":
  main()
