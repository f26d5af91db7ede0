"""Options of a plan with round figures, for tests of what is made of them."""

from maxtext_ling2.plan.bounds import Part
from maxtext_ling2.plan.estimate import Estimate

GIB = 2**30


def option(topology, mesh="", fits=True, devices=8):
  """An option whose step computes 0.2 s, of which the model's operations are 0.16 s, moves 0.1 s and sends 0.1 s."""
  if not fits:
    return Estimate(topology, mesh, devices, False, 40 * GIB, 31 * GIB, problem="Used 40G of 31G hbm")
  return Estimate(
    topology,
    mesh,
    devices,
    True,
    memory=20 * GIB,
    capacity=31 * GIB,
    tflops=100.0,
    bytes_accessed=1e11,
    collectives={"all-gather": (2, 3 * GIB)},
    synchronous={"all-gather": (1, GIB)},
    model_seconds=0.16,
    compute_seconds=0.2,
    memory_seconds=0.1,
    ici_seconds=0.1,
    pessimistic_seconds=0.5,
    edge_share=0.5,
    parts=(Part("experts", 9e10, 0.2, 0.1, 0.0, 0.25, 0.06), Part("collectives", 1e10, 0.0, 0.01, 0.2, 0.25)),
    assumed=("conditional a.1: branch 0", "conditional a.2: branch 0"),
    tokens=4096 * devices,
  )
