"""`importlib.reload` of MaxText's configuration, in a process of its own, whose modules it changes."""

import subprocess
import sys
from pathlib import Path


def test_ling2_stays_ling2():
  script = Path(__file__).parent / "reloaded_pyconfig.py"
  done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert [line for line in done.stdout.splitlines() if line.startswith("RESULT")] == ["RESULT ling2 4", "RESULT llama2"]
