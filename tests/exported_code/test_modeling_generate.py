"""Caches, padding and generation: whatever the way, the logits of one pass over the whole text."""
# ruff: noqa: E402  what follows importorskip needs what it asks for

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from exported_model import CASES, attention, cache_of, golden, largest_error, modeling, recorded, tiny, tokens
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

STATE, TEXT = attention.RecurrentStateLayer, {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
  return tiny(num_hidden_layers=5, layer_group_size=2, num_nextn_predict_layers=1)


@pytest.fixture(autouse=True)
def _no_gradients():
  with torch.no_grad():
    yield


def greedy(model, ids, new):
  """One full pass a token, without any of transformers' generation."""
  for _ in range(new):
    ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
  return ids


@pytest.mark.parametrize("case", CASES)
def test_greedy_of_the_golden_models(case):
  ids = recorded(case, "io_short")["input_ids"]
  expected = greedy(golden(case, 0), ids, 12)
  for use_cache in (True, False):
    assert torch.equal(golden(case, 0).generate(ids, max_new_tokens=12, use_cache=use_cache, **TEXT), expected)


@pytest.mark.parametrize("prompt", [1, 63, 64, 65])
def test_greedy(model, prompt):
  ids = tokens(3, prompt)
  expected = greedy(model, ids, 8)
  for use_cache in (True, False):
    assert torch.equal(model.generate(ids, max_new_tokens=8, use_cache=use_cache, **TEXT), expected)


def test_beams_and_samples(model):
  ids = tokens(2, 9)
  for settings in ({"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 8}):
    results = []
    for use_cache in (True, False):
      torch.manual_seed(0)
      results.append(model.generate(ids, max_new_tokens=10, use_cache=use_cache, **TEXT | settings))
    assert torch.equal(*results)
  assert results[0].shape == (2, 19)


def test_state_is_as_large_after_one_token_as_after_many(model):
  c, sizes = model.config, []
  for length in (1, 10, 130):
    cache = cache_of(model(tokens(2, length), use_cache=True))
    states = [layer.state for layer in cache.layers if isinstance(layer, STATE)]
    assert [isinstance(layer, STATE) for layer in cache.layers] == [True, False, True, False, False]
    assert {(tuple(s.shape), s.dtype) for s in states} == {((2, 4, c.head_dim, c.head_dim), torch.float32)}
    assert cache.get_seq_length() == length
    sizes.append(sum(state.numel() for state in states))
    assert cache.layers[1].keys.shape == (2, 4, length, 20) and cache.layers[1].values.shape == (2, 4, length, 10)
  assert len(set(sizes)) == 1
  cache = model.generate(tokens(2, 5), max_new_tokens=40, return_dict_in_generate=True, **TEXT)[modeling._CACHE]
  assert sum(layer.state.numel() for layer in cache.layers if isinstance(layer, STATE)) == sizes[0]


@pytest.mark.parametrize("pieces", [[130], [1, 129], [64, 66], [65, 1, 1, 63], [10] * 13])
def test_a_prompt_in_pieces(model, pieces):
  ids = tokens(2, sum(pieces))
  expected, cache, logits = model(ids, use_cache=False).logits, None, []
  for piece in ids.split(pieces, 1):
    output = model(piece, past_key_values=cache, use_cache=True)
    cache = cache_of(output)
    logits.append(output.logits)
  assert largest_error(torch.cat(logits, 1), expected) < 1e-5


def padded(rows, side, width):
  """Rows of token ids, filled up with token 0 on one side, and their attention mask."""
  ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
  for i, row in enumerate(rows):
    place = slice(width - len(row), None) if side == "left" else slice(len(row))
    ids[i, place], mask[i, place] = row, 1
  return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
  rows = [tokens(1, length, seed=length)[0] for length in (1, 7, 64, 70, 90)]
  ids, mask = padded(rows, side, 90)
  output = model(ids, attention_mask=mask, use_cache=True)
  noise = model(torch.where(mask == 1, ids, 17), attention_mask=mask).logits
  assert output.logits.isfinite().all()
  for i, row in enumerate(rows):
    alone = model(row[None], use_cache=True)
    assert largest_error(output.logits[i][mask[i] == 1], alone.logits[0]) < 1e-5
    assert largest_error(noise[i][mask[i] == 1], alone.logits[0]) < 1e-5
    states = zip(cache_of(output).layers, cache_of(alone).layers, strict=True)
    for ours, theirs in ((a.state[i], b.state[0]) for a, b in states if isinstance(a, STATE)):
      assert largest_error(ours, theirs) < 1e-6 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_going_on_after_padding(model, side):
  rows = [tokens(1, length, seed=length)[0] for length in (3, 70)]
  ids, mask = padded(rows, side, 70)
  cache, more = cache_of(model(ids, attention_mask=mask, use_cache=True)), tokens(2, 5, seed=9)
  for part in more.split([1, 4], 1):
    mask = torch.cat([mask, torch.ones_like(part)], 1)
    logits = model(part, attention_mask=mask, past_key_values=cache, use_cache=True).logits
  for i, row in enumerate(rows):
    expected = model(torch.cat([row, more[i]])[None]).logits[0, -4:]
    assert largest_error(logits[i], expected) < 1e-5


def test_generation_with_padding_on_the_left(model):
  rows = [tokens(1, length, seed=length)[0] for length in (4, 30)]
  ids, mask = padded(rows, "left", 30)
  for use_cache in (True, False):
    together = model.generate(ids, attention_mask=mask, max_new_tokens=10, use_cache=use_cache, **TEXT)
    for row, generated in zip(rows, together, strict=True):
      assert torch.equal(generated[-10:], greedy(model, row[None], 10)[0, -10:])


def filled_cache(model, ids):
  return cache_of(model(ids, use_cache=True))


def test_caches_that_the_caller_makes(model):
  ids = tokens(2, 12)
  expected = model(ids, use_cache=False).logits[:, 8:]
  for cache in (DynamicCache(), DynamicCache(config=model.config)):
    model(ids[:, :8], past_key_values=cache, use_cache=True)  # fills this one, not a copy
    saved = copy.deepcopy(cache)
    assert cache.get_seq_length() == 8
    for again in (cache, saved):
      assert largest_error(model(ids[:, 8:], past_key_values=again).logits, expected) < 1e-5
    cache.reset()
    if cache.layers[1].get_seq_length() == 0:
      assert largest_error(model(ids, past_key_values=cache).logits[:, 8:], expected) < 1e-5
    else:  # transformers 4 makes the keys zero and keeps them
      with pytest.raises(ValueError, match=r"hold \[0, 12\] tokens"):
        model(ids, past_key_values=cache)
  continued = model.generate(ids, **{modeling._CACHE: filled_cache(model, ids[:, :8])}, max_new_tokens=4, **TEXT)
  assert torch.equal(continued, greedy(model, ids, 4))


def test_rows_of_a_cache(model):
  ids, more = tokens(3, 12), tokens(1, 3, seed=5)
  for change, rows in (
    (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
  ):
    cache = filled_cache(model, ids)
    change(cache)
    logits = model(more.expand(len(rows), -1), past_key_values=cache).logits
    expected = model(torch.cat([ids[rows], more.expand(len(rows), -1)], 1)).logits[:, -3:]
    assert largest_error(logits, expected) < 1e-5


def test_caches_that_cannot_hold_a_state(model):
  ids = tokens(1, 5)
  with pytest.raises(ValueError, match=r"layer 1 of the cache is a StaticLayer; pass a new DynamicCache\(\)"):
    model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32), use_cache=True)
  filled = DynamicCache()
  filled.layers.append(DynamicLayer())
  filled.layers[0].update(torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8))
  with pytest.raises(ValueError, match="layer 0 of the cache is a DynamicLayer"):
    model(ids, past_key_values=filled, use_cache=True)
  with pytest.raises(ValueError, match="cannot drop tokens"):
    filled_cache(model, ids).crop(-1)
  with pytest.raises(ValueError, match="stateful"):
    model.generate(ids, assistant_model=model, max_new_tokens=3, **TEXT)


def test_other_ways_to_call(model):
  ids = tokens(2, 9)
  expected = model(ids).logits
  assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
  assert largest_error(model(ids, logits_to_keep=2).logits, expected[:, -2:]) < 1e-5
  assert largest_error(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, expected[:, [0, 3]]) < 1e-5
  assert torch.equal(model(ids, return_dict=False)[0], expected)
  assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, expected)
  shifted = model(ids, position_ids=torch.arange(100, 109)[None]).logits
  assert largest_error(shifted, expected) < 1e-4  # only distances count
  embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=5, **TEXT)
  assert torch.equal(embedded, greedy(model, ids, 5)[:, -5:])
  assert torch.equal(model.lm_head(model.model(ids).last_hidden_state), expected)


def test_vocabulary_can_grow():
  model = tiny()
  model.resize_token_embeddings(70)
  assert model.config.vocab_size == 70
  assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (70, 32)
  assert model(tokens(1, 4, 70)).logits.shape == (1, 4, 70)
