"""Prefill and step-by-step decoding through MaxText's MaxEngine equal the full forward pass, at every position."""

import functools

import numpy as np
import pytest

import tiny
from maxtext_ling2.maxtext_api import session
from maxtext_ling2.maxtext_api.engine import Engine, EngineError

LENGTHS = (1, 2, 63, 64, 65, 200)
STEPS = 40
PREFILL = 200
SMALL = {
  "base_num_decoder_layers": 5,  # GLA (dense), MLA; GLA, MLA, which scan_layers stacks; a trailing MLA layer
  "inhomogeneous_layer_cycle_interval": 2,
  "mtp_num_layers": 1,
  "max_prefill_predict_length": PREFILL,
  "max_target_length": PREFILL + STEPS,
}


@functools.cache
def tokens():
  """One row of token ids for each prompt length, [6, 240]."""
  return np.random.default_rng(0).integers(1, 64, (len(LENGTHS), PREFILL + STEPS)).astype(np.int32)


def forward(rows, **settings):
  """Logits [B, T, V] of the full forward pass."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  cfg = tiny.config(**SMALL | settings)
  model, mesh = tiny.model(cfg)
  positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
  graph, state = nnx.split(model)

  def run(state, ids):
    return nnx.merge(graph, state, copy=True)(ids, positions, jnp.ones_like(ids), enable_dropout=False)

  with session.model_context(cfg, mesh):
    return np.asarray(jax.jit(run)(state, rows))


@functools.cache
def expected():
  return forward(tokens())


def engine(**settings):
  cfg = tiny.config(**SMALL | settings)
  return Engine(cfg, tiny.weights(cfg))


def decode(engine, rows, lengths, slots=None):
  """Prefills some rows into slots and decodes the rest of each with the row's own tokens; logits [rows, STEPS + 1, V]."""
  slots = range(len(lengths)) if slots is None else slots
  found = [[engine.prefill(row[:length], slot)[1]] for row, length, slot in zip(rows, lengths, slots, strict=True)]
  for step in range(STEPS):
    _, logits = engine.step({slot: row[n + step] for row, n, slot in zip(rows, lengths, slots, strict=True)})
    for result, slot in zip(found, slots, strict=True):
      result.append(logits[slot])
  return np.array(found)


def compare(found, reference, lengths, tolerance=1e-4):
  for logits, row, length in zip(found, reference, lengths, strict=True):
    np.testing.assert_allclose(logits, row[length - 1 : length + STEPS], rtol=0, atol=tolerance, err_msg=f"{length}")


@pytest.fixture(
  scope="module", params=[pytest.param(False, id="unscanned", marks=pytest.mark.slow), pytest.param(True, id="scanned")]
)
def three_slots(request):
  return engine(scan_layers=request.param, per_device_batch_size=3)


def test_batched_decode_with_unequal_lengths_and_slot_reuse(three_slots):
  for rows in ([0, 3, 5], [2, 1, 4]):
    lengths = [LENGTHS[row] for row in rows]
    compare(decode(three_slots, tokens()[rows], lengths), expected()[rows], lengths)


def test_slots_at_different_positions(three_slots):
  """A prompt comes into one slot while another is in the middle of its text."""
  first, second = tokens()[2], tokens()[3]
  for slot in range(3):
    three_slots.free(slot)
  three_slots.prefill(first[:63], 0)
  for step in range(10):
    _, logits = three_slots.step({0: first[63 + step]})
  np.testing.assert_allclose(logits[0], expected()[2][72], atol=1e-4)
  three_slots.prefill(second[:64], 1)
  for step in range(10):
    _, logits = three_slots.step({0: first[73 + step], 1: second[64 + step]})
  np.testing.assert_allclose(logits[0], expected()[2][82], atol=1e-4)
  np.testing.assert_allclose(logits[1], expected()[3][73], atol=1e-4)


@pytest.mark.slow
def test_single_slot_decode():
  one = engine(per_device_batch_size=1)
  for row in (0, 5):
    compare(decode(one, tokens()[[row]], [LENGTHS[row]]), expected()[[row]], [LENGTHS[row]])


def test_state_of_linear_attention_is_float32_in_bfloat16_too():
  half = engine(per_device_batch_size=1, dtype="bfloat16", matmul_precision="default")
  sizes = [value.nbytes for path, value in half.caches().items() if path.endswith("recurrent_state")]
  assert sum(sizes) == 2 * 4 * 8 * 8 * 4  # two GLA layers, 4 heads, 8 x 8 float32, whatever the context
  dtypes = {path.rpartition("/")[2]: str(value.dtype) for path, value in half.caches().items()}
  assert dtypes["recurrent_state"] == "float32"
  assert dtypes["cached_prefill_key"] == "bfloat16"


@pytest.mark.parametrize("field", ["quantize_kvcache", "use_chunked_prefill", "mla_naive_kvcache"])
def test_what_the_compressed_cache_cannot_do_is_refused(field):
  """MaxText asserts on the first two in the middle of a prefill, and computes nonsense shapes with the third."""
  with pytest.raises(ValueError, match=f"{field}=(T|t)rue: "):
    tiny.config(**SMALL, **{field: True})


@pytest.mark.slow
def test_decode_in_bfloat16_is_as_far_off_as_the_full_pass_in_bfloat16():
  """Rounding, not the cache: the error against float32 is that of a bfloat16 forward pass."""
  half = {"dtype": "bfloat16", "matmul_precision": "default"}
  found = decode(engine(per_device_batch_size=1, **half), tokens()[[3]], [64])[0].astype(np.float32)
  full = forward(tokens()[[3]], **half)[0].astype(np.float32)
  exact = expected()[3]
  rows = slice(63, 64 + STEPS)
  decode_error, full_error = (np.sqrt(np.mean((x - exact[rows]) ** 2)) for x in (found, full[rows]))
  assert decode_error < 1.5 * full_error


