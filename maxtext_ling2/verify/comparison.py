"""How far outputs of LING2 are from recorded ones, and whether that is within tolerance."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LOGITS_TOLERANCE = 1e-4
GRADIENT_RELATIVE = 1e-3
GRADIENT_OF_LARGEST = 1e-5


@dataclasses.dataclass(frozen=True)
class LogitsReport:
  """Difference of logits from the reference.

  Attributes:
    max_abs_error: largest absolute difference of a logit.
    max_kl: largest Kullback-Leibler divergence of a position's prediction from the reference's, in nats.
    positions: number of positions compared.
  """

  max_abs_error: float
  max_kl: float
  positions: int

  @property
  def passed(self) -> bool:
    """Whether `max_abs_error` is within `LOGITS_TOLERANCE`; NaN is not."""
    return bool(self.max_abs_error <= LOGITS_TOLERANCE)


@dataclasses.dataclass(frozen=True)
class GradientReport:
  """Difference of one gradient from the reference.

  Attributes:
    name: Hugging Face name of the tensor.
    max_abs_error: largest absolute difference of an element.
    excess: largest difference divided by its tolerance; up to 1 is within.
  """

  name: str
  max_abs_error: float
  excess: float

  @property
  def passed(self) -> bool:
    """Whether every element is within its tolerance; NaN is not."""
    return bool(self.excess <= 1.0)


def compare_logits(ours: Array, reference: Array) -> LogitsReport:
  """Compares logits [..., V]."""
  ours, reference = ours.astype(np.float64), reference.astype(np.float64)
  p, q = _log_softmax(reference), _log_softmax(ours)
  kl = np.sum(np.exp(p) * (p - q), axis=-1)
  return LogitsReport(float(np.max(np.abs(ours - reference))), float(np.max(kl)), int(np.prod(ours.shape[:-1])))


def compare_gradients(
  ours: Mapping[str, Array], reference: Mapping[str, Array], padding_id: int | None = None
) -> Iterator[GradientReport]:
  """Compares every gradient of `reference`, element by element.

  Args:
    ours: gradients by Hugging Face tensor name.
    reference: the same of the reference.
    padding_id: the token whose embedding gets no gradient in the Hugging Face code (padding_idx); not compared.

  Raises:
    KeyError: the model has no tensor of a name; it is named.
  """
  for name, theirs in reference.items():
    if name not in ours:
      raise KeyError(f"{name}: the model has no parameter of this name")
    if name == "model.word_embeddings.weight" and padding_id is not None:
      theirs = np.concatenate([theirs[:padding_id], ours[name][padding_id : padding_id + 1], theirs[padding_id + 1 :]])
    allowed = GRADIENT_RELATIVE * np.abs(theirs) + GRADIENT_OF_LARGEST * np.max(np.abs(theirs), initial=0.0)
    error = np.abs(ours[name].astype(np.float64) - theirs)
    excess = np.max(error / np.maximum(allowed, np.finfo(np.float64).tiny), initial=0.0)
    yield GradientReport(name, float(np.max(error, initial=0.0)), float(excess))


def _log_softmax(x: Array) -> Array:
  shifted: Array = x - np.max(x, axis=-1, keepdims=True)
  result: Array = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
  return result
