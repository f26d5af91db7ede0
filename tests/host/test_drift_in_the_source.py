"""MaxText moves on, and all of it is consistent: copies of its source in which one thing is renamed, moved or re-signed.

Each copy (drift_source.py) trains a stock model by MaxText's own command (drift_runs.py), to the same losses as without
the plugin and with one warning at most, and refuses LING2 by an error that names the seam.
"""

import drift_runs
import drift_source
import pytest
from drift_cases import REGISTRY, WAY_OUT, Case, cases, first, parametrize, refused

pytestmark = [pytest.mark.drift, pytest.mark.slow]

BREAKS_STOCK = {}
"""Case -> why the copy itself does not work, so that another expectation of the seam stands for it."""

COMMANDS = {
  "result tokens": "maxtext.inference.decode_multi",
  "Hugging Face tables": "maxtext.checkpoint_conversion.to_maxtext",
  "to_maxtext": "maxtext.checkpoint_conversion.to_maxtext",
  "to_huggingface": "maxtext.checkpoint_conversion.to_huggingface",
}
"""Who needs the seams that training does not."""


def each_module():
  """The modules after whose import seams are applied, with the first of these."""
  seams = {seam.module: seam for seam in reversed(REGISTRY.seams)}
  return [Case("moved", seam.name, module, "") for module, seam in reversed(seams.items())]


def one_each(kind):
  """For each seam the first of its expectations to which this can happen in MaxText."""
  return first(case for case in cases(kind) if case.module.startswith("maxtext.") and case.id not in BREAKS_STOCK)


SLOW = [*one_each("renamed"), *one_each("resigned"), *each_module()]


def copy(sources, case, folder):
  """A copy of MaxText with this one thing otherwise."""
  if case.kind == "renamed":
    changes = drift_source.renamed(sources, case.module, case.path.partition(".")[0])
  elif case.kind == "resigned":
    changes = drift_source.resigned(sources, case.module, case.path, case.parameter)
  else:
    changes = drift_source.moved(sources, case.module)
  assert changes
  drift_source.plant(folder, sources, changes)
  return folder


class World:
  """Copies of MaxText and runs on them, with the losses of the installed one without the plugin."""

  def __init__(self, folder):
    self.folder, self.sources = folder, drift_source.Sources()
    arguments = drift_runs.words("llama2-7b", folder / "alone", self.sources.folder)
    alone = drift_runs.run_alone(folder / "alone", "", drift_runs.TRAIN, arguments, MAXTEXT_LING2_DISABLE="1")
    assert (alone.code, alone.warnings) == (0, []), alone.text[-3000:]
    self.losses = drift_runs.losses(alone.folder)
    assert len(self.losses) == drift_runs.STEPS and len(set(self.losses)) == drift_runs.STEPS
    self.zygote = drift_runs.Zygote(folder, alone.modules)

  def run(self, case, module, model):
    tree, folder = self.folder / case.id / "maxtext", self.folder / case.id / model
    arguments = drift_runs.words(model, folder, tree / "maxtext")
    return self.zygote.run(folder, tree, module, arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  made = World(tmp_path_factory.mktemp("drift"))
  yield made
  made.zygote.close()


def test_nothing_changed(world):
  """What the other cases are compared with: the same runs on a copy that is the same."""
  case = Case("same", "none", "", "none")
  drift_source.plant(world.folder / case.id / "maxtext", world.sources, {})
  run = world.run(case, drift_runs.TRAIN, "llama2-7b")
  assert (run.code, run.warnings) == (0, []), run.text[-3000:]
  assert drift_runs.losses(run.folder) == world.losses


@parametrize(SLOW)
def test_changed_in_the_source(world, case):
  copy(world.sources, case, world.folder / case.id / "maxtext")
  run = world.run(case, drift_runs.TRAIN, "llama2-7b")
  assert run.code == 0, run.text[-3000:]
  assert drift_runs.losses(run.folder) == world.losses
  assert len(run.warnings) <= 1
  assert all(blamed(text, case) for text in run.warnings)
  run = world.run(case, COMMANDS.get(case.seam, drift_runs.TRAIN), "ling2-tiny")
  assert run.code != 0 and blamed(run.text, case), run.text[-3000:]


def blamed(text, case):
  """As `refused`; a module that is not there may be missed first by another seam, which expects something of it."""
  if case.kind != "moved":
    return refused(text, case)
  assert "seam '" in text and case.module in text and WAY_OUT in text
  assert "; found ModuleNotFoundError" in text or "; found the module does not import" in text
  return True
