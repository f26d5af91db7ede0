"""`matmul_precision` reaches every product of float32 of a train and an eval step, experts and MTP among them."""

import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision

from tiny import Run, batch

HIGHEST = (Precision.HIGHEST, (Precision.HIGHEST, Precision.HIGHEST))
SETTINGS = {"base_num_decoder_layers": 3, "mtp_num_layers": 1}


def equations(jaxpr):
  """All of a program, those of inner programs and kernels too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
      if _is_program(value):
        yield from equations(getattr(value, "jaxpr", value))


def _is_program(value):
  return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def products(jaxpr):
  """(primitive, precision) of all products of float32."""
  return [
    (equation.primitive.name, equation.params["precision"])
    for equation in equations(jaxpr)
    if "precision" in equation.params and all(x.aval.dtype == jnp.float32 for x in equation.invars[:2])
  ]


@pytest.mark.parametrize("megablox", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_product_of_float32(megablox):
  run = Run(**SETTINGS, megablox=megablox)
  data = batch(run.config)
  with run.context():
    programs = [jax.make_jaxpr(step)(run.state, dict(data)) for step in (run.step_function, run.evaluate_function)]
  for program in programs:
    found = products(program.jaxpr)
    assert len(found) > 50
    assert {name for name, precision in found if precision not in HIGHEST} == set()


def test_in_bfloat16_products_name_none():
  """Kernels refuse a higher one for it."""
  run = Run(**SETTINGS, dtype="bfloat16", megablox=True)
  with run.context():
    program = jax.make_jaxpr(run.step_function)(run.state, dict(batch(run.config)))
  kernels = [
    equation.params["jaxpr"] for equation in equations(program.jaxpr) if equation.primitive.name == "pallas_call"
  ]
  assert kernels
  for kernel in kernels:
    assert all(e.params["precision"] is None for e in equations(kernel) if e.primitive.name == "dot_general")
