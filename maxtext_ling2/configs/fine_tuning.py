"""Rules about a LING2 run on conversations, and what it is told. In the form of `validation`."""

import os
from collections.abc import Iterator
from typing import Any

_WITHOUT_CHATS = ("tfds", "c4_mlperf", "olmo_grain")
_TEMPLATES = (".jinja", ".j2", ".txt", ".json")


def problems(config: Any) -> Iterator[str]:
  """Settings of a run on conversations that MaxText would ignore in silence, one sentence each."""
  if not getattr(config, "use_sft", False):
    return
  kind = str(getattr(config.dataset_type, "value", config.dataset_type))
  if kind in _WITHOUT_CHATS:
    yield (
      f"dataset_type={kind!r}: MaxText reads conversations (use_sft=true) with hf and grain alone, and "
      "pre-trains with this one; set dataset_type=hf or grain"
    )
  path = config.chat_template_path
  if not path or config.chat_template:
    return
  if kind == "grain":
    yield f"chat_template_path={path!r}: dataset_type=grain does not read it; set chat_template to the template's text"
  elif not os.path.isabs(path) or not os.path.isfile(path) or not path.endswith(_TEMPLATES):
    yield (
      f"chat_template_path={path!r}: MaxText would take the tokenizer's template in silence, as it reads only a file "
      f"that is there, below its own folder or by an absolute path, and ends with {', '.join(_TEMPLATES)}; pass the "
      "absolute path of one"
    )


def warnings(config: Any) -> Iterator[str]:
  """Settings that are allowed, but seldom meant, one sentence each."""
  if getattr(config, "use_sft", False) and not config.sft_train_on_completion_only:
    yield (
      "sft_train_on_completion_only=False (MaxText's default): the loss is on all tokens of a conversation, system "
      "prompt and user included; set sft_train_on_completion_only=true to train on the assistant's alone"
    )
