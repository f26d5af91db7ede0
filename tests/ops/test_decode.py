import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from gla_closed_form import closed_form, make_case
from gla_suite import error, jit

from maxtext_ling2.ops.gla import gla
from maxtext_ling2.ops.gla.decode import gla_step


def test_a_prompt_and_then_steps_are_the_whole_sequence():
  case = make_case(40, 3, 8, 24)
  expected = closed_form(case)
  prompt = (x[:, :33] for x in (case.q, case.k, case.v))
  o, state = gla(*prompt, case.g, initial_state=case.state, output_final_state=True)
  assert error(o, expected["o"][:, :33]) <= 1e-6
  step = jit(gla_step)
  for t in range(33, 40):
    o, state = step(case.q[:, t], case.k[:, t], case.v[:, t], case.g, state)
    assert error(o, expected["o"][:, t]) <= 1e-6
  assert error(state, expected["final_state"]) <= 1e-6
  assert (o.dtype, state.dtype, state.shape) == (jnp.float32, jnp.float32, (2, 3, 8, 24))


def test_bfloat16_operands_are_not_rounded_again():
  case = make_case(1, 3, 8)
  q, k, v = (jnp.asarray(x[:, 0], jnp.bfloat16) for x in (case.q, case.k, case.v))
  o, state = gla_step(q, k, v, case.g, case.state)
  rounded = {n: np.asarray(x, np.float32)[:, None] for n, x in (("q", q), ("k", k), ("v", v))}
  expected = closed_form(dataclasses.replace(case, **rounded))
  assert error(state, expected["final_state"]) <= 1e-7
  assert o.dtype == jnp.bfloat16
  assert error(o, expected["o"][:, 0]) <= 2.0**-8


@pytest.mark.parametrize("name", ["k", "g_gamma", "state"])
def test_a_wrong_shape_is_named(name):
  case = make_case(1, 3, 8)
  args = {"q": case.q[:, 0], "k": case.k[:, 0], "v": case.v[:, 0], "g_gamma": case.g, "state": case.state}
  args[name] = args[name][:1]
  with pytest.raises(ValueError, match=f"gla_step: {name} has shape"):
    gla_step(**args)
