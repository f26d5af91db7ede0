"""What XLA makes of the loss for a TPU slice: bytes and memory, beside MaxText's two forms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FORMS = ("here", "MaxText's loss", "MaxText's MTP loss")


@pytest.fixture(scope="module")
def counted():
  """{form: row} of v6e-64 with 4 sequences per device, compiled now."""
  command = [sys.executable, BENCHMARKS / "loss_traffic.py", "v6e-64", "--rows", "4", "--json"]
  command += [word for form in FORMS for word in ("--form", form)]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return {row["form"]: row for row in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("form", FORMS)
def test_the_figures_of_the_page(counted, form):
  """docs/kernels.md, "The loss", is made from these results."""
  rows = json.loads((BENCHMARKS / "results" / "loss_traffic.json").read_text())["rows"]
  (kept,) = [row for row in rows if (row["topology"], row["rows"], row["form"]) == ("v6e-64", 4, form)]
  for name in ("gigabytes", "teraflops", "ms", "sent", "kept"):
    assert counted[form][name] == pytest.approx(kept[name], rel=0.05), name


def test_less_than_either_form_of_maxtext(counted):
  here, main, mtp = (counted[form] for form in FORMS)
  assert here["gigabytes"] < 0.85 * main["gigabytes"] and here["gigabytes"] < 0.75 * mtp["gigabytes"]
  assert here["kept"] < 1.02 * main["kept"] and here["kept"] < 0.5 * mtp["kept"]


def test_the_logits_are_kept_once_in_bfloat16(counted):
  """Beside them there are the gathered weights, their gradient and the hidden states: at most 1.5 GiB."""
  logits = 4 * 4096 * 157184 * 2 / 2**30
  assert logits < counted["here"]["kept"] < logits + 1.5
