"""`maxtext-ling2 convert` and `export`: their commands, progress and summary. MaxText's commands are stand-ins."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maxtext_ling2.checkpoint import model_yml
from maxtext_ling2.cli import app
from maxtext_ling2.stock_command import next_commands, shell

pytestmark = pytest.mark.unit

GOLDEN = Path(__file__).parents[1] / "golden" / "one_cycle"

CONVERSION = """
import pathlib, sys
given = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
output = pathlib.Path(given["base_output_directory"])
print("model -> 0: 1,000,000 of 2,500,000 bytes, 1 of 2 tensors", file=sys.stderr, flush=True)
print("model -> 0: 2,500,000 of 2,500,000 bytes, 2 of 2 tensors", file=sys.stderr, flush=True)
folder = output / "0" / "items" if "hf_model_path" in given else output
if folder.exists():
  raise ValueError(f"{folder}: exists")
folder.mkdir(parents=True)
(folder / "weights").write_bytes(bytes(2_500_000))
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(shell, "python_module", lambda module: [sys.executable, "-c", CONVERSION, module])
  monkeypatch.setattr(next_commands.shutil, "which", lambda name: name)
  monkeypatch.setattr("maxtext_ling2.stock_command.convert.duration", lambda seconds: "9 s")
  return tmp_path


def invoke(*words: str | Path) -> tuple[int, list[str], list[str], str]:
  """Exit code, the stock command's words, the lines after it, and standard error."""
  done = CliRunner().invoke(app, [str(word) for word in words])
  _, _, rest = done.stdout.partition(f"{shlex.quote(CONVERSION)} ")
  command, _, lines = rest.partition("\n\n")
  return done.exit_code, shlex.split(command.replace("\\\n", " ")), lines.splitlines(), done.stderr


def test_convert_a_folder_of_ones_own(stand_in: Path) -> None:
  code, command, lines, _ = invoke("convert", GOLDEN, "out")
  out = stand_in / "out"
  assert code == 0
  assert command == [
    shell.TO_MAXTEXT, f"{out}/model.yml", "model_name=ling2-custom", f"base_output_directory={out}", "hardware=cpu",
    "skip_jax_distributed_system=true", f"--hf_model_path={GOLDEN}", "--save_dtype=float32",
  ]  # fmt: skip
  assert (out / "model.yml").read_text() == model_yml.text(GOLDEN)
  yml = f"{out}/model.yml"
  assert [line for line in lines if not line.startswith("MB 1.0")] == [
    f"log: {stand_in}/out.log",
    "starting MaxText ...",
    "MB 2.5/2.5, 2 of 2 tensors, about 0 s left",
    f"checkpoint: {out}/0/items (2.5 MB, 9 s)",
    "compare it with the folder, bit by bit, and its logits in float32:",
    f"  maxtext-ling2 verify {GOLDEN} --orbax {out}/0/items --scan",
    "let it write:",
    f"  maxtext-ling2 generate {out}/0/items --model {yml} --tokenizer TOKENIZER_FOLDER "
    f"--prompt '{next_commands.PROMPT}'",
    "train from it (here on made-up tokens):",
    f"  maxtext-ling2 train {yml} load_parameters_path={out}/0/items scan_layers=true dataset_type=synthetic steps=2",
  ]


def test_a_named_model_needs_no_yml(stand_in: Path) -> None:
  _, command, lines, _ = invoke(
    "convert", GOLDEN, "out", "model_name=ling2", "scan_layers=true", "--save_dtype=bfloat16", "--lazy_load_tensors=true"
  )
  assert command == [
    shell.TO_MAXTEXT, f"base_output_directory={stand_in}/out", "hardware=cpu", "skip_jax_distributed_system=true",
    "override_model_config=true", "model_name=ling2", "scan_layers=true", "--save_dtype=bfloat16",
    "--lazy_load_tensors=true", f"--hf_model_path={GOLDEN}",
  ]  # fmt: skip
  assert not (stand_in / "out" / "model.yml").exists()
  assert not [line for line in lines if "verify" in line]  # the folder is in float32


def test_what_maxtext_refuses(stand_in: Path) -> None:
  assert invoke("convert", GOLDEN, "out")[0] == 0
  code, _, _, error = invoke("convert", GOLDEN, "out")
  assert code == 1
  assert error == (
    f"error: converting has failed with exit code 1: ValueError: {stand_in}/out/0/items: exists\n"
    f"all of it is in {stand_in}/out.log\n"
  )


def test_anothers_yml_is_not_replaced(stand_in: Path) -> None:
  yml = stand_in / "out" / "model.yml"
  yml.parent.mkdir()
  yml.write_text("mine")
  code, _, _, error = invoke("convert", GOLDEN, "out")
  assert (code, yml.read_text()) == (1, "mine")
  assert error == f"error: {yml}: exists and is another model's; delete it, or choose another folder than out\n"


def test_a_folder_that_is_not_lings_writes_nothing(stand_in: Path) -> None:
  code, _, _, error = invoke("convert", "nothing", "out")
  assert code == 1
  assert error.startswith("error: nothing")
  assert list(stand_in.iterdir()) == []


def test_export_finds_the_models_yml_and_the_layout(stand_in: Path) -> None:
  invoke("convert", GOLDEN, "out")
  metadata = {"custom_metadata": {"scan_layers": False}}
  (stand_in / "out" / "0" / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
  code, command, lines, _ = invoke("export", "out", "hf")
  assert code == 0
  assert command == [
    shell.TO_HUGGING_FACE, f"{stand_in}/out/model.yml", "model_name=ling2-custom", f"base_output_directory={stand_in}/hf",
    f"load_parameters_path={stand_in}/out/0/items", "scan_layers=false", "hardware=cpu",
    "skip_jax_distributed_system=true",
  ]  # fmt: skip
  assert lines[-3] == f"folder: {stand_in}/hf (2.5 MB, 9 s)"
  assert lines[-1] == (
    f"  maxtext-ling2 generate {stand_in}/hf --tokenizer TOKENIZER_FOLDER --prompt '{next_commands.PROMPT}'"
  )


@pytest.mark.parametrize(
  ("checkpoint", "text"),
  [
    ("nothing", "nothing: there is no such folder; pass that of a checkpoint"),
    (GOLDEN, f"{GOLDEN}: a Hugging Face folder already; pass a MaxText checkpoint"),
    ("run", "model_name: not given, and a MaxText checkpoint does not say what model it is; add model_name=ling2 or the "
     "like, or the model's YAML file"),
  ],
)  # fmt: skip
def test_export_of_what_is_none(stand_in: Path, checkpoint: str, text: str) -> None:
  (stand_in / "run" / "4" / "items").mkdir(parents=True)
  code, _, _, error = invoke("export", checkpoint, "hf")
  assert (code, error) == (1, f"error: {text}\n")
  assert [path.name for path in stand_in.iterdir()] == ["run"]
