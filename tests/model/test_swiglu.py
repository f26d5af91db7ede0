"""activations_in_float32: silu(gate) * up rounded once, in dense MLPs, shared and routed experts, whatever multiplies."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_quantization import equations

import tiny
from maxtext_ling2.maxtext_api import session

# Widths that tell the three apart: dense 48, shared 24, routed 16; one dense layer of three, and MTP's.
SMALL = {"base_num_decoder_layers": 3, "mtp_num_layers": 0, "dtype": "bfloat16", "matmul_precision": "default"}


def activations(**settings):
  """{(width, dtype): number} of the silu of a forward pass; not of the gates of linear attention and the router."""
  cfg = tiny.config(**SMALL, **settings)
  network, mesh = tiny.model(cfg)
  data = tiny.batch(cfg)
  graph, state = nnx.split(network)

  def run(state):
    arrays = (data[name] for name in ("inputs", "inputs_position", "inputs_segmentation"))
    return nnx.merge(graph, state, copy=True)(*arrays, enable_dropout=False)

  with session.model_context(cfg, mesh):
    jaxpr = jax.make_jaxpr(run)(state).jaxpr
  found = Counter()
  for equation, _ in equations(jaxpr):
    if equation.primitive.name == "logistic":
      result = equation.outvars[0].aval
      found[result.shape[-1], result.dtype.name] += 1
  return {key: number for key, number in found.items() if key[0] in (48, 24, 16)}


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("exact", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_all_three_kinds(sparse, exact, dtype):
  found = activations(sparse_matmul=sparse, activations_in_float32=exact)
  assert found == {(48, dtype): 1, (24, dtype): 2, (16, dtype): 2}


def test_rounded_once():
  network, _ = tiny.model(tiny.config(**SMALL, activations_in_float32=True))
  experts = network.decoder.layers_1.moe.MoeBlock_0
  gate, up = (jnp.asarray(np.random.default_rng(seed).standard_normal((64, 16)) * 3, jnp.bfloat16) for seed in (0, 1))
  exact = [np.asarray(x, np.float64) for x in (gate, up)]
  expected = exact[0] / (1 + np.exp(-exact[0])) * exact[1]
  found = np.asarray(experts.apply_ffn_activation(gate, up), np.float64)
  rounded = np.asarray(jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16), np.float64)
  # float32 may fall on the other side of a tie of bfloat16, which is one in 2^16.
  assert np.mean(found != rounded) < 0.01 and np.abs(found / expected - 1).max() < 2.0**-8
