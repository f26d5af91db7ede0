"""GLA without a recurrence, in float64 numpy, with its gradients: o_t = scale * sum_s exp(g (t - s)) (q_t . k_s) v_s.

The weights are written from the definition (which tokens count, which documents are one), head by head, T x T.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Case:
  """Inputs of one call and cotangents of its two results, all but the ids float32."""

  q: np.ndarray  # [B, T, H, D]
  k: np.ndarray  # [B, T, H, D]
  v: np.ndarray  # [B, T, H, Dv]
  g: np.ndarray  # [H]
  ids: np.ndarray | None  # [B, T]
  state: np.ndarray  # [B, H, D, Dv]
  do: np.ndarray  # [B, T, H, Dv]
  dstate: np.ndarray  # [B, H, D, Dv]


def make_case(
  length: int,
  heads: int,
  dim: int,
  value_dim: int | None = None,
  *,
  batch: int = 2,
  segments: bool = False,
  seed: int = 0,
) -> Case:
  """Normal inputs; log decays from about -0.7 to -0.004; with segments, ids by `random_ids`."""
  rng = np.random.default_rng(seed)
  value_dim = value_dim or dim

  def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)

  return Case(
    q=normal(batch, length, heads, dim),
    k=normal(batch, length, heads, dim),
    v=normal(batch, length, heads, value_dim),
    g=-np.exp2(-rng.uniform(0.5, 8, heads)).astype(np.float32),
    ids=random_ids(rng, batch, length) if segments else None,
    state=normal(batch, heads, dim, value_dim),
    do=normal(batch, length, heads, value_dim),
    dstate=normal(batch, heads, dim, value_dim),
  )


def random_ids(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
  """Runs of 1 to about T / 3 tokens of ids 0 to 2: padding anywhere, ids that go on after it, ids that come back."""
  rows = []
  for _ in range(batch):
    runs = rng.integers(1, length // 3 + 2, size=length)
    rows.append(np.repeat(rng.integers(0, 3, size=length), runs)[:length])
  return np.stack(rows).astype(np.int32)


def closed_form(case: Case, heads: list[int] | None = None) -> dict[str, np.ndarray]:
  """o, final_state and the gradients dq, dk, dv, dinitial_state in float64, of all heads or of those named."""
  heads = list(range(case.g.size)) if heads is None else heads
  shape = case.q.shape[:2]
  ids = np.ones(shape, np.int32) if case.ids is None else case.ids
  rows = [[_one_row_and_head(case, ids, b, h) for h in heads] for b in range(shape[0])]
  by_time = {"o", "dq", "dk", "dv"}  # [T, .] per row and head; the others are states
  return {
    name: np.stack([np.stack([one[name] for one in row], axis=1 if name in by_time else 0) for row in rows])
    for name in rows[0][0]
  }


def _one_row_and_head(case: Case, ids: np.ndarray, b: int, h: int) -> dict[str, np.ndarray]:
  q, k, v, do = (x[b, :, h].astype(np.float64) for x in (case.q, case.k, case.v, case.do))
  s0, ds = case.state[b, h].astype(np.float64), case.dstate[b, h].astype(np.float64)
  scale = q.shape[1] ** -0.5
  weights, first = _weights(ids[b], float(case.g[h]))  # [T, T], [T]
  real = np.flatnonzero(ids[b])
  if not real.size:
    zero = {"o": v, "dq": q, "dk": k, "dv": v}
    return {n: np.zeros_like(x) for n, x in zero.items()} | {"final_state": s0, "dinitial_state": ds}
  last, last_first = weights[real[-1]], first[real[-1]]
  scores, dscores = scale * weights * (q @ k.T), scale * weights * (do @ v.T)
  return {
    "o": scores @ v + scale * first[:, None] * (q @ s0),
    "final_state": (last[:, None] * k).T @ v + last_first * s0,
    "dq": dscores @ k + scale * first[:, None] * (do @ s0.T),
    "dk": dscores.T @ q + last[:, None] * (v @ ds.T),
    "dv": scores.T @ do + last[:, None] * (k @ ds),
    "dinitial_state": scale * (first[:, None] * q).T @ do + last_first * ds,
  }


def _weights(ids: np.ndarray, g: float) -> tuple[np.ndarray, np.ndarray]:
  """Decay from token s to token t, [T, T], and from the initial state to token t, [T]; 0 where nothing flows."""
  real = ids != 0
  count = np.cumsum(real)
  document = _documents(ids)
  flows = np.tri(ids.size, dtype=bool) & real[:, None] & real & (document[:, None] == document)
  weights = np.where(flows, np.exp(g * np.maximum(count[:, None] - count, 0)), 0.0)
  return weights, np.where(real & (document == 0), np.exp(g * count), 0.0)


def _documents(ids: np.ndarray) -> np.ndarray:
  """Number of the document at each place, counted from 0, [T]."""
  number, current, numbers = 0, 0, []
  for one in ids.tolist():
    if one and current and one != current:
      number += 1
    current = one or current
    numbers.append(number)
  return np.array(numbers)
