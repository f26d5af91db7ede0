"""Runs of MaxText's own commands on copies of MaxText, each in a process of its own that need not import JAX first.

As a script this file is the process from which they are forked: it imports, from a file, what is not MaxText's and takes
requests from standard input. The plugin gets into each of them as into any process: by maxtext_ling2.pth and its entry
point, when `maxtext` is imported.
"""

import contextlib
import importlib
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

TRAIN = "maxtext.trainers.pre_train.train"
STEPS = 3
TIMEOUT = 300
OURS = ("maxtext", "maxtext_ling2", "__main__")
SETTINGS = {
  "run_name": "drift", "enable_checkpointing": False, "log_config": False, "enable_goodput_recording": False,
  "enable_tensorboard": False, "skip_jax_distributed_system": True, "hardware": "cpu", "jax_cache_dir": "",
  "dataset_type": "synthetic", "tokenizer_path": "none", "steps": STEPS, "override_model_config": True,
  "attention": "dot_product", "vocab_size": 64, "base_emb_dim": 32, "base_mlp_dim": 32, "head_dim": 8,
  "base_num_query_heads": 4, "base_num_kv_heads": 4, "base_num_decoder_layers": 2, "max_target_length": 16,
  "per_device_batch_size": 2, "learning_rate": 1e-2,
}  # fmt: skip


def words(model, folder, package, **settings):
  """The command line of a run; its metrics go to metrics.jsonl."""
  given = {"model_name": model, "base_output_directory": folder, "metrics_file": folder / "metrics.jsonl"}
  return [
    str(package / "configs" / "base.yml"),
    *(f"{key}={value}" for key, value in {**SETTINGS, **given, **settings}.items()),
  ]


def losses(folder):
  """The training losses of a run, in the order of steps."""
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [line["learning/loss"] for line in lines if "learning/loss" in line]


class Outcome:
  """What became of a run.

  Attributes:
    code: its exit code; 1 after an exception.
    warnings: what the plugin complained about.
    error: the last exception's type and text, "" if there was none.
    output: all that it printed.
    modules: what it had imported, MaxText and the plugin apart.
    host: what it had imported of MaxText.
  """

  def __init__(self, folder):
    self.folder = folder
    self.output = (folder / "output").read_text(errors="replace")
    for key, value in json.loads((folder / "outcome.json").read_text()).items():
      setattr(self, key, value)

  @property
  def text(self):
    return self.error + self.output


class Zygote:
  """The process from which runs are forked.

  Args:
    folder: for its files.
    modules: what it imports.
  """

  def __init__(self, folder, modules):
    (folder / "modules.json").write_text(json.dumps(modules))
    self.log = open(folder / "zygote.log", "w")  # noqa: SIM115  closed in `close`
    command = [sys.executable, __file__, str(folder / "modules.json")]
    self.process = subprocess.Popen(
      command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
    )

  def run(self, folder, path, module, arguments):
    """Runs `python -m module arguments` with the folder `path` first in sys.path, in `folder`."""
    folder.mkdir(parents=True)
    print(json.dumps([str(folder), str(path), module, arguments]), file=self.process.stdin, flush=True)
    assert self.process.stdout.readline() == "done\n", Path(self.log.name).read_text()[-3000:]
    assert (folder / "outcome.json").exists(), (folder / "output").read_text()[-3000:]
    return Outcome(folder)

  def close(self):
    self.process.stdin.close()
    self.process.wait()
    self.log.close()


def environment(**variables):
  """A process of its own finds the plugin as an installed one, not in a checkout on PYTHONPATH."""
  return {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", "MAXTEXT_LING2_DISABLE": "0", **variables}


def run_alone(folder, path, module, arguments, **variables):
  """The same as `Zygote.run`, in a fresh process; with "" for `path` on the installed MaxText."""
  folder.mkdir(parents=True)
  request = json.dumps([str(folder), str(path), module, arguments])
  command = [sys.executable, __file__, "--once", request]
  subprocess.run(command, env=environment(**variables), check=True, timeout=TIMEOUT)
  return Outcome(folder)


def do(folder, path, module, arguments):
  """In the process of the run."""
  os.chdir(folder)
  for stream in (1, 2):
    os.dup2(os.open("output", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
  complaints = []
  handler = logging.Handler(logging.WARNING)
  handler.emit = lambda record: complaints.append(record.getMessage())
  logging.getLogger("maxtext_ling2").addHandler(handler)
  show = warnings.showwarning

  def note(message, category, *rest, **more):
    if category.__module__.startswith("maxtext_ling2"):
      complaints.append(str(message))
    show(message, category, *rest, **more)

  warnings.showwarning = note
  sys.path[:] = [path, *sys.path[1:]] if path else sys.path[1:]  # [0] is this file's folder
  sys.argv = [module, *arguments]
  code, error = 0, ""
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
  except BaseException as end:
    traceback.print_exc()
    code, error = 1, f"{type(end).__name__}: {end}"
  modules = [name for name in list(sys.modules) if name.partition(".")[0] not in OURS]
  host = [name for name in list(sys.modules) if name.partition(".")[0] == "maxtext"]
  sys.stdout.flush()
  sys.stderr.flush()
  outcome = {"code": code, "warnings": complaints, "error": error, "modules": modules, "host": host}
  Path(folder, "outcome.json").write_text(json.dumps(outcome))


def fork(request):
  """Does a request in a child, which is ended if it takes too long."""
  child = os.fork()
  if child == 0:
    with contextlib.suppress(BaseException):
      do(*request)
    os._exit(0)
  end = time.monotonic() + TIMEOUT
  while os.waitpid(child, os.WNOHANG)[0] == 0:
    if time.monotonic() > end:
      os.kill(child, signal.SIGKILL)
      os.waitpid(child, 0)
      return
    time.sleep(0.02)


def main():
  if sys.argv[1] == "--once":
    do(*json.loads(sys.argv[2]))
    return
  requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what the imports print
  for name in json.loads(Path(sys.argv[1]).read_text()):
    with contextlib.suppress(Exception):  # some can be imported only in an order of their own; the runs do it again
      importlib.import_module(name)
  assert "maxtext" not in sys.modules
  for line in requests:
    fork(json.loads(line))
    print("done", file=answers, flush=True)


if __name__ == "__main__":
  main()
