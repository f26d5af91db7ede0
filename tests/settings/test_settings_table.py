"""docs/settings.md has each of MaxText's settings, and no setting that describes the model is silently without effect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxtext_ling2.configs import without_effect
from settings import matrix, page

pytestmark = pytest.mark.matrix
HINT = "run `.venv/bin/python scripts/settings_table > docs/settings.md`"


def test_every_setting_has_a_row():
  missing, gone = set(page.owners()) - set(page.rows()), set(page.rows()) - set(page.owners())
  assert not missing and not gone, f"new in MaxText: {missing}; gone: {gone}; {HINT}"


def test_outcomes_are_those_of_the_matrix():
  stale = [field for field, (_, shown) in page.rows().items() if page.outcome(field) not in ("", shown)]
  assert not stale, f"{stale}; {HINT}"


def is_read(field):
  return page.rows()[field][0].startswith("`")


def test_every_setting_of_the_model_acts_or_is_refused():
  """Read in an observed run, or refused unless at its default, or known to act elsewhere."""
  model = [field for field, owner in page.owners().items() if owner in page.MODEL_CLASSES]
  assert len(model) > 300
  silent = [f for f in model if not is_read(f) and not page.is_refused(f) and f not in page.UNSEEN and not by_rule(f)]
  assert not silent, (
    f"no LING2 run reads {silent}: refuse them in configs/without_effect.py, or say why not in page.UNSEEN"
  )


def by_rule(field):
  """Refused by a rule of its own."""
  return field in ("final_logits_soft_cap",)


def test_what_is_called_without_effect_is_not_read():
  assert not [field for field in (*without_effect.WITHOUT_EFFECT, *page.UNSEEN) if is_read(field)]


def test_rows_of_the_matrix_are_settings():
  unknown = {field for row in matrix.ROWS for field in (*row.settings, *row.on) if field not in page.owners()}
  assert not unknown


@pytest.mark.slow  # three minutes
def test_the_page_is_what_is_observed(tmp_path):
  file = tmp_path / "observed.json"
  script = Path(page.__file__).with_name("observe.py")
  done = subprocess.run([sys.executable, str(script), str(file)], env=os.environ, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert page.text(json.loads(file.read_text())) == page.PAGE.read_text(), HINT
