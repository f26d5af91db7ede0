"""LING2's rules in MaxText's trainers after pre-training, which have losses and steps of their own.

A trainer is named by its module below `maxtext.trainers`, such as `post_train.sft.train_sft`.
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger("maxtext_ling2")

SFT, DPO, RL = "post_train.sft.train_sft", "post_train.dpo.train_dpo", "post_train.rl.train_rl"
DISTILLATION = "post_train.distillation.train_distill"
NATIVE = ("pre_train.train", "pre_train.train_compile", "post_train.sft.train_sft_native")
"""The trainers with LING2's step."""
TUNIX = (SFT, DPO, RL, DISTILLATION)


def check(config: Any, trainer: str | None) -> None:
  """Checks a LING2 config for the trainer that is running; None: none of MaxText's, so there is nothing to check.

  Raises:
    ValueError: all broken rules, one sentence each.
  """
  found = list(problems(config, trainer))
  if found:
    raise ValueError("\n".join(found))
  for text in warnings(config, trainer):
    _warn_once(text)


@functools.cache
def _warn_once(text: str) -> None:
  logger.warning(text)


def problems(c: Any, trainer: str | None) -> Iterator[str]:
  """Broken rules, one sentence each."""
  if trainer == RL:
    yield (
      f"trainer={RL}: its rollouts are vLLM's, by MaxText's adapter, which cannot run LING2's layers and has no table of "
      "its weights; use post_train.sft.train_sft_native, or post_train.dpo.train_dpo"
    )
    return
  if trainer in TUNIX and c.moe_z_loss_weight:
    yield (
      f"moe_z_loss_weight={c.moe_z_loss_weight}: only pre-training and post_train.sft.train_sft_native add the router "
      f"z-loss to their loss, {trainer} does not; set it to 0"
    )
  if c.lora.enable_lora and (trainer in NATIVE or trainer in (DPO, DISTILLATION)):
    instead = "train nothing" if trainer in NATIVE else "train all weights"
    yield (
      f"lora.enable_lora=true: in MaxText {SFT} alone creates adapters, {trainer} would {instead}; use that trainer, or "
      "set it to false"
    )
  elif c.lora.enable_lora and c.lora.lora_weight_qtype and c.scan_layers:
    yield (
      f"lora.lora_weight_qtype={c.lora.lora_weight_qtype!r}, scan_layers=true: MaxText 0.2.5 cannot stack quantised "
      "kernels; set scan_layers=false (to_huggingface and to_maxtext change a checkpoint's layout), or leave it out"
    )


def warnings(c: Any, trainer: str | None) -> Iterator[str]:
  """What a trainer leaves out without an effect on what it does compute."""
  if trainer in TUNIX and c.routed_bias and c.routed_bias_update_rate:
    yield (
      f"routed_bias_update_rate={c.routed_bias_update_rate}: {trainer} does not balance experts; router biases stay as "
      "they were loaded"
    )
  if trainer in (DPO, DISTILLATION) and c.mtp_num_layers:
    yield (
      f"mtp_num_layers={c.mtp_num_layers}: the loss of {trainer} has no part for MTP; its weights get no gradient, but "
      "weight decay; leave them out with mtp_num_layers=0"
    )
