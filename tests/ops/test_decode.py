import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from gla_closed_form import closed_form, make_case
from gla_suite import error, jit

from maxtext_ling2.ops.gla.decode import gla_prompt, gla_step


def prefix(case, length):
  return dataclasses.replace(case, **{name: getattr(case, name)[:, :length] for name in ("q", "k", "v", "do")})


def test_a_prompt_and_then_steps_are_the_whole_sequence():
  case = make_case(40, 3, 8, 24)
  expected = closed_form(case)
  o, state = gla_prompt(case.q[:, :33], case.k[:, :33], case.v[:, :33], case.g, case.state)
  assert error(o, expected["o"][:, :33]) <= 1e-6
  step = jit(gla_step)
  for t in range(33, 40):
    o, state = step(case.q[:, t], case.k[:, t], case.v[:, t], case.g, state)
    assert error(o, expected["o"][:, t]) <= 1e-6
  assert error(state, expected["final_state"]) <= 1e-6
  assert (o.dtype, state.dtype, state.shape) == (jnp.float32, jnp.float32, (2, 3, 8, 24))


def test_rows_that_are_not_active_keep_their_state():
  case = make_case(5, 3, 8)
  case.q[1, 0] = case.k[1, 0] = case.v[1, 0] = np.nan
  active = jnp.asarray([True, False])
  o, state = gla_step(case.q[:, 0], case.k[:, 0], case.v[:, 0], case.g, case.state, active=active)
  expected = closed_form(prefix(case, 1))
  assert error(o[0], expected["o"][0, 0]) <= 1e-6
  np.testing.assert_array_equal(o[1], 0)
  np.testing.assert_array_equal(state[1], case.state[1])
  assert error(state[0], expected["final_state"][0]) <= 1e-6


def test_prompts_of_different_lengths():
  case = make_case(20, 3, 8)
  active = np.arange(20) < np.array([[20], [13]])
  _, state = gla_prompt(case.q, case.k, case.v, case.g, case.state, active=jnp.asarray(active))
  assert error(state[0], closed_form(case)["final_state"][0]) <= 1e-6
  assert error(state[1], closed_form(prefix(case, 13))["final_state"][1]) <= 1e-6


def test_bfloat16_operands_are_not_rounded_again():
  case = make_case(1, 3, 8)
  q, k, v = (jnp.asarray(x[:, 0], jnp.bfloat16) for x in (case.q, case.k, case.v))
  o, state = gla_step(q, k, v, case.g, case.state)
  rounded = {n: np.asarray(x, np.float32)[:, None] for n, x in (("q", q), ("k", k), ("v", v))}
  expected = closed_form(dataclasses.replace(case, **rounded))
  assert error(state, expected["final_state"]) <= 1e-7
  assert o.dtype == jnp.bfloat16
  assert error(o, expected["o"][:, 0]) <= 2.0**-8


@pytest.mark.parametrize("name", ["k", "g_gamma", "state", "active"])
def test_a_wrong_shape_is_named(name):
  case = make_case(1, 3, 8)
  args = {"q": case.q[:, 0], "k": case.k[:, 0], "v": case.v[:, 0], "g_gamma": case.g, "state": case.state}
  args |= {"active": np.ones(2, bool)}
  args[name] = args[name][:1]
  with pytest.raises(ValueError, match=f"gla_step: {name} has shape"):
    gla_step(**args)
