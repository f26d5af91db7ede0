"""`maxtext-ling2 doctor` in processes of its own: here, switched off, and left out by the allow-list."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxtext_ling2 import plugin

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "maxtext_ling2", "doctor"]
SITUATIONS = {
  "here": ({}, ["--json"]),
  "disabled": ({"MAXTEXT_LING2_DISABLE": "1"}, ["--json"]),
  "not allowed": ({"MAXTEXT_PLUGINS": "other"}, ["--json"]),
  "disabled, for people": ({"MAXTEXT_LING2_DISABLE": "1"}, []),
  "verbose": ({}, ["--verbose"]),
}
SEAM_MODULE = "maxtext.models.models"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  """Where the first check of all seams is noted."""
  return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def answers(kept):
  """All situations at once: exit status and standard output of each."""
  clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAXTEXT_", "M_"))}
  clean["XDG_CACHE_HOME"] = str(kept)
  started = {
    name: subprocess.Popen(
      [*COMMAND, *options],
      env={**clean, **variables},
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for name, (variables, options) in SITUATIONS.items()
  }
  found = {}
  for name, process in started.items():
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err[-3000:]
    found[name] = process.returncode, out
  return found


def report(answers, situation):
  status, out = answers[situation]
  return status, json.loads(out[out.index("{\n") :])


def test_it_works_here(answers):
  status, found = report(answers, "here")
  assert (status, found["ok"], found["faults"]) == (0, True, [])
  assert found["versions"]["maxtext"] and "0.2.5" in found["versions"]["tested maxtext"]
  assert found["start"]["found_by"] in ("pth", "start", "import")
  assert any(record["name"] == "ling2" and record["state"] == "loaded" for record in found["start"]["plugins"])
  assert {seam["name"]: seam["state"] for seam in found["seams"]} == {
    seam.name: "applied" for seam in plugin.REGISTRY.seams
  }
  assert found["models"] == dict.fromkeys(("ling2", "ling2-tiny", "ling2.5-1t", "ling2.6-flash"))
  assert found["fields"]["moe_z_loss_weight"] == "maxtext-ling2" and found["fields"]["eod_mask_loss"] == "maxtext"
  assert found["backends"]["platform"] == "cpu" and "chunked" in found["backends"]["gla"]


@pytest.mark.parametrize("situation", [name for name, (_, options) in SITUATIONS.items() if "--json" in options])
def test_standard_output_is_json_alone(answers, situation):
  json.loads(answers[situation][1])


def test_switched_off(answers):
  status, found = report(answers, "disabled")
  assert (status, found["ok"]) == (1, False)
  (fault,) = found["faults"]
  assert "MAXTEXT_LING2_DISABLE=1" in fault["what"] and "unset" in fault["remedy"]
  assert found["environment"]["MAXTEXT_LING2_DISABLE"] == "1"


def test_switched_off_for_people(answers):
  status, out = answers["disabled, for people"]
  assert status == 1
  assert "MAXTEXT_LING2_DISABLE=1" in out and "remedy: unset it" in out
  assert out.splitlines()[0] == "A LING2 run would not work."


def test_left_out_by_the_allow_list(answers):
  status, found = report(answers, "not allowed")
  assert (status, found["ok"]) == (1, False)
  (fault,) = found["faults"]
  assert "not loaded" in fault["what"] and "MAXTEXT_PLUGINS" in fault["what"]
  assert "MAXTEXT_PLUGINS" in fault["remedy"] and "ling2" in fault["remedy"]


def test_left_out_is_not_installed_twice(answers):
  _, found = report(answers, "not allowed")
  assert not [note for note in found["notes"] if "more than once" in note["what"]]


def test_verbose_has_the_verdict_first_and_lists_every_seam(answers):
  status, out = answers["verbose"]
  first, *rest = out.splitlines()
  assert (status, first) == (0, "A LING2 run would work.")
  count = len(plugin.REGISTRY.seams)
  assert f"contracts    MaxText has what {count} of {count} seams need (--verbose lists them)" in rest
  assert [line for line in rest if line.startswith("seam ")] == [
    f"seam         {seam.name}: applied" for seam in plugin.REGISTRY.seams
  ]


def again(kept):
  """A later call: what it prints, and whether it imported a module that only the check of the seams needs."""
  code = (
    "import sys; from maxtext_ling2 import cli; sys.argv[1:] = ['doctor']\n"
    f"try: cli.main()\nfinally: print({SEAM_MODULE!r} in sys.modules)"
  )
  environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAXTEXT_", "M_"))}
  environ["XDG_CACHE_HOME"] = str(kept)
  done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300)
  *out, imported = done.stdout.splitlines()
  return done.returncode, out, imported == "True", done.stderr


def test_a_later_call_relies_on_the_first(answers, kept):
  """It says so, lists no seam, and prints nothing of what MaxText prints; with no readable note it checks again."""
  (noted,) = (kept / "maxtext-ling2" / "doctor").iterdir()
  day = json.loads(noted.read_text())["day"]
  status, out, imported, err = again(kept)
  assert (status, out[0], imported) == (0, "A LING2 run would work.", False)
  assert any(
    line.startswith(f"contracts    MaxText and the models were found fine on {day}, and nothing") for line in out
  )
  assert not [line for line in out if line.startswith("seam ")]
  assert err == "loading JAX and MaxText ...\n"
  noted.write_text("damaged")
  assert again(kept)[2]
  assert json.loads(noted.read_text()).keys() == {"day"}
