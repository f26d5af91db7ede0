"""Which positions MTP scores, and what its second depth is fed with."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxtext_ling2.model.mtp import Ling2MultiTokenPredictionBlock, loss_masks
from tiny import Run, batch

SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 0, 0]])
EOD = 9


def masks_of(scored, segments, depths, ids=None, **settings):
  """`loss_masks` of a run of MaxText's mmap pipeline."""
  data = {"dataset_type": "grain", "grain_file_type": "mmap_npy", "mmap_eod_id": EOD, "reset_attention_mask": True}
  ids = jnp.ones_like(scored) if ids is None else jnp.asarray(ids)
  return loss_masks(scored, ids, segments, SimpleNamespace(mtp_num_layers=depths, **data | settings))


def expected(segments, depth):
  """Position t is scored iff its target, depth + 1 tokens further on, is of the same document."""
  row = np.asarray(segments)[0]
  return [int(t + depth + 1 < row.size and row[t] != 0 and row[t] == row[t + depth + 1]) for t in range(row.size)]


def test_targets_of_another_document_are_masked_even_if_the_main_loss_scores_them():
  scored = (jnp.roll(SEGMENTS, -1, axis=1).at[:, -1].set(0) != 0).astype(jnp.int32)  # as MaxText's mmap pipeline
  masks = masks_of(scored, SEGMENTS, 2)
  for depth, mask in enumerate(masks, 1):
    np.testing.assert_array_equal(mask[0], expected(SEGMENTS, depth))


def test_one_document_a_row_keeps_the_last_known_target():
  ones = jnp.ones((1, 6), jnp.int32)
  first, second = masks_of(ones, ones, 2)
  np.testing.assert_array_equal(first[0], [1, 1, 1, 1, 1, 0])
  np.testing.assert_array_equal(second[0], [1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(masks_of(ones, None, 1)[0], first)


@pytest.mark.parametrize(
  ("settings", "masked"),
  [
    ({}, True),
    ({"grain_file_type": "mmap"}, True),
    ({"reset_attention_mask": False}, False),  # documents see each other
    ({"grain_file_type": "arrayrecord"}, False),  # which EOD, nobody says
    ({"mmap_eod_id": 8}, False),
  ],
)
def test_a_row_that_ends_with_eod(settings, masked):
  """Its last target is the next document's first token, which depth 1 would predict from the position before."""
  ones = jnp.ones((2, 6), jnp.int32)
  ids = ones.at[0, -1].set(EOD)
  first, second = masks_of(ones, ones, 2, ids, **settings)
  np.testing.assert_array_equal(first, [[1, 1, 1, 1, 1 - masked, 0], [1, 1, 1, 1, 1, 0]])
  np.testing.assert_array_equal(second, [[1, 1, 1, 1 - masked, 0, 0], [1, 1, 1, 1, 0, 0]])


def test_masks_are_zero_and_one():
  scored = jnp.array([[0, 1, 1, 0, 1, 1, 0, 0, 0, 0]])
  (mask,) = masks_of(scored, SEGMENTS, 1)
  assert set(np.unique(mask)) <= {0, 1}
  np.testing.assert_array_equal(mask[0], [1, 1, 0, 0, 1, 0, 0, 0, 0, 0])


TWO = {"base_num_decoder_layers": 3, "mtp_num_layers": 2, "opt_type": "sgd"}


def shifted(x, segments):
  """x [B, T] one step to the left; 0 where the next token is another document's, or none."""
  result = np.zeros_like(x)
  same = segments[:, 1:] == segments[:, :-1]
  result[:, :-1] = np.where(same, x[:, 1:], 0)
  return result


def losses_by_depth(network, block, hidden, data):
  """The loss of each depth, from the decoder's output before its last norm [B, T, C]."""
  segments, decoder = data["inputs_segmentation"], network.decoder
  hidden = decoder.decoder_norm(hidden)
  ids, targets, scored = data["inputs"], data["targets"], (data["targets_segmentation"] != 0).astype(int)
  losses = []
  for depth in (1, 2):
    ids, targets, scored = (shifted(x, segments) for x in (ids, targets, scored))
    layer = getattr(block, f"mtp_layer_{depth}")
    hidden = layer.final_norm(
      layer(
        hidden,
        network.token_embedder.embedding[...][ids],
        position_ids=data["inputs_position"],
        decoder_segment_ids=segments,
        deterministic=True,
        model_mode="train",
      )
    )
    logits = hidden @ decoder.logits_dense.kernel[...]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    losses.append(-(picked * scored).sum() / scored.sum())
  return losses


def test_two_depths_by_hand(monkeypatch):
  """Depth 2 gets depth 1's normalised output and the token two further on; the loss is the mean over both depths."""
  run = Run(**TWO)
  data = batch(run.config, seed=3)
  seen = {}
  original = Ling2MultiTokenPredictionBlock.__call__

  def keep(self, shared_embedding, main_hidden_state, *args, **kwargs):
    seen.update(block=self, hidden=main_hidden_state)
    return original(self, shared_embedding, main_hidden_state, *args, **kwargs)

  monkeypatch.setattr(Ling2MultiTokenPredictionBlock, "__call__", keep)

  def by_hand(state):
    network = nnx.merge(run.graph, state, copy=True).model
    network(
      data["inputs"], data["inputs_position"], data["inputs_segmentation"], enable_dropout=False,
      decoder_target_tokens=data["targets"], decoder_target_mask=data["targets_segmentation"],
    )  # fmt: skip
    return losses_by_depth(network, seen["block"], seen["hidden"], data)

  with run.context():
    losses = jax.jit(by_hand)(run.state)
  monkeypatch.undo()
  metrics = run.step(data)
  expected = run.config.mtp_loss_scaling_factor * np.mean(losses)
  assert metrics["learning/mtp_loss"] == pytest.approx(expected, rel=1e-5)
  assert {name for name in metrics if "mtp_layer" in name} == {
    f"learning/moe/{kind}/mtp_layer_{depth}"
    for kind in ("bias_norm", "router_bias_mean", "router_bias_std", "max_over_mean_load", "dead_expert_fraction")
    for depth in (1, 2)
  }


def test_acceptance_rate_of_evaluation(monkeypatch):
  """Percent of scored positions where depth 1 predicts what the main head predicts one position further on."""
  run = Run(**TWO, mtp_eval_target_module=1)
  data = batch(run.config, seed=3)
  seen = {}
  original = Ling2MultiTokenPredictionBlock._set_predictions

  def keep(self, predictions, masks):
    jax.debug.callback(lambda p, m: seen.update(predictions=np.array(p), mask=np.array(m)), predictions[0], masks[0])
    original(self, predictions, masks)

  monkeypatch.setattr(Ling2MultiTokenPredictionBlock, "_set_predictions", keep)
  logits = run.forward(data)
  rate = float(run.evaluate(data)["evaluation/mtp_acceptance_rate_percent"])
  main = logits.argmax(-1)
  agrees = seen["predictions"][:, :-1] == main[:, 1:]
  mask = seen["mask"][:, :-1]
  assert mask.sum() > 20
  assert rate == pytest.approx(100 * (agrees * mask).sum() / seen["mask"].sum(), abs=1e-3)
