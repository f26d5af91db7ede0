"""grain's worker processes, which import MaxText anew, read the same batches for LING2 as the trainer itself does."""

import os
import subprocess
import sys

import pytest

from sandbox import ROOT
from training.stock_runs import arguments, metrics, run, write_documents

pytestmark = pytest.mark.hostile

STEPS = 6


@pytest.mark.slow
def test_a_worker_process_changes_nothing(tmp_path):
  settings = write_documents(tmp_path) | {"save_checkpoint_on_completion": False, "base_num_decoder_layers": 3}
  run(tmp_path, arguments(tmp_path, "run_0", "run_0", STEPS, **settings))
  # The command itself: grain's workers need the flags that it parses. Where one fails, MaxText ends without steps and 0.
  words = arguments(tmp_path, "run_1", "run_1", STEPS, **settings | {"grain_worker_count": 1})
  command = [sys.executable, "-m", "maxtext_ling2", "run", "maxtext.trainers.pre_train.train", *map(str, words)]
  done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
  assert done.returncode == 0 and "Training stopped" not in done.stderr, done.stderr[-3000:]
  without, with_worker = metrics(tmp_path, "run_0"), metrics(tmp_path, "run_1")
  assert sorted(without) == list(range(STEPS)) and with_worker == without
