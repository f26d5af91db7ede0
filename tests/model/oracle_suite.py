"""LING2 against the recorded reference, one class for both folders: float32, through MaxText's own Transformer."""

import functools
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
from jax.experimental import pallas as pl

from maxtext_ling2.verify import comparison
from maxtext_ling2.verify.model import Float32Model, positions_of

GOLDEN = Path(__file__).parent.parent / "golden"
LENGTHS = {"short": 24, "long": 80}
SHORT_FIRST = pytest.mark.parametrize("length", ["short", pytest.param("long", marks=pytest.mark.slow)])
FUSED = pytest.mark.parametrize(
  ("scan", "policy"), [pytest.param(False, "full", marks=pytest.mark.slow), (True, "minimal_with_context")]
)


@functools.cache
def recorded(case, name):
  with np.load(GOLDEN / case / f"{name}.npz") as file:
    return dict(file)


@functools.cache
def model(case, length, offset, **settings):
  """The model with the folder's weights, two rows of `length` tokens; built once a process."""
  return Float32Model(GOLDEN / case, 2, LENGTHS[length], gla_decay_layer_offset=offset, **settings)


@functools.cache
def logits(case, length, offset):
  return model(case, length, offset).logits(tokens(case, length))


def tokens(case, length, key="input_ids"):
  return recorded(case, f"io_{length}")[key].astype(np.int32)


def cross_entropy(logits, labels):
  """Mean loss over labels (unshifted, -100 ignored), in float64."""
  logits, targets = logits[:, :-1].astype(np.float64), labels[:, 1:]
  scored = targets != -100
  shifted = logits - logits.max(-1, keepdims=True)
  log_z = np.log(np.exp(shifted).sum(-1))
  picked = np.take_along_axis(shifted, np.where(scored, targets, 0)[..., None], -1)[..., 0]
  return float(((log_z - picked) * scored).sum() / scored.sum())


