"""Runs tests/exported_code: the tests of the PyTorch code in an export, which `make test` cannot run without torch."""

import subprocess
import sys
from pathlib import Path

import torch
import transformers
from rows import row

ROOT = Path(__file__).resolve().parent.parent.parent
VERSION = f"{transformers.__version__}, torch {torch.__version__.partition('+')[0]}"

command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/exported_code"]
done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
summary = done.stdout.strip().splitlines()[-1:] or done.stderr.strip().splitlines()[-1:]
row(VERSION, "tests/exported_code", " ".join(summary).partition(" in ")[0], done.returncode == 0)
