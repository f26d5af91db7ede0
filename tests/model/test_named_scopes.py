"""A profile reads like the model: every product of a train step is in a scope that names its part."""

import re
from collections import Counter

import pytest

from tiny import Run, batch

SETTINGS = {"base_num_decoder_layers": 6, "scan_layers": True}  # the first cycle is unscanned, the second scanned
SCOPES = {"gla", "mla", "mlp", "experts", "shared_experts", "router", "norm", "mtp", "logits"}
MIXED = "weight_sum"  # MaxText's scope, inside `experts`, of the sum over a token's experts


@pytest.fixture(scope="module")
def lowered():
  import jax

  # A program from the cache has the names with which it was compiled, of whatever source that was.
  before = jax.config.jax_compilation_cache_include_metadata_in_key
  jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
  run = Run(**SETTINGS)
  with run.context():
    yield run._step.lower(run.state, batch(run.config))
  jax.config.update("jax_compilation_cache_include_metadata_in_key", before)


def products(text):
  """The op_name of every product of an HLO program; "" where it has none."""
  lines = [line for line in text.splitlines() if re.search(r" = \S+ (dot|convolution|ragged-dot)\(", line)]
  return [found[1] if (found := re.search(r'op_name="([^"]*)"', line)) else "" for line in lines]


def scopes(name):
  """The scopes in an op_name, the outermost first; JAX writes those outside of a transformation as jvp(scope)."""
  return [word for word in re.findall(r"\w+", name) if word in SCOPES]


def test_every_product_is_in_a_scope(lowered):
  names = products(lowered.as_text("hlo", debug_info=True))
  assert [name for name in names if not scopes(name)] == []
  places = Counter()
  for name in names:
    direction = "backward" if "transpose(" in name else "forward"
    if "rematted_computation" in name:
      direction = "again"
    place = "mtp" if "mtp" in scopes(name) else "scanned" if "while" in name else "unscanned"
    places[place, scopes(name)[-1], direction] += 1
  expected = {(place, part) for place in ("unscanned", "scanned") for part in ("gla", "mla", "experts", "router", "norm")}
  expected |= {(place, "shared_experts") for place in ("unscanned", "scanned", "mtp")}
  expected |= {("unscanned", "mlp"), ("unscanned", "logits"), ("mtp", "logits")}
  expected |= {("mtp", part) for part in ("mtp", "mla", "experts", "router", "norm")}
  assert {(place, part) for place, part, _ in places} == expected
  for place, part in expected:
    assert places[place, part, "forward"] and places[place, part, "backward"], (place, part)
    # Layers of the decoder are computed again for their gradient; MTP and logits are not.
    assert bool(places[place, part, "again"]) == (place != "mtp" and part != "logits"), (place, part)


@pytest.mark.slow
def test_the_compiled_program_keeps_the_names(lowered):
  """All but those that XLA's rewriting drops, at most as many as there are sums over a token's experts."""
  before, names = (products(text) for text in (lowered.as_text("hlo", debug_info=True), lowered.compile().as_text()))
  assert [name for name in names if name and not scopes(name)] == []
  parts = {scopes(name)[-1] for name in names if name}
  assert parts == SCOPES - {"norm"}  # products of a vector by a number, which XLA makes elementwise
  assert names.count("") <= sum(MIXED in name for name in before)
