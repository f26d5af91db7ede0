"""YaRN: rope_scaling of a config.json, the rotation and the softmax scale, against formulas written out in float64."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxtext_ling2.checkpoint import hf_config, hf_rope
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.model.rope import rotary_embedding
from maxtext_ling2.ops.fused_norm import qk_norm_rope

BASE = {"rope_theta": 6e6, "max_position_embeddings": 131072, "head_dim": 128, "partial_rotary_factor": 0.5}
BASE |= {"qk_rope_head_dim": 64, "hidden_size": 64, "num_attention_heads": 2}
SCALING = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

# name -> (rope_scaling, attention factor, m of the softmax scale m^2)
RULES = {
  "no mscale": ({}, 0.1 * math.log(4) + 1, 1.0),
  "both alike": ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 0.1 * math.log(4) + 1),
  "both": (
    {"mscale": 0.707, "mscale_all_dim": 1.5},
    (0.0707 * math.log(4) + 1) / (0.15 * math.log(4) + 1),
    0.15 * math.log(4) + 1,
  ),
  "all_dim alone": ({"mscale_all_dim": 0.8}, 0.1 * math.log(4) + 1, 0.08 * math.log(4) + 1),
  "all_dim of zero": ({"mscale": 1.0, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1, 1.0),
  "given": ({"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.25, 0.1 * math.log(4) + 1),
  "betas": ({"beta_fast": 16, "beta_slow": 2}, 0.1 * math.log(4) + 1, 1.0),
  "not truncated": ({"truncate": False}, 0.1 * math.log(4) + 1, 1.0),
}


def settings(scaling):
  raw = BASE | {"rope_scaling": SCALING | scaling}
  assert list(hf_rope.validate(raw)) == []
  return hf_rope.to_maxtext(raw)


def maxtext(scaling, **more):
  """A MaxText config with these settings."""
  config = {"rope_max_timescale": 6_000_000, "max_position_embeddings": 131072, **settings(scaling), **more}
  return session.make_config(model_name="ling2-tiny", **session.FLOAT32_SETTINGS, **config)


def frequencies(scaling, dims=64, theta=6e6):
  """By the paper: pair j turns L * f_j / 2 pi times within the original length L."""
  scaling = {"beta_fast": 32, "beta_slow": 1, "truncate": True} | SCALING | scaling
  j = np.arange(dims // 2, dtype=np.float64)
  plain = theta ** (-2 * j / dims)
  boundaries = [
    dims / (2 * np.log(theta)) * np.log(scaling["original_max_position_embeddings"] / (2 * np.pi * turns))
    for turns in (scaling["beta_fast"], scaling["beta_slow"])
  ]
  if scaling["truncate"]:
    boundaries = [np.floor(boundaries[0]), np.ceil(boundaries[1])]
  low, high = max(boundaries[0], 0), min(boundaries[1], dims - 1)
  ramp = np.clip((j - low) / (high - low), 0, 1)
  return plain / scaling["factor"] * ramp + plain * (1 - ramp)


def rotate(x, positions, inverse, factor, interleaved):
  """Rotation of pairs as complex numbers, [T, H, D] float64, where they stood."""
  half = x.shape[-1] // 2
  pairs = (x[..., 0::2] + 1j * x[..., 1::2]) if interleaved else (x[..., :half] + 1j * x[..., half:])
  turned = pairs * factor * np.exp(1j * positions[:, None, None] * inverse)
  parts = [turned.real, turned.imag]
  return np.stack(parts, axis=-1).reshape(x.shape) if interleaved else np.concatenate(parts, axis=-1)


@pytest.mark.parametrize(("scaling", "factor", "_"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("interleaved", [False, True], ids=["gla", "mla"])
def test_rotation(scaling, factor, _, interleaved):
  config = maxtext(scaling)
  embedding = rotary_embedding(config, None, 64, interleaved, nnx.Rngs(0))
  x = np.random.default_rng(0).standard_normal((1, 9, 2, 64)).astype(np.float32)
  positions = np.array([0, 1, 2, 5, 17, 100, 999, 2048, 4095])
  ours = np.asarray(embedding(jnp.asarray(x), jnp.asarray(positions)[None]))[0]
  expected = rotate(x[0].astype(np.float64), positions, frequencies(scaling), factor, interleaved)
  close(ours, expected)
  if not interleaved:  # linear attention does it in a stage of its own, with these tables
    tables = embedding.tables(jnp.asarray(positions)[None], 64)
    stage = qk_norm_rope(jnp.asarray(x.reshape(1, 9, 128)), None, *tables, rotated=64, epsilon=0.0, backend="chunked")
    close(np.asarray(stage).reshape(9, 2, 64), expected)


def close(ours, expected):
  np.testing.assert_allclose(ours, expected, atol=2e-3)  # float32 angles up to 4095 radians
  np.testing.assert_allclose(ours[:5], expected[:5], atol=2e-5)


def test_rotation_of_pairs_keeps_bfloat16_exact_in_both_directions():
  """Its gradient is the rotation back, rounded once, and every product multiplies bfloat16 by a permutation."""
  embedding = rotary_embedding(maxtext({}), None, 64, True, nnx.Rngs(0))
  rng = np.random.default_rng(0)
  x, dy = (jnp.asarray(rng.standard_normal((1, 9, 2, 64)), jnp.bfloat16) for _ in range(2))
  positions = jnp.arange(9)[None]

  def run(x, dy):
    y, pull = jax.vjp(lambda x: embedding(x, positions), x)
    return y, pull(dy)[0]

  embedding.fprop_dtype = jnp.float32
  wide = run(x.astype(jnp.float32), dy.astype(jnp.float32))
  back = rotate(np.asarray(dy[0], np.float64), -np.arange(9), frequencies({}), 0.1 * math.log(4) + 1, True)
  np.testing.assert_allclose(wide[1][0], back, atol=2e-5)
  embedding.fprop_dtype = jnp.bfloat16
  for found, expected in zip(run(x, dy), wide, strict=True):
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
  products = re.findall(r"dot_general .*: (.*)", jax.jit(run).lower(x, dy).as_text())
  assert products == ["(tensor<1x9x2x64xbf16>, tensor<64x64xbf16>) -> tensor<1x9x2x64xf32>"] * 2


@pytest.mark.parametrize(("scaling", "_", "m"), RULES.values(), ids=RULES)
def test_softmax_scale_of_mla(scaling, _, m):
  from maxtext_ling2.model.mla import MultiHeadLatentAttention

  config = maxtext(scaling)
  mesh = session.make_mesh(config)
  with session.model_context(config, mesh):
    layer = nnx.eval_shape(
      lambda: MultiHeadLatentAttention(config, mesh, "train", None, (1, 8, config.emb_dim), nnx.Rngs(0))
    )
  scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
  assert layer.softmax_scale == pytest.approx(scale * m**2, rel=1e-12)


def test_maxtexts_own_rule_without_an_origin_in_hugging_face():
  """rope_mscale_all_dim below 0: what MaxText itself would compute."""
  from maxtext_ling2.model import yarn

  config = SimpleNamespace(rope_mscale_all_dim=-1.0, max_position_embeddings=8, original_max_position_embeddings=4)
  config.rope_type = "yarn"
  config.mscale, config.rope_attention_factor, config.rope_attention_scaling, config.rope_factor = 0.5, 0.0, False, 40
  assert yarn.softmax_mscale(config) == 0.5 and yarn.attention_factor(config) == 1.0
  config.rope_attention_scaling = True
  assert yarn.attention_factor(config) == 0.1 * math.log(40) + 1
  config.max_position_embeddings = 4
  assert yarn.softmax_mscale(config) is None


def test_without_yarn_there_is_no_factor_and_one_warning(caplog):
  from maxtext_ling2.configs import validation
  from maxtext_ling2.model import yarn

  validation._warn_once.cache_clear()
  with caplog.at_level("WARNING", "maxtext_ling2"):
    for length in (16, 16):
      settings = {"max_position_embeddings": 8192, "original_max_position_embeddings": 4096, "max_target_length": length}
      config = session.make_config(model_name="ling2-tiny", override_model_config=True, **settings)
  assert yarn.softmax_mscale(config) is None
  (line,) = (message for message in caplog.messages if "softmax" in message)
  assert "max_position_embeddings=8192" in line and "original_max_position_embeddings=4096" in line


@pytest.mark.parametrize(("scaling", "factor", "m"), RULES.values(), ids=RULES)
def test_exported_again_it_means_the_same(scaling, factor, m):
  written = hf_rope.from_maxtext(maxtext(scaling))
  again = hf_rope.to_maxtext(BASE | {"rope_scaling": written})
  assert again == settings(scaling)
  assert written["attention_factor"] == pytest.approx(factor, rel=1e-12)
  assert 0.1 * written["mscale_all_dim"] * math.log(4) + 1 == pytest.approx(m, rel=1e-12)


@pytest.mark.parametrize(
  ("scaling", "words"),
  [
    ({"factor": 8.0}, "rope_scaling.factor=8.0: not max_position_embeddings / original_max_position_embeddings = 4.0"),
    ({"factor": 4.5}, "rope_scaling.factor=4.5: not a positive integer"),
    ({"beta_fast": 31.5}, "rope_scaling.beta_fast=31.5"),
    ({"type": "dynamic"}, "not YaRN"),
    ({"type": "longrope"}, "not YaRN"),
    ({"long_factor": [1.0]}, "rope_scaling.long_factor=[1.0]"),
    ({"mscale": "1"}, "rope_scaling.mscale='1': not a number"),
  ],
)
def test_scalings_that_cannot_be_represented(scaling, words):
  assert any(words in sentence for sentence in hf_rope.validate(BASE | {"rope_scaling": SCALING | scaling}))


def test_frequencies_of_gla_and_mla_must_be_the_same():
  (sentence,) = hf_rope.validate(BASE | {"partial_rotary_factor": 0.25})
  assert "head_dim * factor is 32, not qk_rope_head_dim=64" in sentence


def test_no_scaling():
  for nothing in (None, {}, {"rope_type": "default"}):
    raw = BASE | {"rope_scaling": nothing}
    assert list(hf_rope.validate(raw)) == []
    assert hf_rope.to_maxtext(raw) == {"rope_type": "default", "original_max_position_embeddings": 131072}


def test_the_whole_config_json():
  import json
  from pathlib import Path

  raw = json.loads((Path(__file__).parent.parent / "golden" / "one_cycle" / "config.json").read_text())
  raw |= {"rope_scaling": SCALING | {"original_max_position_embeddings": 64, "mscale_all_dim": 1.0}}
  found = hf_config.to_maxtext(raw)
  assert (found["rope_type"], found["rope_factor"], found["original_max_position_embeddings"]) == ("yarn", 4, 64)
  assert found["rope_mscale_all_dim"] == 1.0
