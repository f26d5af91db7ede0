"""Qwix quantises the projections of every layer, scanned or not, and nothing else."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from maxtext.layers import quantizations

import tiny
from maxtext_ling2.maxtext_api import session

INT8 = {"quantization": "int8", "use_qwix_quantization": True, "quantization_local_shard_count": 1}
INT8 |= {"remat_policy": "none"}


def quantized(**settings):
  """(config, mesh, the model as MaxText's trainer quantises it)"""
  cfg = tiny.config(**INT8 | settings)
  network, mesh = tiny.model(cfg)
  with session.model_context(cfg, mesh):
    return cfg, mesh, quantizations.maybe_quantize_model(network, cfg)


def equations(jaxpr, times=1):
  """(equation, how often it runs) of a program."""
  for equation in jaxpr.eqns:
    yield equation, times
    again = times * equation.params["length"] if equation.primitive.name == "scan" else times
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))):
      if isinstance(value, core.ClosedJaxpr):
        yield from equations(value.jaxpr, again)
      elif isinstance(value, core.Jaxpr):
        yield from equations(value, again)


def products(**settings):
  """{(shapes of both operands): number} of the int8 products of a forward pass."""
  cfg, mesh, network = quantized(**settings)
  data = tiny.batch(cfg)
  graph, params, rest = nnx.split(network, nnx.Param, ...)

  def loss(params):
    model = nnx.merge(graph, params, rest, copy=True)
    return model(data["inputs"], data["inputs_position"], data["inputs_segmentation"], enable_dropout=False).sum()

  with session.model_context(cfg, mesh):
    jaxpr = jax.make_jaxpr(loss)(params).jaxpr
  found = Counter()
  for equation, times in equations(jaxpr):
    if equation.primitive.name == "dot_general" and {v.aval.dtype for v in equation.invars} == {jnp.dtype("int8")}:
      found[tuple(sorted(v.aval.shape for v in equation.invars))] += times
  return found


@pytest.fixture(scope="module")
def unscanned():
  return products(mtp_num_layers=0)


def test_scanned_layers_are_quantised_as_unscanned_ones(unscanned):
  scanned = products(mtp_num_layers=0, scan_layers=True)
  assert scanned == unscanned
  assert unscanned.total() > 40


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_only_projections_are_quantised(unscanned, backend):
  """No operand is a rotation's permutation [4, 4], a state of linear attention [.., 8, 8] or the router's [32, 8]."""
  found = unscanned if backend == "chunked" else products(mtp_num_layers=0, gla_backend=backend)
  assert found == unscanned
  assert not [shapes for shapes in found if any(shape[-2:] in ((4, 4), (8, 8), (32, 8)) for shape in shapes)]


@pytest.mark.slow  # Qwix runs each model operation by operation
def test_quantised_logits_are_near_the_exact_ones():
  logits = []
  for settings in (INT8, {"quantization": ""}, INT8 | {"scan_layers": True}):
    cfg, mesh, network = quantized(**{"mtp_num_layers": 0} | settings)
    data = tiny.batch(cfg)
    graph, state = nnx.split(network)
    arrays = [data[name] for name in ("inputs", "inputs_position", "inputs_segmentation")]
    with session.model_context(cfg, mesh):
      run = jax.jit(lambda state, *arrays, graph=graph: nnx.merge(graph, state)(*arrays, enable_dropout=False))
      logits.append(np.asarray(run(state, *arrays)))
  real = data["inputs_segmentation"] > 0
  ours, exact, scanned = (x[real] for x in logits)
  # Experts are chosen otherwise here and there, which moves whole tokens, so that no bound holds for all.
  size = np.linalg.norm(exact, axis=-1)
  rounding, layout = (np.linalg.norm(ours - other, axis=-1) / size for other in (exact, scanned))
  assert rounding.min() > 1e-4 and np.median(rounding) < 0.5
  # What float32 adds in another order may be rounded to the next integer.
  assert np.median(layout) < 0.25 * np.median(rounding)
