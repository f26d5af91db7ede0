"""Seam: a run says at its begin what its checkpoints will be, counted from the state that it trains."""

import math
from typing import Any

from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use
from maxtext_ling2.training.checkpoint_report import report

_DILOCO = "maxtext.trainers.diloco.utils.spmd_diloco_checkpointing"


class CheckpointReportSeam(Seam):
  """Logs bytes, frequency and number of the checkpoints of a LING2 run, and warns if there will be none."""

  name = "checkpoint report"
  module = "maxtext.utils.train_utils"
  use = Use("a line in the log about its checkpoints", lambda config: True, "without that line", essential=False)
  expectations = (
    *expect(module, "setup_train_loop(config, recorder)"),
    *expect("maxtext.common.train_state_nnx", "to_checkpoint_dict(state)"),
    *expect(_DILOCO, "to_diloco_checkpoint_dict(state, config)"),
  )

  def handlers(self) -> Handlers:
    return {"setup_train_loop": _set_up}


def _set_up(call: Call) -> Any:
  from maxtext.utils import max_logging

  result, config = call.original(), call.config
  if not config.enable_checkpointing:
    max_logging.warning("LING2: enable_checkpointing=false: nothing of this run is saved")
    return result
  said = report(config, checkpoint_bytes(result[-1], config))
  max_logging.log(f"LING2: {said.line}")
  if said.warning:
    max_logging.warning(f"LING2: {said.warning}")
  return result


def checkpoint_bytes(state: Any, config: Any) -> int:
  """Bytes of the arrays that MaxText saves of a training state, before compression.

  Args:
    state: a TrainStateNNX, or a DiLoCoTrainState; its arrays may be abstract.
    config: MaxText config of the run.
  """
  import jax
  from maxtext.common import train_state_nnx
  from maxtext.trainers.diloco.utils import spmd_diloco_checkpointing

  if config.enable_diloco:
    saved = spmd_diloco_checkpointing.to_diloco_checkpoint_dict(state, config)
  else:
    saved = train_state_nnx.to_checkpoint_dict(state)
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))
