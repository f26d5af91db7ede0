"""Which layers are rematerialised, told from the traced program."""

import jax
import numpy as np
import pytest
from flax import nnx

import tiny
from maxtext_ling2.maxtext_api import session


@pytest.mark.parametrize(("policy", "rematerialised"), [("none", False), ("full", True)])
def test_the_policy_acts_on_scanned_layers(policy, rematerialised):
  """Unscanned layers are wrapped by MaxText 0.2.5 itself, whatever the policy is."""
  config = tiny.config(remat_policy=policy, scan_layers=True, mtp_num_layers=0)
  model, mesh = tiny.model(config)
  graph, state = nnx.split(model)
  tokens = np.ones((1, 8), np.int32)

  def run(state):
    return nnx.merge(graph, state, copy=True)(tokens, np.arange(8)[None], tokens, enable_dropout=False)

  with session.model_context(config, mesh):
    program = str(jax.make_jaxpr(run)(state))
  assert ("remat2[" in program) == rematerialised
