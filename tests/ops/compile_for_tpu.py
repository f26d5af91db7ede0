"""Compiles GLA and the fused norms ahead of time for a TPU that is not there.

`python compile_for_tpu.py CHIP` prints {program: its kernels}.

A process of its own, because libtpu reads its settings once, and not every machine lets two processes load it.
"""

import json
import os
import re
import sys
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tpu_static import one_device
from maxtext_ling2.ops.fused_norm import grouped_rms_norm_gated, qk_norm_rope
from maxtext_ling2.ops.gla import gla

PROGRAMS = {  # dtype, T, H, D, Dv
  "as in LING2": (jnp.bfloat16, 4096, 16, 128, 128),
  "a short, odd shape": (jnp.bfloat16, 77, 3, 96, 40),
  "float32, beyond the last step": (jnp.float32, 2100, 6, 128, 128),
  "wide heads": (jnp.float32, 600, 2, 512, 256),
}
NORMS = {  # dtype, T, H, D, groups
  "norms as in LING2": (jnp.bfloat16, 4096, 16, 128, 4),
  "norms, an odd length": (jnp.float32, 77, 3, 128, 3),
  "norms, wide heads, one group": (jnp.float32, 600, 5, 512, 1),
  "norms, two heads a block": (jnp.bfloat16, 300, 6, 64, 6),
  "norms, four heads a block": (jnp.float32, 77, 4, 32, 2),
}


def program(dtype, length, heads, dim, value_dim):
  """Two rematerialised layers in a scan, packed, with states and all gradients; and their arguments."""
  g = np.geomspace(-1e-3, -1, heads).astype(np.float32)

  def layer(state, _, q, k, v, ids):
    o, state = gla(q, k, v, g, segment_ids=ids, initial_state=state, output_final_state=True)
    return state, o.astype(jnp.float32).sum()

  def loss(q, k, v, state, ids):
    state, sums = jax.lax.scan(jax.checkpoint(lambda s, x: layer(s, x, q, k, v, ids)), state, length=2)
    return sums.sum() + state.sum() + gla(q, k, v, g)[0].astype(jnp.float32).sum()

  key, value = (jax.ShapeDtypeStruct((2, length, heads, size), dtype) for size in (dim, value_dim))
  state = jax.ShapeDtypeStruct((2, heads, dim, value_dim), jnp.float32)
  ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
  return jax.value_and_grad(loss, (0, 1, 2, 3)), (key, key, value, state, ids)


def norms_program(dtype, length, heads, dim, groups):
  """Norm, rotation, norm and gate in a row, rematerialised, with all gradients; and their arguments."""

  def loss(x, gate, scale, output_scale, cos, sin):
    y = qk_norm_rope(x, scale, cos, sin, rotated=dim // 2, epsilon=1e-6)
    y = grouped_rms_norm_gated(y, gate, output_scale, groups=groups, epsilon=1e-6)
    return jnp.sum(jnp.square(y.astype(jnp.float32)))

  x = jax.ShapeDtypeStruct((2, length, heads * dim), dtype)
  scale, output_scale = (jax.ShapeDtypeStruct((size,), jnp.float32) for size in (dim, heads * dim))
  table = jax.ShapeDtypeStruct((2, length, dim), jnp.float32)
  return jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2, 3)), (x, x, scale, output_scale, table, table)


def main(chip):
  mesh = one_device(chip)
  sharding = jax.NamedSharding(mesh, jax.P())
  found = {}
  programs = {name: program(*shape) for name, shape in PROGRAMS.items()}
  programs |= {name: norms_program(*shape) for name, shape in NORMS.items()}
  for name, (function, args) in programs.items():
    with jax.set_mesh(mesh):
      compiled = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*args).compile()
    names = re.findall(r"%(\w+?)[.\d]*(?:\.\w+)? = [^\n]*tpu_custom_call", compiled.as_text())
    found[name] = sorted(set(names))
  print("KERNELS " + json.dumps(found))


if __name__ == "__main__":
  main(sys.argv[1])