def layer_outputs(reference, hidden_states, embed):
  """Attention and MLP output of every layer for the recorded inputs of that layer, and the experts it chooses."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  graph, state = reference.split()
  inputs = [embed, *hidden_states[1:-1]]
  segments = jnp.ones(embed.shape[:2], jnp.int32)
  positions = positions_of(segments)

  def one(decoder, index, x):
    layer = getattr(decoder, f"layers_{index}")
    normed = layer.pre_self_attention_layer_norm(x)
    if layer.is_mla:
      attended, _ = layer.self_attention(
        normed, normed, positions, decoder_segment_ids=segments, deterministic=True, model_mode="train"
      )
    else:
      attended = layer.self_attention(normed, segments, positions, index)
    normed = layer.post_self_attention_layer_norm(x + attended)
    if layer.is_dense:
      return attended, layer.mlp(normed, deterministic=True), jnp.zeros((), jnp.int32)
    experts = layer.moe.MoeBlock_0
    _, chosen = experts.get_topk(*experts.gate(normed))
    return attended, layer.moe(normed, True)[0], chosen

  def run(state, inputs):
    decoder = nnx.merge(graph, state, copy=True).decoder
    return [one(decoder, i, x) for i, x in enumerate(inputs)]

  with reference.context():
    return jax.jit(run)(state, inputs)


class OracleSuite:
  """Subclasses name the folder, and whether its recorded gradients of one row are of a loss that includes MTP's."""

  case: ClassVar[str]
  with_mtp: ClassVar[bool]

  @pytest.mark.parametrize(
    ("offset", "length"), [(1, "short"), (1, "long"), (0, "short"), pytest.param(0, "long", marks=pytest.mark.slow)]
  )
  def test_logits_and_loss(self, length, offset):
    io = recorded(self.case, f"io_{length}")
    key = "eval" if offset else "slope_noshift"
    ours = logits(self.case, length, offset)
    report = comparison.compare_logits(ours, io[f"{key}.logits"])
    assert report.max_abs_error <= 1e-4
    assert report.max_kl <= 1e-8
    assert cross_entropy(ours, io["labels"]) == pytest.approx(float(io[f"{key}.loss"]), abs=1e-5)

  @FUSED
  def test_fused_kernels(self, scan, policy):
    """TPU kernels, interpreted: logits with either offset, packed documents, and all gradients, rematerialised.

    Pallas's own interpreter, because that of the TPU has effects, which rematerialisation does not take.
    """
    io, ran = recorded(self.case, "io_short"), set()
    options = {"gla_backend": "pallas", "scan_layers": scan, "remat_policy": policy}
    original = pl.pallas_call

    def interpreted(*args, name, **kwargs):
      ran.add(name)
      return original(*args, name=name, interpret=True, **kwargs)

    with mock.patch.object(pl, "pallas_call", interpreted):
      for offset, key in ((1, "eval"), (0, "slope_noshift")):
        ours = model(self.case, "short", offset, **options).logits(tokens(self.case, "short"))
        assert comparison.compare_logits(ours, io[f"{key}.logits"]).max_abs_error <= 1e-4
      self.check_packed("short", model(self.case, "short", 1, **options))
      self.check_gradients("b1", 1, 1, self.with_mtp, io["b1.train.loss"], **options)
    stages = {f"{stage}_norm{passes}" for stage in ("rotated", "gated") for passes in ("", "_gradient")}
    assert ran == {"gla_forward", "gla_backward", *stages}

  def test_decay_offset_matters(self):
    assert np.abs(logits(self.case, "short", 0) - logits(self.case, "short", 1)).max() > 0.1

  @SHORT_FIRST
  def test_every_layer(self, length):
    io = recorded(self.case, f"io_{length}")
    outputs = layer_outputs(model(self.case, length, 1), io["eval.hidden_states"], io["eval.embed"])
    assert len(outputs) == model(self.case, length, 1).config.num_decoder_layers
    for index, (attended, mlp, chosen) in enumerate(outputs):
      np.testing.assert_allclose(attended, io[f"eval.layer{index}.attn_out"], atol=1e-4, rtol=0, err_msg=f"layer {index}")
      np.testing.assert_allclose(mlp, io[f"eval.layer{index}.mlp_out"], atol=1e-4, rtol=0, err_msg=f"layer {index}")
      if chosen.ndim:
        theirs = io[f"eval.layer{index}.topk_idx"].reshape(chosen.shape)
        np.testing.assert_array_equal(np.sort(chosen, -1), np.sort(theirs, -1), err_msg=f"layer {index}")

  @SHORT_FIRST
  def test_packed_documents_equal_each_alone(self, length):
    self.check_packed(length, model(self.case, length, 1))

  def check_packed(self, length, reference):
    io = recorded(self.case, f"io_{length}")
    cuts = io["pack.cuts"]
    documents = [io[f"pack.doc{d}.ids"][0].astype(np.int32) for d in range(len(cuts) - 1)]
    packed = np.stack([np.concatenate(documents)] * 2)
    segments = np.stack([np.repeat(np.arange(1, len(documents) + 1), np.diff(cuts))] * 2).astype(np.int32)
    together = reference.logits(packed, segments)[0]
    for d, document in enumerate(documents):
      row = np.zeros_like(packed[0])
      row[: len(document)] = document  # the rest is padding, segment 0
      alone = reference.logits(
        np.stack([row] * 2), np.stack([(np.arange(row.size) < len(document)).astype(np.int32)] * 2)
      )
      part = together[cuts[d] : cuts[d + 1]]
      np.testing.assert_allclose(part, alone[0, : len(document)], atol=1e-5, rtol=0)
      np.testing.assert_allclose(part, io[f"pack.doc{d}.logits"][0], atol=1e-4, rtol=0)

  @SHORT_FIRST
  def test_right_padding(self, length):
    io = recorded(self.case, f"io_{length}")
    real = io["pad.attention_mask"].astype(np.int32)
    assert 0 in real
    ours = model(self.case, length, 1).logits(tokens(self.case, length, "pad.input_ids"), real)
    np.testing.assert_allclose(ours[real == 1], io["pad.logits"][real == 1], atol=1e-4, rtol=0)
    assert cross_entropy(ours, io["pad.labels"]) == pytest.approx(float(io["pad.loss"]), abs=1e-5)

  def check_gradients(self, kind, offset, rows, with_mtp, expected_loss, **options):
    reference = model(self.case, "short", offset, **options)
    ids, labels = tokens(self.case, "short")[:rows], tokens(self.case, "short", "labels")[:rows]
    loss, ours = reference.gradients(ids, labels, with_mtp)
    assert loss == pytest.approx(float(expected_loss), abs=1e-5)
    theirs = recorded(self.case, f"grads_{kind}_short")
    reports = list(comparison.compare_gradients(ours, theirs, reference.padding_id))
    assert {report.name for report in reports} == set(ours)
    bad = [report for report in reports if not report.passed]
    assert not bad, bad[:5]

  def test_bfloat16_loss(self):
    """A few tokens get other experts: noise, which falls with the square root of the number of labels."""
    differences, errors, labels = [], [], []
    for length in LENGTHS:
      reference = Float32Model(GOLDEN / self.case, 2, LENGTHS[length], gla_decay_layer_offset=1, dtype="bfloat16")
      ours = reference.logits(tokens(self.case, length))
      loss = cross_entropy(ours, tokens(self.case, length, "labels"))
      differences.append(loss - float(recorded(self.case, f"io_{length}")["eval.loss"]))
      errors += list(np.sqrt(np.mean(np.square(ours - logits(self.case, length, 1)), axis=-1)).ravel())
      labels.append(np.sum(tokens(self.case, length, "labels")[:, 1:] != -100))
    noise = 0.02 * np.sqrt(max(labels) / np.array(labels))  # 0.02 for the long input
    assert np.all(np.abs(differences) < noise), differences
    assert abs(np.average(differences, weights=labels)) < 0.02
    assert 1e-3 < np.median(errors) < 0.06  # the logits deviate by 0.8; it did compute in bfloat16
