"""What `maxtext-ling2 plan --list` prints: models, chips, topologies and recipes that are known."""

import itertools
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from maxtext_ling2.configs.validation import CUSTOM_MODEL
from maxtext_ling2.maxtext_api import recipes
from maxtext_ling2.plan.chips import CHIPS
from maxtext_ling2.plugin import MODEL_NAMES


def print_all(console: Console) -> None:
  """Prints them."""
  models = ", ".join(sorted({*MODEL_NAMES} - {CUSTOM_MODEL}))
  console.print(f"models: {models}; or a YAML file, such as `maxtext-ling2 config` writes")
  console.print(_chips())
  console.print("topologies, GENERATION-SIZE:")
  for generation in CHIPS:
    console.print(f"  {generation}: {', '.join(sizes(generation))}")
  console.print("recipes for --recipe:")
  for name in recipes.names():
    console.print(f"  {name}: {recipes.title(name)}")


def _chips() -> Table:
  table = Table("chip", "bfloat16 TFLOP/s", "HBM GiB", "HBM GB/s", "ICI GB/s", title="chips, per device")
  for chip in CHIPS.values():
    figures = (chip.flops / 1e12, chip.memory / 2**30, chip.memory_bandwidth / 1e9, chip.ici_bandwidth / 1e9)
    table.add_row(chip.name, *(f"{figure:,.4g}" for figure in figures))
  return table


def sizes(generation: str) -> Iterator[str]:
  """The sizes of MaxText's topologies of a generation; where many follow at equal steps, the first and the last."""
  from maxtext.utils import accelerator_to_spec_map

  known = accelerator_to_spec_map.UserFacingNameToSystemCharacteristics
  found = sorted(int(name.partition("-")[2]) for name in known if name.startswith(f"{generation}-"))
  steps = [after - before for before, after in itertools.pairwise(found)]
  first = 0
  while first < len(found):
    last = first + 1
    while last < len(found) and steps[last - 1] == steps[first]:
      last += 1
    if last - first > 4:
      yield f"{found[first]} to {found[last - 1]} in steps of {steps[first]}"
    else:
      last = first + 1
      yield str(found[first])
    first = last
