"""What is shown of a trainer's log, and the reason it gives for a failure."""

from pathlib import Path

import pytest

from maxtext_ling2.stock_command.log import Log, explain

pytestmark = pytest.mark.unit

PREFIX = "I1127 02:30:05.339522 139976397601664"
START = f"""\
[DECOUPLED NO-OP] gcs_storage: using stubs.
[transformers] PyTorch was not found.
{PREFIX} pyconfig.py:300] Config param steps: 5
{PREFIX} max_utils.py:835] System Information: Jax Version: 0.12.0.1
{PREFIX} maxtext_utils.py:2098] Num_devices: 4, shape (1, 4)
W1127 02:30:06.488958 139976397601664 checkpointing.py:551] Specifying dataset_type is deprecated.
W1127 02:30:06.488958 139976397601664 validation.py:68] pad_id=0: token 0 occurs in the data
W1127 02:30:06.588958 139976397601664 validation.py:68] pad_id=0: token 0 occurs in the data
{PREFIX} checkpointing.py:705] restoring from this run's directory step 3
"""
END = f"""\
{PREFIX} metric_logger.py:302] Completed eval after train step 4, loss=10.632, perplexity=41453.913, total_weights=512.0
maxtext-ling2: SIGINT: the run stops after this step
maxtext-ling2: stopped by SIGINT after step 4; checkpoint /out/4; the same command goes on from there
{PREFIX} a.py:1] half a li"""

OF_A_VALUE = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    main()
ValueError: the first
The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in f
    raise
    ^^^^^
{}
"""


def test_little_is_shown(tmp_path: Path) -> None:
  path = tmp_path / "train.log"
  path.write_text("maxtext-ling2: stopped by SIGTERM after step 3; of a former run\n")
  log = Log(path)
  with path.open("a") as file:
    file.write(START)
  assert list(log.news()) == ["warning: pad_id=0: token 0 occurs in the data", "going on after step 3"]
  assert (log.stage, log.devices, log.says_stopped) == ("restoring the checkpoint", 4, False)
  with path.open("a") as file:
    file.write(END)
  assert list(log.news()) == [
    "evaluation after step 4: loss 10.632, perplexity 41453.913",
    "maxtext-ling2: SIGINT: the run stops after this step",
    "maxtext-ling2: stopped by SIGINT after step 4; checkpoint /out/4; the same command goes on from there",
  ]
  assert log.says_stopped
  assert log.text() == START + END


def test_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
  log = Log(tmp_path / "train.log")
  assert list(log.news()) == []


@pytest.mark.parametrize(
  ("last", "reason"),
  [
    ("maxtext_ling2.errors.CheckpointError: /out/0: already exists", "/out/0: already exists"),
    ("RuntimeError: Checkpointing failed", "RuntimeError: Checkpointing failed"),
    ("KeyError: 'x'\nI1127 02:30:05.339522 139 a.py:1] more", "KeyError: 'x'"),
    ("ValueError: 'vocab_siz' not in 'emb_dim', 'vocab_size', 'dtype'.", (
      "vocab_siz: MaxText has no such setting; did you mean vocab_size?"
    )),
    ("ValueError: 'xyzzy' not in 'emb_dim', 'dtype'.", (
      "xyzzy: MaxText has no such setting; docs/settings.md lists those that a LING2 run reads"
    )),
    ("pydantic_core._pydantic_core.ValidationError: 1 validation error for MaxTextConfig\n"
     "  Value error, gla_decay_layer_offset=7: it must be 0 or 1 [type=value_error, input_value={'a': [1]}]\n"
     "    For further information visit https://errors.pydantic.dev/2.14/v/value_error",
     "gla_decay_layer_offset=7: it must be 0 or 1"),
    ("ValueError: " + 500 * "x", "ValueError: " + 400 * "x" + " ..."),
    ("SystemError", "SystemError: "),
    ("KeyboardInterrupt", None),
  ],
)  # fmt: skip
def test_reason_is_the_last_exception(last: str, reason: str | None) -> None:
  assert explain(START + OF_A_VALUE.format(last)) == reason


def test_reason_of_a_refusal_without_traceback() -> None:
  text = f"{PREFIX} a.py:1] MAXTEXT CONFIG ERROR: one\ntwo\n{PREFIX} a.py:1] ====\n"
  assert explain(text) == "one\ntwo"
  assert explain(START) is None


def test_where_to_read_more(tmp_path: Path) -> None:
  path = tmp_path / "train.log"
  path.write_text("of a former run\n")
  log = Log(path)
  with path.open("a") as file:
    file.write("\n".join(map(str, range(20))))
  assert log.reason() == f"the last lines of {path}:\n" + "\n".join(map(str, range(5, 20)))
  with path.open("a") as file:
    file.write("\n" + OF_A_VALUE.format("OSError: gone"))
  assert log.reason() == f"OSError: gone\nall of it is in {path}"
