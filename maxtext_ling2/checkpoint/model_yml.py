"""The base YAML file of a Hugging Face model, which `maxtext-ling2 config` prints."""

import logging
from pathlib import Path
from typing import Any

from maxtext_ling2.checkpoint import hf_config, stock_tables
from maxtext_ling2.checkpoint.hf_checkpoint import HfCheckpoint
from maxtext_ling2.configs.validation import CUSTOM_MODEL
from maxtext_ling2.errors import CheckpointError

logger = logging.getLogger("maxtext_ling2")

# Training settings of LING2, which config.json does not have.
_TRAINING: dict[str, Any] = {
  "norm_topk_prob": False,
  "routed_bias_update_rate": 0.001,
  "routed_bias_zero_mean_update": True,
  "calculate_per_token_loss": False,
  "add_bos": False,
  "sft_train_on_completion_only": True,  # read by fine-tuning alone
}


def text(folder: Path) -> str:
  """Returns the YAML file of a Hugging Face folder's model.

  It inherits from MaxText's base.yml and replaces it as the first argument of any of MaxText's commands. MTP layers that
  the folder's weights lack, or have in addition to config.json, are named in a warning.

  Raises:
    CheckpointError: config.json is not LING2's; the text names the model and what it would need.
  """
  import yaml

  raw = hf_config.read(folder)
  settings = hf_config.to_maxtext(raw) | _TRAINING
  _warn_of_mtp(folder, settings)
  if (weight := hf_config.mtp_weight(raw)) is not None:
    settings["mtp_loss_scaling_factor"] = weight
  settings["max_target_length"] = min(4096, raw["max_position_embeddings"])
  # The RFC's value is max_target_length, which leaves no room after the prompt, so that no command that builds a decode
  # cache (decode, reshard_checkpoint) runs. Pre-training reads neither value.
  settings["max_prefill_predict_length"] = max(1, settings["max_target_length"] // 2)
  head = (
    f"# The LING2 model of {Path(folder).resolve().name}, written by `maxtext-ling2 config`. Use it in place of "
    "base.yml:\n"
    f"#   python -m maxtext.trainers.pre_train.train THIS_FILE model_name={CUSTOM_MODEL} run_name=...\n"
    "# The command line overrides the settings of this file.\n"
  )
  return f"{head}base_config: base.yml\n{yaml.safe_dump({'model_name': CUSTOM_MODEL, **settings}, sort_keys=False)}"


def _warn_of_mtp(folder: Path, settings: dict[str, Any]) -> None:
  """Warns of MTP layers that the folder's weights lack or have in addition; a folder without weights is fine."""
  if not any(Path(folder).glob("*.safetensors")):
    return
  try:
    with HfCheckpoint(folder) as tensors:
      problems = tensors.mtp_problems(stock_tables.structure(settings))
  except CheckpointError as error:
    problems = [str(error)]
  for problem in problems:
    logger.warning("%s", problem)
