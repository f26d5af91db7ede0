"""`plan --search`: its arithmetic, from real configs; nothing is compiled."""

import pytest

from maxtext_ling2 import overrides, recipes
from maxtext_ling2.host.compile_step import devices_of, read_config
from maxtext_ling2.plan import command, search
from maxtext_ling2.plan.chips import chip_of, grid_of

QUIET = overrides.texts(command.DEFAULTS)


def rank(topology, model, **settings):
  yml, words = command._model(model)
  meshes = {mesh: command._mesh(mesh) | search.settings_of(mesh) for mesh in search.MESHES}
  return search.ranked(yml, topology, meshes, words | overrides.texts(settings), search.ROWS)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_a_config_of_its_model_and_is_found_by_the_search(name):
  """MaxText accepts it, and one of the two candidates that the search compiles first is as fast by this arithmetic."""
  model, topology = next(
    (name[: name.index(chip) - 1], name[name.index(chip) :]) for chip in ("v5p", "v6e", "tpu7x") if chip in name
  )
  config = read_config(
    str(recipes.file_of(name)), overrides.join({**overrides.texts(command.QUIET), "compile_topology": topology})
  )
  assert (config.model_name, config.scan_layers) == (model, True)
  assert {key: getattr(config, key) for key in search.RING_OF_EXPERTS} == search.RING_OF_EXPERTS
  chip = chip_of(topology)
  edge = chip.edge_bandwidth(*grid_of(topology))
  ours = search.candidate("", "", config, chip, devices_of(topology), edge)
  assert ours.memory < chip.memory
  best = rank(topology, model, max_target_length=config.max_target_length)[: search.COMPILED]
  assert min(one.device_seconds_per_token for one in best) <= ours.device_seconds_per_token
