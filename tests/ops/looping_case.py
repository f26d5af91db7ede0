"""A program for the estimator whose time its schedule does not tell: a kernel within a loop."""

import jax

from benchmarks import gla_cases


def looping():
  run, (tokens, *others) = gla_cases.forward(512, 2, save=False)

  def twice(q, *rest):
    return jax.lax.fori_loop(0, 2, lambda _, q: run(q, *rest).o, q)

  return twice, (tokens, *others)
