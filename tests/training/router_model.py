"""An independent model of a LING2 router in numpy: choice of experts and loss-free balancing."""

import numpy as np


def chosen_experts(logits, bias, groups, kept_groups, top_k):
  """Indices [N, k] of the experts for router logits [N, E], by spec: groups scored by the sum of their two best."""
  biased = 1 / (1 + np.exp(-logits.astype(np.float64))) + bias
  tokens, experts = biased.shape
  grouped = biased.reshape(tokens, groups, experts // groups)
  score = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
  kept = np.argsort(-score, axis=-1)[:, :kept_groups]
  allowed = np.zeros((tokens, groups), bool)
  np.put_along_axis(allowed, kept, True, axis=-1)
  masked = np.where(np.repeat(allowed, experts // groups, axis=-1), biased, -np.inf)
  return np.argsort(-masked, axis=-1)[:, :top_k]


def balanced(bias, counts, rate, zero_mean):
  """The bias [E], float32, after a step with these counts [E]."""
  bias = bias + np.float32(rate) * np.sign(counts.sum() - counts * counts.size).astype(np.float32)
  return bias - np.mean(bias, dtype=np.float32) if zero_mean else bias
