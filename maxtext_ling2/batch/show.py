"""A batch as text, as a table of tokens, and as JSON."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from maxtext_ling2.batch.read import Batch

LOSS = ("{+", "+}")
"""Marks of text with loss where there is no colour, as those of `git diff --word-diff`."""
_STYLE = "bold green"

type Runs = list[tuple[bool, str]]


def predicted(batch: Batch) -> NDArray[np.bool_]:
  """Whether the loss counts each token of the inputs [B, T], as the target of the one before it."""
  return np.pad(batch.trained[:, :-1], [(0, 0), (1, 0)])


def stretches(segments: NDArray[np.int32]) -> list[tuple[int, int]]:
  """[start, end) of equal segments in a row [T]."""
  bounds = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
  return list(zip(bounds[:-1], bounds[1:], strict=True))


def lines(batch: Batch, rows: int, ids: bool, marks: bool) -> Iterator[Text]:
  """The lines to print.

  Args:
    batch: what to show.
    rows: how many of its rows.
    ids: a line per token rather than text.
    marks: `LOSS` around text with loss, in place of colour.
  """
  for line in _head(batch):
    yield Text(line)
  counted = predicted(batch)
  for row in range(min(rows, len(batch.inputs))):
    for start, end in stretches(batch.segments[row]):
      yield Text(_title(batch, row, start, end), style="bold")
      if ids:
        yield from (_token_line(batch, row, index, marks) for index in range(start, end))
      elif batch.segments[row, start]:
        yield _styled(_runs(batch, batch.inputs[row, start:end], counted[row, start:end]), marks)
    if batch.trained[row, -1] and not ids:
      yield Text("the last token's target: ") + _styled(_runs(batch, batch.targets[row, -1:], [True]), marks)
  if rows < len(batch.inputs):
    yield Text(f"{len(batch.inputs) - rows} more rows; --rows {len(batch.inputs)} shows all")


def to_json(batch: Batch, rows: int) -> dict[str, Any]:
  """The same as JSON: every array by row, and the text of each segment with `LOSS` marks."""
  counted = predicted(batch)
  return {
    "step": batch.step,
    "shape": list(batch.inputs.shape),
    "tokenizer": None if batch.tokenizer is None else batch.tokenizer_path,
    "loss_tokens": int(batch.trained.sum()),
    "rows": [
      {
        "inputs": batch.inputs[row].tolist(),
        "targets": batch.targets[row].tolist(),
        "segments": batch.segments[row].tolist(),
        "positions": batch.positions[row].tolist(),
        "loss": batch.trained[row].tolist(),
        "texts": [
          _styled(_runs(batch, batch.inputs[row, start:end], counted[row, start:end]), marks=True).plain
          for start, end in stretches(batch.segments[row])
          if batch.segments[row, start]
        ],
      }
      for row in range(min(rows, len(batch.inputs)))
    ],
  }


def print_lines(console: Console, batch: Batch, rows: int, ids: bool) -> None:
  """Prints `lines`; in colour on a terminal that has colours, with marks elsewhere."""
  for line in lines(batch, rows, ids, marks=not console.is_terminal or console.no_color):
    console.print(line)


def _head(batch: Batch) -> Iterator[str]:
  size, counted = batch.inputs.size, int(batch.trained.sum())
  padding = int((batch.segments == 0).sum())
  count, length = batch.inputs.shape
  yield (
    f"step {batch.step}: {count} rows of {length} tokens; the loss is on {counted} of {size} targets "
    f"({counted / size:.1%}); {padding} tokens are padding ({padding / size:.1%})"
  )
  if batch.tokenizer is None:
    yield f"token ids, as the tokenizer {batch.tokenizer_path} cannot be opened ({batch.note}); pass --tokenizer"
  else:
    yield f"text by the tokenizer {batch.tokenizer_path}"
  others = int((batch.trained[:, :-1] & (batch.targets[:, :-1] != batch.inputs[:, 1:])).sum())
  if others:
    yield f"{others} targets with loss are not the next token of their row; --ids shows them"


def _title(batch: Batch, row: int, start: int, end: int) -> str:
  segment = int(batch.segments[row, start])
  if segment == 0:
    return f"row {row}, tokens {start}-{end - 1}: padding"
  first, last = (int(batch.positions[row, index]) for index in (start, end - 1))
  counted = int(predicted(batch)[row, start:end].sum())
  return f"row {row}, segment {segment}: tokens {start}-{end - 1}, positions {first}-{last}, loss on {counted}"


def _runs(batch: Batch, ids: NDArray[np.int32], counted: Any) -> Runs:
  """(whether the loss counts it, text) of stretches of tokens [T].

  Their texts are cut out of the text of all, because tokenizers drop a space at the beginning of a text.
  """
  counted = np.asarray(counted)
  done, text, runs = 0, "", []
  for start, end in stretches(counted.astype(np.int32)):
    whole = _decode(batch, ids[:end])
    piece = whole[len(text) :] if whole.startswith(text) else _decode(batch, ids[start:end])
    runs.append((bool(counted[start]), piece))
    done, text = end, whole
  assert done == len(ids)
  return runs


def _decode(batch: Batch, ids: NDArray[np.int32]) -> str:
  if batch.tokenizer is None:
    return "".join(f"{token} " for token in ids.tolist())
  try:
    return str(batch.tokenizer.decode(ids.tolist()))
  except Exception:  # an id that is not the tokenizer's; libraries have no common error
    return "".join(f"{token} " for token in ids.tolist())


def _styled(runs: Runs, marks: bool) -> Text:
  text = Text()
  for counted, piece in runs:
    if counted and marks:
      piece = f"{LOSS[0]}{piece}{LOSS[1]}"
    text.append(piece, style=_STYLE if counted else None)
  return text


def _token_line(batch: Batch, row: int, index: int, marks: bool) -> Text:
  token, target = (int(array[row, index]) for array in (batch.inputs, batch.targets))
  counted = bool(batch.trained[row, index])
  shown = [f"{one} {_decode(batch, np.array([one], np.int32))!r}" for one in (token, target)]
  segment, position = int(batch.segments[row, index]), int(batch.positions[row, index])
  line = f"{index:6} segment {segment} position {position}: {shown[0]} -> {shown[1]}"
  return Text(f"{line}{'  loss' if counted and marks else ''}", style=_STYLE if counted else "")