@pytest.mark.slow
def test_cache_of_linear_attention_does_not_grow_with_the_context():
  def sizes(target):
    one = engine(per_device_batch_size=1, max_target_length=target)
    caches = {path: value.nbytes for path, value in one.caches().items()}
    state = sum(size for path, size in caches.items() if path.endswith("recurrent_state"))
    return state, sum(caches.values()) - state

  (state, others), (long_state, long_others) = sizes(240), sizes(400)
  assert state == long_state == 2 * 4 * 8 * 8 * 4  # two GLA layers, 4 heads, 8 x 8 float32
  assert long_others > others


@pytest.mark.slow
def test_greedy_tokens():
  greedy = engine(per_device_batch_size=1, decode_sampling_strategy="greedy")
  prompt = tokens()[3][:64]
  token, logits = greedy.prefill(prompt, 0)
  assert token == logits.argmax()
  text = list(greedy.stream(prompt, 8))
  rows = tokens().copy()  # as long as those of `expected`, for the same program
  rows[0, : 64 + 8] = [*prompt, *text]
  np.testing.assert_array_equal(forward(rows)[0, 63 : 63 + 8].argmax(-1), text)
  assert list(greedy.stream(prompt, 8, stop=text[3:4])) == text[: text.index(text[3])]


@pytest.mark.slow
def test_sampled_tokens_are_others():
  prompt = tokens()[3][:64]
  text = list(engine(per_device_batch_size=1, decode_sampling_strategy="greedy").stream(prompt, 8))
  sampled = engine(per_device_batch_size=1, decode_sampling_strategy="weighted", decode_sampling_temperature=5.0)
  assert list(sampled.stream(prompt, 8)) != text


def test_what_does_not_fit_is_refused(three_slots):
  with pytest.raises(EngineError, match="prompt of 0 tokens"):
    three_slots.prefill([], 0)
  with pytest.raises(EngineError, match="max_prefill_predict_length=200"):
    three_slots.prefill([1] * 201, 0)
  with pytest.raises(EngineError, match="slot 3"):
    three_slots.prefill([1], 3)
  for slot in range(3):
    three_slots.free(slot)
  three_slots.prefill([1], 0)
  for _ in range(STEPS):
    three_slots.step()
  with pytest.raises(EngineError, match="raise max_target_length"):
    three_slots.step()


@pytest.mark.parametrize("biases", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_engine_loads_a_checkpoint(tmp_path, caplog, biases):
  """Through MaxText's `from_pretrained`; MTP's weights are left alone, and so is a lack of router biases."""
  from orbax.checkpoint import v1 as ocp

  from maxtext_ling2.checkpoint.import_hf import nested

  values = tiny.weights(tiny.config(**SMALL))
  stored = {path: value for path, value in values.items() if biases or path[-2:] != ("gate", "bias")}
  assert any(path[0] == "mtp_block" for path in stored)
  ocp.save_checkpointables(tmp_path / "0", {"items": {"params": {"params": nested(stored)}}})
  cfg = tiny.config(**SMALL, per_device_batch_size=1, load_parameters_path=str(tmp_path / "0" / "items"))
  loaded = Engine(cfg)
  assert ("has no router biases" in caplog.text) is not biases
  row = tokens()[2]
  found = [loaded.prefill(row[:63], 0)[1], loaded.step({0: row[63]})[1][0]]
  if biases:
    np.testing.assert_allclose(found, expected()[2, 62:64], rtol=0, atol=1e-4)
  else:
    without = {path: 0 * value if path[-2:] == ("gate", "bias") else value for path, value in values.items()}
    given = Engine(tiny.config(**SMALL, per_device_batch_size=1), without)
    np.testing.assert_array_equal(found, [given.prefill(row[:63], 0)[1], given.step({0: row[63]})[1][0]])


def test_flops_of_a_decoding_step_of_linear_attention_do_not_depend_on_the_context():
  """XLA's own count, of one attention alone; MLA's grow with its cache."""

  def flops(mla, context):
    sizes = {"max_prefill_predict_length": context, "max_target_length": context + STEPS, "per_device_batch_size": 1}
    cfg = tiny.config(**SMALL | sizes)
    return attention_step(cfg, mla).cost_analysis()["flops"]

  assert flops(False, 200) == flops(False, 2000) > 0
  assert flops(True, 2000) > 5 * flops(True, 200)


def attention_step(cfg, mla):
  """The compiled decoding step of one attention."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from maxtext_ling2.model.layer import Ling2DecoderLayer

  mesh, mode = session.make_mesh(cfg), "autoregressive"
  with session.model_context(cfg, mesh):
    layer = Ling2DecoderLayer(cfg, mesh, mode, nnx.Rngs(0), mla=mla, dense=True, layer_idx=0)
    graph, state = nnx.split(layer.self_attention)

    def run(state, x, positions):
      attention, segments = nnx.merge(graph, state), jnp.ones_like(positions)
      if mla:
        y = attention(x, x, positions, decoder_segment_ids=segments, deterministic=True, model_mode=mode)[0]
      else:
        y = attention(x, segments, positions, 0, mode)
      return y, nnx.state(attention)

    return jax.jit(run).lower(state, jnp.ones((1, 1, cfg.emb_dim)), jnp.ones((1, 1), jnp.int32)).compile()
