"""`doctor` relies on its last check only while nothing that it depends on has changed."""

import datetime
import json

import pytest

from maxtext_ling2.doctor import last_check

pytestmark = pytest.mark.unit


@pytest.fixture
def site(tmp_path, monkeypatch):
  """The only folder with distributions and MaxText."""
  folder = tmp_path / "site"
  (folder / "maxtext").mkdir(parents=True)
  (folder / "one-1.0.dist-info").mkdir()
  (folder / "maxtext" / "train.py").write_text("a")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(last_check.sys, "path", [str(folder)])
  monkeypatch.setattr(last_check, "maxtext_folder", lambda: folder / "maxtext")
  return folder


CHANGES = {
  "a package more": lambda site, patch: (site / "two-1.0.dist-info").mkdir(),
  "another version": lambda site, patch: (site / "one-1.0.dist-info").rename(site / "one-1.1.dist-info"),
  "MaxText edited": lambda site, patch: (site / "maxtext" / "train.py").write_text("b"),
  "a setting": lambda site, patch: patch.setenv("M_STEPS", "3"),
  "other plugins": lambda site, patch: patch.setenv("MAXTEXT_PLUGINS", "ling2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(site, monkeypatch, change):
  assert last_check.read() is None
  last_check.write()
  assert last_check.read() == datetime.date.today().isoformat()
  CHANGES[change](site, monkeypatch)
  assert last_check.read() is None


def test_a_damaged_note_is_none(site):
  last_check.write()
  for text in ("", "{", "[]", json.dumps({"date": "2026-01-01"})):
    last_check._file().write_text(text)
    assert last_check.read() is None


def test_where_nothing_can_be_written(site, monkeypatch, tmp_path):
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  last_check.write()
  assert last_check.read() is None
