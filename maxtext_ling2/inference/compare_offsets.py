"""Finds the decay offset that a model was trained with, from its loss on a text with either."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maxtext_ling2.checkpoint.decay_offset import FIELD
from maxtext_ling2.inference import evaluate
from maxtext_ling2.inference.evaluate import Score

BLOCKS = 32
BLOCK_TOKENS = 16  # minimum per block
FEWEST_BLOCKS = 8
SIGNIFICANT = 4.0
SMALLEST = 0.05


@dataclasses.dataclass(frozen=True)
class OffsetComparison:
  """A text's loss with each decay offset, and whether it decides which one the weights were trained with.

  The weights load with either offset; only the loss reveals the wrong one. The lower loss decides if three conditions
  hold; `undecided` names the first that does not.

  1. The difference is at least `SMALLEST` nats per token. A smaller one may have other causes, however significant it is:
     ling2-tiny, trained for 300 steps with offset 0, has a loss that is lower with offset 1, by 0.0039 (standard error
     0.0010), on text that it was trained on. Of a well trained model a loss of 7.8 instead of 0.567 is reported.
  2. It is not noise: it is at least `SIGNIFICANT` times its standard error. The losses of one token with both offsets are
     compared with each other (paired), which removes how hard the token is. Neighbouring tokens share their context, so
     the error is not taken over tokens but over the means of `BLOCKS` blocks of consecutive tokens.
  3. The lower loss is below the entropy of the text's own token frequencies. No prediction that ignores the context can
     get there (Gibbs' inequality), so random weights do not, whichever offset happens to suit them better.

  Attributes:
    scores: with offset 0 and with offset 1.
    standard_error: of the difference, in nats per token.
    blocks: number of blocks that the text was divided into.
    frequency_entropy: loss in nats per token of the best prediction from token frequencies alone.
    stated: the offset in the folder's config.json; None if it has none.
  """

  scores: tuple[Score, Score]
  standard_error: float
  blocks: int
  frequency_entropy: float
  stated: int | None = None

  @property
  def difference(self) -> float:
    """Loss with offset 1 minus loss with offset 0, in nats per token."""
    return self.scores[1].loss - self.scores[0].loss

  @property
  def lower(self) -> int:
    """The offset with the lower loss."""
    return int(self.difference < 0)

  @property
  def undecided(self) -> str | None:
    """Why the text does not decide the offset; None if it does."""
    lowest, size = self.scores[self.lower].loss, abs(self.difference)
    if self.blocks < FEWEST_BLOCKS:
      return (
        f"it has {self.scores[0].tokens} scored tokens, and {FEWEST_BLOCKS * BLOCK_TOKENS} are needed; take a longer text"
      )
    if not math.isfinite(size):
      return "a loss is not a finite number; check the weights"
    if size < SMALLEST:
      return (
        f"the difference is less than {SMALLEST:g} nats per token; take a text like the training data (weights that are "
        "hardly trained work as well with either)"
      )
    if size < SIGNIFICANT * self.standard_error:
      return f"the difference is less than {SIGNIFICANT:g} standard errors; take a longer text"
    if lowest >= self.frequency_entropy:
      return (
        f"neither loss is below {self.frequency_entropy:.4f}, which token frequencies alone reach: the weights are "
        "random or hardly trained, or the text is unlike their training data"
      )
    return None


def compare_offsets(
  checkpoint: Path,
  text: str,
  *,
  model_name: str | None = None,
  tokenizer: Path | None = None,
  length: int = evaluate.LENGTH,
  overrides: Sequence[str] = (),
) -> OffsetComparison:
  """Evaluates a text as `evaluate.evaluate` does, with decay offset 0 and 1; the weights are read once.

  Args:
    checkpoint: see `evaluate.evaluate`, as for the others.
    text: at least two tokens; a hundred are needed to decide the offset, a few thousand are better.
    model_name: MaxText's model_name.
    tokenizer: file or folder.
    length: tokens per window.
    overrides: KEY=VALUE settings of MaxText, without gla_decay_layer_offset.

  Raises:
    SavedModelError: an argument is invalid.
    ValueError: see `saved_model.open_model`.
  """
  from maxtext_ling2.maxtext_api import session

  opened, ids = evaluate.open_with_text(checkpoint, text, model_name, tokenizer, length, overrides, evaluate.BOTH)
  configs = [session.changed(opened.config, **{FIELD: offset}) for offset in (0, 1)]
  zero, one = (evaluate.token_losses(config, opened.weights, ids) for config in configs)
  error, blocks = paired_error(zero, one)
  scores = (evaluate.score(zero, text), evaluate.score(one, text))
  return OffsetComparison(scores, error, blocks, frequency_entropy(ids[1:]), opened.stated_offset)


def verdict(found: OffsetComparison) -> list[str]:
  """The result of a comparison as lines of text."""
  lines = [
    f"difference (1 minus 0): {found.difference:+.4f} nats per token, standard error {found.standard_error:.4f} "
    f"({found.blocks} blocks); token frequencies alone: {found.frequency_entropy:.4f} nats per token"
  ]
  if found.undecided is None:
    lines.append(f"The weights were trained with {FIELD}={found.lower}.")
  else:
    lines.append(f"This text cannot tell which {FIELD} the weights were trained with: {found.undecided}.")
  if found.stated is not None:
    contradicts = found.undecided is None and found.stated != found.lower
    lines.append(f"config.json says {FIELD}={found.stated}{', which contradicts the loss' if contradicts else ''}.")
  return lines


def paired_error(first: NDArray[np.float32], second: NDArray[np.float32]) -> tuple[float, int]:
  """(standard error of the mean difference of two losses [N] of the same tokens, number of blocks)."""
  blocks = min(BLOCKS, first.size // BLOCK_TOKENS)
  if blocks < 2:
    return math.inf, blocks
  difference = second.astype(np.float64) - first.astype(np.float64)
  means = [block.mean() for block in np.array_split(difference, blocks)]
  return float(np.std(means, ddof=1) / math.sqrt(blocks)), blocks


def frequency_entropy(ids: NDArray[np.int32]) -> float:
  """Entropy in nats per token of the frequencies of token ids [N] in themselves."""
  _, counts = np.unique(ids, return_counts=True)
  shares = counts / ids.size
  return float(-(shares * np.log(shares)).sum())
