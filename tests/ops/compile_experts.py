"""Compiles the experts ahead of time for a TPU that is not there, as a layer of `ling2` calls them on one device.

`python compile_experts.py CHIP TOKENS` prints the kernels in the program of two rematerialised layers and all gradients.
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

from benchmarks.tpu_static import one_device
from maxtext_ling2.ops.experts import experts


def program(tokens, dtype=jnp.bfloat16, number=256, width=2048, hidden=512, k=8):
  """Two layers in a row, rematerialised, with all gradients; and their arguments."""

  def layer(x, *others):
    return x + experts(x, *others)

  def loss(x, indices, weights, *matrices):
    for _ in range(2):
      x = jax.checkpoint(layer)(x, indices, weights, *matrices)
    return jnp.sum(x.astype(jnp.float32))

  def array(*shape, of=dtype):
    return jax.ShapeDtypeStruct(shape, of)

  matrices = array(number, width, hidden), array(number, width, hidden), array(number, hidden, width)
  chosen = array(tokens, k, of=jnp.int32), array(tokens, k, of=jnp.float32)
  return jax.value_and_grad(loss, (0, 2, 3, 4, 5)), (array(tokens, width), *chosen, *matrices)


def main(chip, tokens):
  mesh = one_device(chip)
  sharding = jax.NamedSharding(mesh, jax.P())
  with jax.set_mesh(mesh):
    function, arguments = program(int(tokens))
    compiled = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*arguments).compile()
  text = compiled.as_text()
  print("KERNELS " + json.dumps(sorted(re.findall(r"%(\w+?)[.\d]*(?:\.\w+)? = [^\n]*tpu_custom_call", text))))
  if len(sys.argv) > 3:
    Path(sys.argv[3]).write_text(text)


if __name__ == "__main__":
  main(*sys.argv[1:3])
