"""The equations of ops/gla/README.md, written out in float64 numpy, are GLA: forward and backward, packed too."""

import jax
import numpy as np
import pytest
from gla_closed_form import _documents, closed_form, make_case
from gla_suite import error

from maxtext_ling2.ops.gla import gla

CHUNK = 16
LENGTH = 55  # three full chunks and a shorter one


def decay_factors(n, d, g_gamma, s):
  """M [C, C], a [C], b [C] and c of a chunk, from the positions n [C] and the documents d [C]."""
  i, j = np.indices((n.size, n.size))
  with np.errstate(over="ignore"):  # where masked
    M = np.where((i >= j) & (d[:, None] == d), s * np.exp(g_gamma * (n[:, None] - n)), 0.0)
  a = np.where(d == 0, s * np.exp(g_gamma * n), 0.0)
  b = np.where(d == d[-1], np.exp(g_gamma * (n[-1] - n)), 0.0)
  c = np.where(d[-1] == 0, np.exp(g_gamma * n[-1]), 0.0)
  return M, a, b, c


def equations(q, k, v, do, g_gamma, ids, state, dstate):
  """All results for one sequence and head: q, k [T, D], v, do [T, Dv], state [D, Dv]."""
  s = q.shape[1] ** -0.5
  q, k, v, do = (np.where((ids != 0)[:, None], x, 0.0).astype(np.float64) for x in (q, k, v, do))
  document = np.concatenate([[0], _documents(ids)])  # document[t]: before token t
  chunks = [slice(start, start + CHUNK) for start in range(0, LENGTH, CHUNK)]
  factors = [
    decay_factors(np.cumsum(ids[t] != 0), document[1:][t] - document[t.start], np.float64(g_gamma), s) for t in chunks
  ]
  o, dq, dk, dv = (np.zeros_like(x) for x in (v, q, k, v))

  S, saved = state.astype(np.float64), []
  for t, (M, a, b, c) in zip(chunks, factors, strict=True):
    Q, K, V = q[t], k[t], v[t]
    saved.append(S)
    o[t] = ((Q @ K.T) * M) @ V + np.diag(a) @ Q @ S
    S = c * S + (np.diag(b) @ K).T @ V

  dS = dstate.astype(np.float64)
  for t, (M, a, b, c), S_in in reversed(list(zip(chunks, factors, saved, strict=True))):
    Q, K, V, dO, dS_out = q[t], k[t], v[t], do[t], dS
    P, R = (Q @ K.T) * M, (dO @ V.T) * M
    dq[t] = R @ K + np.diag(a) @ dO @ S_in.T
    dk[t] = R.T @ Q + np.diag(b) @ V @ dS_out.T
    dv[t] = P.T @ dO + np.diag(b) @ K @ dS_out
    dS = c * dS_out + Q.T @ np.diag(a) @ dO
  return {"o": o, "final_state": S, "dq": dq, "dk": dk, "dv": dv, "dinitial_state": dS}


def by_equations(case):
  """`equations` of all sequences and heads, as arrays of the shapes of `gla`."""
  ids = np.ones(case.q.shape[:2], np.int32) if case.ids is None else case.ids
  results = [
    [
      equations(*(x[b, :, h] for x in (case.q, case.k, case.v, case.do)), g, ids[b], case.state[b, h], case.dstate[b, h])
      for h, g in enumerate(case.g)
    ]
    for b in range(len(ids))
  ]
  return {
    name: np.stack([np.stack([one[name] for one in row], axis=0 if "state" in name else 1) for row in results])
    for name in results[0][0]
  }


def by_reference(case):
  """`reference.py`, and JAX's derivative of it."""

  def call(q, k, v, state):
    return gla(q, k, v, case.g, segment_ids=case.ids, initial_state=state, output_final_state=True, backend="reference")

  (o, final_state), pull = jax.vjp(call, case.q, case.k, case.v, case.state)
  dq, dk, dv, dinitial_state = pull((case.do, case.dstate))
  return {"o": o, "final_state": final_state, "dq": dq, "dk": dk, "dv": dv, "dinitial_state": dinitial_state}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_the_equations_of_the_readme(packed, seed):
  case = make_case(LENGTH, 3, 8, 24, segments=packed, seed=seed)
  found, reference, exact = by_equations(case), by_reference(case), closed_form(case)
  for name, value in found.items():
    assert error(value, exact[name]) <= 1e-12, name  # both float64
    assert error(reference[name], value) <= 1e-6, name  # the reference is float32
