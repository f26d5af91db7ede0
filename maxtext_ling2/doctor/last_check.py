"""When all contracts and models were found fine here, and whether anything has changed since.

To check them imports nearly all of MaxText, as every LING2 run does, and takes two thirds of the command's time; what is
installed decides the outcome. So the first call in an environment checks them, and later ones need not, until a package,
MaxText or this package is another one.
"""

import datetime
import hashlib
import json
import os
import sys
from pathlib import Path

import maxtext_ling2
from maxtext_ling2 import discovery, kept
from maxtext_ling2.maxtext_api.start import maxtext_folder


def read() -> str | None:
  """The day, as 2026-01-31, on which exactly what is installed now was found fine; None: there is none."""
  try:
    return str(json.loads(_file().read_text(encoding="utf-8"))["day"])
  except (OSError, ValueError, KeyError, TypeError):
    return None


def write() -> None:
  """Notes that all is fine today; where nothing can be written, the next call checks them again."""
  try:
    kept.write(_file(), json.dumps({"day": datetime.date.today().isoformat()}))
  except OSError:
    return


def _file() -> Path:
  """Its name says what was there: all distributions and when they came, all sources of MaxText and of this package, and
  the variables that choose plugins and settings.
  """
  distributions = sorted(
    (str(path), path.stat().st_mtime_ns)
    for folder in dict.fromkeys(sys.path)
    for path in Path(folder or os.curdir).glob("*.dist-info")
  )
  folders = (maxtext_folder(), Path(maxtext_ling2.__file__).parent)
  sources = [kept.digest_of(folder, (".py", ".yml")) for folder in folders]
  variables = sorted(
    pair for pair in os.environ.items() if pair[0] == discovery.ALLOW_VARIABLE or pair[0].startswith("M_")
  )
  parts = [sys.version, distributions, sources, variables]
  return kept.folder() / "doctor" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}.json"
