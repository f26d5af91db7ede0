"""Seven layers in cycles of three, so the last one is MLA by the trailing rule; one MTP layer."""

import jax
import numpy as np
import pytest
from oracle_suite import FUSED, SHORT_FIRST, OracleSuite, model, recorded, tokens

from maxtext_ling2.model.mtp import Ling2MultiTokenPredictionBlock
from maxtext_ling2.verify import comparison


class TestTrailingMtp(OracleSuite):
  case = "trailing_mtp"
  with_mtp = True

  # With `make test`: what this folder adds: a trailing layer and MTP.

  @pytest.mark.slow
  @FUSED
  def test_fused_kernels(self, scan, policy):
    super().test_fused_kernels(scan, policy)

  @pytest.mark.slow
  def test_bfloat16_loss(self):
    super().test_bfloat16_loss()

  @pytest.mark.slow
  @SHORT_FIRST
  def test_packed_documents_equal_each_alone(self, length):
    super().test_packed_documents_equal_each_alone(length)

  @pytest.mark.slow
  @SHORT_FIRST
  def test_right_padding(self, length):
    super().test_right_padding(length)

  def test_gradients_with_mtp(self):
    self.check_gradients("b1", 1, 1, self.with_mtp, recorded(self.case, "io_short")["b1.train.loss"])

  @SHORT_FIRST
  def test_mtp_logits_and_loss(self, length, monkeypatch):
    io = recorded(self.case, f"io_{length}")
    logits, loss = mtp_outputs(monkeypatch, length, tokens(self.case, length), None)
    report = comparison.compare_logits(logits[:, :-1], io["train.mtp_logits"][:, :-1])
    assert report.max_abs_error <= 1e-4
    assert loss == pytest.approx(float(io["mtp_loss_per_row_correct"]), abs=1e-5)

  def test_mtp_of_packed_documents_equals_each_alone(self, monkeypatch):
    io = recorded(self.case, "io_short")
    cuts = io["pack.cuts"]
    documents = [io[f"pack.doc{d}.ids"][0].astype(np.int32) for d in range(len(cuts) - 1)]
    packed = np.stack([np.concatenate(documents)] * 2)
    segments = np.stack([np.repeat(np.arange(1, len(documents) + 1), np.diff(cuts))] * 2).astype(np.int32)
    together, loss = mtp_outputs(monkeypatch, "short", packed, segments)
    total, scored = 0.0, 0
    for d, document in enumerate(documents):
      row = np.zeros_like(packed[0])
      row[: len(document)] = document
      real = (np.arange(row.size) < len(document)).astype(np.int32)
      alone, loss_alone = mtp_outputs(monkeypatch, "short", np.stack([row] * 2), np.stack([real] * 2))
      np.testing.assert_allclose(together[0, cuts[d] : cuts[d + 1]], alone[0, : len(document)], atol=1e-5, rtol=0)
      total += loss_alone * (len(document) - 2)
      scored += len(document) - 2
    assert loss == pytest.approx(total / scored, abs=1e-5)


def mtp_outputs(monkeypatch, length, ids, segments):
  """MTP logits [B, T, V] and loss of the model, in which the last two tokens of each document are not scored."""
  reference = model("trailing_mtp", length, 1)
  segments = np.ones_like(ids) if segments is None else segments
  ends = np.concatenate([segments[:, 1:] != segments[:, :-1], np.ones_like(segments[:, :1], bool)], axis=1)
  targets = np.where(ends, 0, np.concatenate([ids[:, 1:], ids[:, :1]], axis=1))
  scored = np.where(ends | (segments == 0), 0, segments)  # a mask of segment ids, as MaxText's pipelines make it
  graph, state = reference.split()

  def run(state, ids, segments, targets, scored):
    caught = []
    original = Ling2MultiTokenPredictionBlock._logits

    def catch(self, *args):
      caught.append(original(self, *args))
      return caught[-1]

    with monkeypatch.context() as patch:
      patch.setattr(Ling2MultiTokenPredictionBlock, "_logits", catch)
      _, traced = reference.run(graph, state, ids, segments, targets, scored)
    return caught[0], traced.mtp_block.losses[...].mean()

  with reference.context():
    logits, loss = jax.jit(run)(state, ids, segments, targets, scored)
  return np.asarray(logits), float(loss)
