"""`plan --chip`, `--check` and `--list`: a chip of the user's own, settings without a program, and what exists."""

import dataclasses
import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from maxtext_ling2 import terminal
from maxtext_ling2.host.compile_step import make_mesh
from maxtext_ling2.maxtext_api import recipes
from maxtext_ling2.plan import cache, check, command, estimate, listing, own_chip, search
from maxtext_ling2.plan.chips import CHIPS, slice_of

SETTINGS = {"scan_layers": "false", "log_config": "false", "override_model_config": "true", "per_device_batch_size": "1"}


def text_of(call):
  console = terminal.console(file=io.StringIO())
  return call(console), console.file.getvalue()


def test_figures_of_a_file(tmp_path):
  file = tmp_path / "next.yml"
  file.write_text("name: next\nflops: 1.2e15\nmemory_bandwidth: 2_000_000_000_000\ncores: 2\n")
  figures = own_chip.read(file)
  assert figures == {"name": "next", "flops": 1.2e15, "memory_bandwidth": 2e12, "cores": 2}
  chip = slice_of("v6e-64", figures).chip
  assert chip == dataclasses.replace(CHIPS["v6e"], name="next", flops=1.2e15, memory_bandwidth=2e12, cores=2)
  assert slice_of("v6e-64").chip is not chip and slice_of("v6e-64").chip == CHIPS["v6e"]


def test_twice_the_bandwidth_halves_what_is_bound_by_it():
  """Ranked by arithmetic: ling2-tiny on 8 chips moves and sends at twice the rates, and computes twice as fast."""
  twice = {name: 2 * getattr(CHIPS["v6e"], name) for name in ("flops", "memory_bandwidth", "ici_bandwidth")}
  yml = str(command.maxtext_folder() / "configs" / "base.yml")
  given = {**SETTINGS, "model_name": "ling2-tiny"}
  (one,) = search.ranked(yml, "v6e-8", {"": {}}, given, ["1"])
  (other,) = search.ranked(yml, "v6e-8", {"": {}}, given, ["1"], figures=twice)
  assert other.seconds == pytest.approx(one.seconds / 2, rel=1e-12)
  assert other.memory == one.memory


def test_the_cache_tells_chips_apart():
  config = SimpleNamespace(get_keys=dict)
  assert cache.key(config, "v6e-8", "") == cache.key(config, "v6e-8", "", {})
  assert cache.key(config, "v6e-8", "") != cache.key(config, "v6e-8", "", {"flops": 1e15})


def test_less_memory_of_its_own_does_not_fit(monkeypatch):
  made = estimate.Estimate("v6e-8", "", 8, True, 20 * 2**30, 31 * 2**30)
  monkeypatch.setattr(estimate, "compile_step", lambda *_: None)

  def measured(empty, step, place):
    return dataclasses.replace(made, capacity=place.chip.memory)

  monkeypatch.setattr(estimate, "_measured", measured)
  assert estimate.estimate("base.yml", "v6e-8", "", {}).fits
  small = estimate.estimate("base.yml", "v6e-8", "", {}, {"memory": 16 * 2**30})
  assert (small.fits, small.capacity, small.problem) == (False, 16 * 2**30, "Used 20.00G of the chip's own memory")


def test_check_makes_the_mesh_and_nothing_else(monkeypatch):
  """16 v6e chips are 4 x 4: an axis of 8 cannot be formed, one of 4 can."""
  monkeypatch.setattr(command, "estimate", None)  # whoever compiles fails
  request = command.Request("ling2-tiny", ["v6e-16"], ["expert=8", "expert=4"], ["max_target_length=256"])
  valid, text = text_of(lambda console: command.check_only(console, request))
  assert not valid
  bad, good, last = text.splitlines()
  assert bad.startswith("v6e-16, expert=8: not valid: MaxText refuses this configuration: Failed to find assignment")
  assert good == "v6e-16, expert=4: valid: ling2-tiny, mesh fsdp=4 x expert=4, 16 sequences of 256 tokens per step"
  assert last.startswith("nothing was compiled")
  yml = str(command.maxtext_folder() / "configs" / "base.yml")
  words = ["model_name=ling2-tiny", "override_model_config=true", "compile_topology_num_slices=1", "log_config=false"]
  assert make_mesh(yml, [*words, "compile_topology=v6e-4", "ici_tensor_parallelism=2"])["tensor"] == 2


def test_a_recipe_is_checked_with_its_own_mesh(monkeypatch):
  seen = []
  monkeypatch.setattr(check, "run", lambda console, asked, named: seen.extend(asked) or True)
  assert command.check_only(Console(file=io.StringIO()), command.Request("ling2", ["v5p-64"], recipe="ling2-v5p-64"))
  ((topology, mesh, yml, settings),) = seen
  assert (topology, mesh, yml) == ("v5p-64", "recipe ling2-v5p-64", str(recipes.file_of("ling2-v5p-64")))
  assert "ici_expert_parallelism" not in settings


def test_list():
  _, text = text_of(listing.print_all)
  for name in ("ling2-tiny", *CHIPS, *recipes.names()):
    assert name in text
  assert "ling2-custom" not in text
  assert "  v6e: 1, 4, 8, 16, 32, 64, 128, 256\n" in text
  assert "  v5p: 8, 16, 32, 64, 128 to 8448 in steps of 128, 8704," in text


@pytest.mark.parametrize("generation", CHIPS)
def test_no_size_is_left_out(generation):
  from maxtext.utils import accelerator_to_spec_map

  known = accelerator_to_spec_map.UserFacingNameToSystemCharacteristics
  found = []
  for text in listing.sizes(generation):
    first, _, rest = text.partition(" to ")
    last, _, step = rest.partition(" in steps of ")
    found += range(int(first), int(last) + 1, int(step)) if rest else [int(first)]
  assert sorted(f"{generation}-{size}" for size in found) == sorted(
    name for name in known if name.startswith(f"{generation}-")
  )
