"""`plan --search`: its arithmetic, from real configs; nothing is compiled."""

import pytest

from maxtext_ling2.host.compile_step import read_config
from maxtext_ling2.maxtext_api import overrides, recipes, session
from maxtext_ling2.maxtext_api.start import ConfigError
from maxtext_ling2.plan import command, search
from maxtext_ling2.plan.chips import chip_of, slice_of
from maxtext_ling2.plan.resolved import ModelError


def rank(topology, model, rows=search.ROWS, **settings):
  yml, words = command._model(model)
  meshes = {mesh: command._mesh(mesh) | search.settings_of(mesh) for mesh in search.MESHES}
  return search.ranked(yml, topology, meshes, words | overrides.texts(settings), rows)


def arithmetic(recipe, topology):
  """(config, candidate) of a recipe."""
  words = overrides.texts({**command.QUIET, "compile_topology": topology})
  config = read_config(str(recipes.file_of(recipe)), overrides.join(words))
  place = slice_of(topology)
  return config, search.candidate("", "", config, place, place.devices)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_a_config_of_its_model(name):
  """MaxText accepts it; a ring of experts loses no token; by the search's arithmetic its arrays fit."""
  start = next(place for chip in ("v5p", "v6e", "tpu7x") if (place := name.find(chip)) > 0)
  model, topology = name[: start - 1], name[start:]
  config, one = arithmetic(name, topology)
  assert (config.model_name, config.scan_layers) == (model, True)
  if config.ici_expert_parallelism > 1:
    ring = {key: value for key, value in search.RING_OF_EXPERTS.items() if key != "ragged_gather_reduce_fallback"}
    assert {key: getattr(config, key) for key in ring} == ring
  assert one.memory < chip_of(topology).memory


def test_the_search_finds_what_is_faster_than_the_recipe():
  """Experts on four devices come first: fewer copies of a token than with eight."""
  found = rank("v5p-64", "ling2", rows=["4", "8"], max_target_length=4096)
  assert [one.name for one in found[: search.COMPILED]] == ["expert=4, 8 rows", "expert=4, 4 rows"]
  assert found[-1].name == "fsdp, 4 rows"
  _, recipe = arithmetic("ling2-v5p-64", "v5p-64")
  (same,) = (one for one in found if one.name == "fsdp, 4 rows")
  assert recipe.device_seconds_per_token == pytest.approx(same.device_seconds_per_token)
  assert found[0].device_seconds_per_token < recipe.device_seconds_per_token


def test_two_slices_hold_the_weights_once_each():
  """The same rows per device, twice the tokens; between the slices gradients are reduced, and memory is the same."""
  (one,), (two,) = (
    [found for found in rank("v5p-64", "ling2", rows=["4"], **slices) if found.mesh == "expert=8"]
    for slices in ({}, {"compile_topology_num_slices": 2, "dcn_data_parallelism": 2, "dcn_fsdp_parallelism": 1})
  )
  assert two.memory == pytest.approx(one.memory)
  assert two.device_seconds_per_token == pytest.approx(two.seconds / (4 * 4096))
  assert one.seconds < two.seconds < 1.2 * one.seconds


@pytest.mark.parametrize(
  ("settings", "bytes_per_weight"),
  [
    ({}, 12),
    ({"weight_dtype": "bfloat16"}, 6),
    ({"mu_dtype": "bfloat16"}, 10),
    ({"optimizer_memory_host_offload": True}, 4),
  ],
)
def test_memory_follows_the_dtypes_of_the_state(settings, bytes_per_weight):
  yml, words = command._model("ling2")
  config = read_config(yml, overrides.join({**words, "compile_topology": "v5p-64", **overrides.texts(settings)}))
  assert search._state_bytes(config) == bytes_per_weight


@pytest.mark.parametrize(
  ("settings", "bytes_per_logit"),
  [
    ({}, 2),
    ({"logits_dot_in_fp32": True}, 4),
    ({"num_vocab_tiling": 4}, 2),  # MTP's logits are whole
    ({"num_vocab_tiling": 4, "mtp_num_layers": 0}, 2 / 4),
  ],
)
def test_memory_of_the_logits(settings, bytes_per_logit):
  """What a vocabulary of twice the size adds to memory, besides the state of embedding and output."""
  yml, words = command._model("ling2")
  words |= {"compile_topology": "v5p-64", "per_device_batch_size": "1", "override_model_config": "true"}
  config = read_config(yml, overrides.join({**words, **overrides.texts(settings)}))
  shares = search.Shares.of(config, 32)
  added = search.memory(session.changed(config, vocab_size=2 * config.vocab_size), shares) - search.memory(config, shares)
  state = 12 * 2 * config.emb_dim * config.vocab_size / 32
  assert added - state == pytest.approx(bytes_per_logit * 4096 * config.vocab_size)


def test_the_search_is_for_ling2():
  with pytest.raises(ModelError, match="model_name=llama3-8b, decoder_block=llama2: not a LING2 model"):
    rank("v6e-64", "llama3-8b", rows=["1"])


def test_a_setting_that_all_candidates_refuse_is_named():
  with pytest.raises(ConfigError, match="group_norm_size=7"):
    rank("v6e-64", "ling2", rows=["1"], group_norm_size=7)
