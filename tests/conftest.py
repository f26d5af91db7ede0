"""Environment of all tests: the CPU, no cloud clients, compiled programs kept between runs. `make test` may differ.
After a run, counts of the cases of drift, hostile and matrix by kind.
"""

import os
import sys
from collections import Counter
from pathlib import Path

_CACHE = Path(__file__).parent.parent / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
# MaxText sets XLA_FLAGS to dump each program where nobody has set it; that makes every compilation miss the cache. Tiny
# models run for milliseconds and compile for minutes: without LLVM's optimisations that takes a quarter less.
_FLAGS = ("dump_max_hlo_modules=0", "backend_optimization_level=0", "llvm_disable_expensive_passes=true")
os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in _FLAGS))

import pytest  # noqa: E402

import maxtext_ling2  # noqa: E402, F401  before MaxText, as the .pth file would


@pytest.fixture(autouse=True)
def _random_generator():
  """MaxText's commands set another one for their process, and the weights of a later test would come from it."""
  yield
  if "jax" in sys.modules:
    sys.modules["jax"].config.update("jax_default_prng_impl", "threefry2x32")


def pytest_ignore_collect(collection_path, config):
  """`-m unit` imports the files of unit tests alone: importing the others imports MaxText, which takes 15 seconds."""
  if config.getoption("markexpr").startswith("unit") and collection_path.name.startswith("test_"):
    return "mark.unit" not in collection_path.read_text() or None
  return None


LONGEST = (
  "training/test_accumulation.py",
  "training/test_resume.py",
  "model/test_oracle_trailing_mtp.py",
  "model/test_oracle_one_cycle.py",
  "test_meshes.py",
  "training/test_balancing.py",
  "host/test_engine.py",
  "test_generate.py",
  "training/test_diloco.py",
  "checkpoint/test_trainer_checkpoints.py",
  "ops/test_pallas_tpu.py",
  "training/test_scan.py",
  "training/test_optimizers.py",
  "checkpoint/test_round_trip.py",
  "hostile/test_bad_inputs.py",
  "ops/test_chunked.py",
  "checkpoint/test_commands.py",
  "training/test_two_processes.py",
  "test_stock.py",
  "ops/test_fused_norm.py",
  "training/test_ring_of_experts.py",
  "plan/test_command.py",
  "model/test_fused_layer.py",
  "model/test_mtp.py",
  "test_evaluate.py",
  "training/test_stock_command.py",
  "host/test_drift_in_the_source.py",
  "host/test_drift.py",
)
"""Files of a minute and more, the longest first."""


def pytest_collection_modifyitems(config, items):
  """xdist gives a worker whole files, in this order: with the longest first, both workers end at about the same time."""
  if hasattr(config, "workerinput"):
    places = {f"tests/{file}": place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


KINDS = {
  "test_drift_in_the_source": "in the source",
  "test_environment": "environment",
  "test_startup": "environment",
  "test_real_maxtext": "environment",
}
"""File -> what its cases are, where their names do not say it."""


def _kind(nodeid):
  file, _, test = nodeid.partition("::")
  name, case = Path(file).stem, test.partition("[")[2]
  if name in ("test_matrix", "test_trainer_switches"):
    return test.partition("[")[0].removeprefix("test_").replace("_", " ")
  if name == "test_bad_inputs" and case:
    return f"bad input: {case.partition(': ')[0]}"
  if test.startswith("test_changed_at_run_time"):
    return case.partition("-")[0].replace("resigned", "re-signed")
  return KINDS.get(name, "others")


def pytest_terminal_summary(terminalreporter):
  """Looks at reports alone: all that there is of a test in the process that prints when xdist's workers run it."""
  outcomes = ("passed", "failed", "error")
  reports = [report for outcome in outcomes for report in terminalreporter.stats.get(outcome, ())]
  for mark in ("drift", "hostile", "matrix"):
    kinds = Counter(map(_kind, {report.nodeid for report in reports if mark in getattr(report, "keywords", ())}))
    if kinds:
      counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
      terminalreporter.write_line(f"{mark}: {kinds.total()} cases ({counts})")
