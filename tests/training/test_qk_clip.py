"""QK-clip (use_qk_clip): which weights of MLA a step scales, and by how much, against logits computed with numpy.

The largest logit s of a head over the whole batch gives g = min(1, threshold / s). The head's columns of wq_b and wkv_b
are scaled so that all its logits become g times as large: q and k without rotation by sqrt(g) each, the rotated part of
q by g, as all heads share the rotated k; v stays. (MuonClip, arXiv 2507.20534.)
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model.mla import MultiHeadLatentAttention
from maxtext_ling2.training import qk_clip
from tiny import Run, batch

# MLA in layers 1 and 3, which scan_layers stacks, and in MTP's.
SETTINGS = {"base_num_decoder_layers": 4, "inhomogeneous_layer_cycle_interval": 2, "first_num_dense_layers": 0}
CLIP = {"use_qk_clip": True, "opt_type": "sgd", "learning_rate": 0.0, "routed_bias_update_rate": 0.0}
THRESHOLD = 5.5


def inputs_of_mla(cfg, data):
  """{path of an MLA layer: its input [B, T, C] float64}, in an unscanned model of weights `tiny.weights`."""
  network, mesh = tiny.model(cfg)
  graph, state = nnx.split(network)
  call = MultiHeadLatentAttention.__call__

  def keeping_its_input(self, x, *args, **kwargs):
    self.sow(nnx.Intermediate, "its_input", x)
    return call(self, x, *args, **kwargs)

  def run(state, data):
    network = nnx.merge(graph, state, copy=True)
    names = ("inputs", "inputs_position", "inputs_segmentation")
    targets = {"decoder_target_tokens": data["targets"], "decoder_target_mask": data["targets_segmentation"]}
    network(*(data[name] for name in names), enable_dropout=False, **targets)
    return nnx.pop(network, nnx.Intermediate)

  with session.model_context(cfg, mesh), pytest.MonkeyPatch.context() as patch:
    patch.setattr(MultiHeadLatentAttention, "__call__", keeping_its_input)
    found = nnx.to_flat_state(jax.jit(run)(state, data))
  return {path[:-1]: np.asarray(x.get_value()[0], np.float64) for path, x in found if path[-1] == "its_input"}


def rms_norm(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def rotated(x, positions, theta):
  """x [B, T, .., r], pairs interleaved; the pairs of the result stand half a vector apart."""
  half = x.shape[-1] // 2
  angle = positions[..., None] * theta ** (-np.arange(half) / half)  # [B, T, half]
  angle = angle.reshape(*positions.shape, *(1,) * (x.ndim - 3), half)
  a, b = x[..., 0::2], x[..., 1::2]
  return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def largest_logits(cfg, x, weights, data):
  """[H]: of one MLA layer over all rows, between tokens of one document. weights: {(name, kind): array}, x [B, T, C]."""
  nope, rank = cfg.qk_nope_head_dim, cfg.kv_lora_rank
  positions = data["inputs_position"]
  q = rms_norm(x @ weights["wq_a", "kernel"], weights["q_norm", "scale"])
  q = np.einsum("btr,rhd->bthd", q, weights["wq_b", "kernel"])
  latent = x @ weights["wkv_a", "kernel"]
  k = rms_norm(latent[..., :rank], weights["kv_norm", "scale"])
  k = np.einsum("btr,rhd->bthd", k, weights["wkv_b", "kernel"][..., :nope])
  logits = np.einsum("bihd,bjhd->bhij", q[..., :nope], k)
  rotated_q, rotated_k = (rotated(y, positions, cfg.rope_max_timescale) for y in (q[..., nope:], latent[..., rank:]))
  logits += np.einsum("bihd,bjd->bhij", rotated_q, rotated_k)
  segments = data["inputs_segmentation"]
  seen = np.tri(x.shape[1], dtype=bool) & (segments[:, :, None] == segments[:, None, :])
  logits *= (nope + cfg.qk_rope_head_dim) ** -0.5
  return np.where(seen[:, None], logits, -np.inf).max((0, 2, 3))


@functools.cache
def expected():
  """({path of an MLA layer: its largest logits [H]}, the batch); unscanned paths."""
  cfg = tiny.config(**SETTINGS)
  data = batch(cfg)
  weights = {path: value.astype(np.float64) for path, value in tiny.weights(cfg).items()}
  found = {}
  for layer, x in inputs_of_mla(cfg, data).items():
    own = {path[-2:]: value for path, value in weights.items() if path[: len(layer)] == layer}
    found[layer] = largest_logits(cfg, x, own, data)
  return found, data


def factors(path, logits, nope, size):
  """[H, size] by which a step multiplies a weight [.., H, size] of a layer with these largest logits [H]; 1 of others."""
  if path[-2] not in ("wq_b", "wkv_b"):
    return 1.0
  g = np.minimum(1, THRESHOLD / logits)[:, None]
  tail = g if path[-2] == "wq_b" else np.ones_like(g)
  return np.where(np.arange(size) < nope, np.sqrt(g), tail)


@pytest.mark.parametrize(
  "settings",
  [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"scan_layers": True}, marks=pytest.mark.slow),
    pytest.param({"scan_layers": True, "gradient_accumulation_steps": 2, "per_device_batch_size": 2}),
  ],
  ids=str,
)
def test_one_step_without_a_learning_rate(settings):
  logits, data = expected()
  clipped = np.stack(list(logits.values())) > THRESHOLD
  assert clipped.shape == (3, 4) and clipped.any() and not clipped.all()
  run = Run(**SETTINGS, **CLIP, qk_clip_threshold=THRESHOLD, **settings)
  before = run.weights()
  metrics = run.step(data)
  after = run.weights()
  for path, value in after.items():
    own = next((layer for layer in logits if path[: len(layer)] == layer), None)
    factor = factors(path, logits[own], run.config.qk_nope_head_dim, value.shape[-1]) if own else 1.0
    np.testing.assert_allclose(value, before[path] * factor, rtol=1e-5, err_msg=".".join(path))
  squares = sum(np.sum(np.square(value, dtype=np.float64)) for path, value in after.items() if path[-1] != "bias")
  assert metrics["learning/param_norm"] == pytest.approx(np.sqrt(squares), rel=1e-5)
  assert metrics["learning/max_logits"] == pytest.approx(max(map(np.max, logits.values())), rel=1e-5)


@pytest.mark.parametrize("query", ["wq_b", "query"])
@pytest.mark.parametrize("skipped", [None, 0.0, 1.0])
def test_negative_logits_and_skipped_steps(query, skipped):
  """Heads whose largest logits are -3 and 12, threshold 3; `query` is the kernel of a model without q_lora_rank."""
  kernels = {(query, "kernel"): nnx.Param(jnp.ones((5, 2, 3))), ("wkv_b", "kernel"): nnx.Param(jnp.ones((5, 2, 3)))}
  state = {("mla", *path): kernel for path, kernel in kernels.items()}
  state["mla", qk_clip.LARGEST_LOGIT] = qk_clip.LargestLogit(jnp.array([-3.0, 12.0]))
  config = types.SimpleNamespace(qk_clip_threshold=3.0, qk_nope_head_dim=2, param_scan_axis=1)
  clipped, largest = qk_clip.clip(nnx.from_flat_state(list(state.items())), config, skipped)
  assert largest == 12.0
  found = {path[1]: np.asarray(kernel.get_value()) for path, kernel in nnx.to_flat_state(clipped)}
  assert set(found) == {query, "wkv_b"}
  rows = np.ones((5, 3))
  for name, of_rest in ((query, 0.25), ("wkv_b", 1.0)):
    factor = [1.0, 1.0, 1.0] if skipped else [0.5, 0.5, of_rest]
    np.testing.assert_allclose(found[name], np.stack([rows, rows * factor], axis=1), rtol=1e-6)
