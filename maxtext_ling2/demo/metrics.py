"""Reads the losses that MaxText writes to its metrics_file, one JSON object per step."""

import json
from dataclasses import dataclass
from pathlib import Path

LOSS = "learning/lm_loss"
"""Mean cross-entropy of the next token, in nats: without what MTP and the router add to the objective."""

MTP_LOSS = "learning/mtp_loss"
"""The part of the objective that MTP adds: its mean cross-entropy times mtp_loss_scaling_factor."""


@dataclass(frozen=True)
class Losses:
  """Losses in nats, one per step.

  Attributes:
    main: loss of the next token.
    mtp: loss of the token after it, times mtp_loss_scaling_factor; zeros if the model has no MTP layer.
  """

  main: list[float]
  mtp: list[float]


def read(path: Path) -> Losses:
  """The losses of all steps written so far. A file that does not exist yet holds none."""
  text = path.read_text() if path.is_file() else ""
  # After the last newline there may be a line that is still being written.
  steps = [json.loads(line) for line in text.split("\n")[:-1]]
  return Losses([step[LOSS] for step in steps], [step.get(MTP_LOSS, 0.0) for step in steps])
