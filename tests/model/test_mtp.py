"""Which positions MTP scores."""

import jax.numpy as jnp
import numpy as np

from maxtext_ling2.model.mtp import scored_tokens

SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 0, 0]])


def expected(segments, depth):
  """Position t is scored iff its target, depth + 1 tokens further on, is of the same document."""
  row = np.asarray(segments)[0]
  return [int(t + depth + 1 < row.size and row[t] != 0 and row[t] == row[t + depth + 1]) for t in range(row.size)]


def test_targets_of_another_document_are_masked_even_if_the_main_loss_scores_them():
  scored = (jnp.roll(SEGMENTS, -1, axis=1).at[:, -1].set(0) != 0).astype(jnp.int32)  # as MaxText's mmap pipeline
  masks = scored_tokens(scored, SEGMENTS, 2)
  for depth, mask in enumerate(masks, 1):
    np.testing.assert_array_equal(mask[0], expected(SEGMENTS, depth))


def test_one_document_a_row_keeps_the_last_known_target():
  ones = jnp.ones((1, 6), jnp.int32)
  first, second = scored_tokens(ones, ones, 2)
  np.testing.assert_array_equal(first[0], [1, 1, 1, 1, 1, 0])
  np.testing.assert_array_equal(second[0], [1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(scored_tokens(ones, None, 1)[0], first)


def test_masks_are_zero_and_one():
  scored = jnp.array([[0, 1, 1, 0, 1, 1, 0, 0, 0, 0]])
  (mask,) = scored_tokens(scored, SEGMENTS, 1)
  assert set(np.unique(mask)) <= {0, 1}
  np.testing.assert_array_equal(mask[0], [1, 1, 0, 0, 1, 0, 0, 0, 0, 0])
