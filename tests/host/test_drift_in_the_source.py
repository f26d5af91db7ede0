"""MaxText moves on, and all of it is consistent: copies of its source in which one thing is renamed, moved or re-signed.

Each copy (drift_source.py) trains a stock model by MaxText's own command (drift_runs.py), to the same losses as without
the plugin, and refuses LING2 by an error that names the seam; a seam that only some runs need, by a run that does. The
stock model gets one warning where it imports the module of a seam that misses something and that every LING2 run needs.
"""

import drift_runs
import drift_source
import pytest
from drift_cases import COMMANDS, HINT, IN_THE_SOURCE, REGISTRY, SEAMS, USES, Case, parametrize, refused

pytestmark = pytest.mark.drift


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
    self.losses, self.imported = drift_runs.losses(alone.folder), alone.host
    assert len(self.losses) == drift_runs.STEPS and len(set(self.losses)) == drift_runs.STEPS
    self.zygote = drift_runs.Zygote(folder, alone.modules)

  def run(self, case, module, model, **settings):
    tree, folder = self.folder / case.id / "maxtext", self.folder / case.id / model
    arguments = drift_runs.words(model, folder, tree / "maxtext", **settings)
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
  # So there is a warning whenever training needs what is renamed or re-signed.
  assert {seam.module for seam in REGISTRY.seams if seam.needed_for_training} <= set(world.imported)


@parametrize([case for found in IN_THE_SOURCE.values() for case in found], often=IN_THE_SOURCE["renamed"][::12])
def test_changed_in_the_source(world, case):
  copy(world.sources, case, world.folder / case.id / "maxtext")
  run = world.run(case, drift_runs.TRAIN, "llama2-7b")
  assert run.code == 0, run.text[-3000:]
  assert drift_runs.losses(run.folder) == world.losses
  assert len(run.warnings) == warnings_of(world, case)
  assert all(blamed(text, case) for text in run.warnings)
  run = world.run(case, COMMANDS.get(case.seam, drift_runs.TRAIN), "ling2-tiny", **USES.get(case.seam, {}))
  if essential(case):
    assert run.code != 0 and blamed(run.text, case), run.text[-3000:]
  else:
    assert run.code == 0 and any(blamed(text, case) for text in run.warnings), run.text[-3000:]


CORE = [seam for seam in REGISTRY.seams if seam.is_core]


def warnings_of(world, case):
  """One, if MaxText itself imports the module of a seam that all LING2 runs need and that misses something."""
  gone = case.module if case.kind == "moved" else None
  return int(any(seam.module in world.imported and seam.module != gone and misses(seam, case) for seam in CORE))


def essential(case):
  """Whether a LING2 run cannot do without what a case takes away."""
  use = SEAMS[case.seam].use
  return use is None or use.essential or any(seam.module == case.module or misses(seam, case) for seam in CORE)


def misses(seam, case):
  """Whether a seam expects what a case takes away."""
  wanted = [expectation.target.partition(":")[::2] for expectation in seam.expectations]
  names = [path.partition(".")[0] for module, path in wanted if module == case.module]
  return bool(names) and (case.kind == "moved" or case.path.partition(".")[0] in names)


def blamed(text, case):
  """As `refused`; a module that is not there may be missed first by another seam, which expects something of it."""
  if case.kind != "moved":
    return refused(text, case)
  assert "seam '" in text and case.module in text and HINT in text
  assert "; found ModuleNotFoundError" in text or "; found the module does not import" in text
  return True
