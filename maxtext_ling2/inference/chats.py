"""Conversations for `generate --chat`: read from JSON, and turned into a prompt by the tokenizer's chat template."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxtext_ling2.inference.saved_model import SavedModelError

Message = dict[str, Any]
"""`role`, `content`, and what else the chat template reads."""

ROLES = ("system", "user", "assistant", "tool")

_MARK = "c0ffee"  # stands for an answer; no template contains it


class ChatTemplate:
  """A tokenizer's chat template.

  Args:
    tokenizer: MaxText's tokenizer of a Hugging Face folder.
    file: a Jinja file that replaces the tokenizer's own template; None: none does.

  Raises:
    SavedModelError: there is no template.
  """

  def __init__(self, tokenizer: Any, file: Path | None = None):
    self._tokenizer: Any = getattr(tokenizer, "tokenizer", None)
    if not hasattr(self._tokenizer, "apply_chat_template"):
      raise SavedModelError(
        "--chat: a sentencepiece tokenizer has no chat template; pass --tokenizer with a folder of Hugging Face's "
        "tokenizer files"
      )
    self._template = None if file is None else file.read_text(encoding="utf-8")
    if self._template is None and not getattr(self._tokenizer, "chat_template", None):
      raise SavedModelError(
        "--chat: the tokenizer has no chat template; pass --chat-template with a Jinja file, or --tokenizer with the "
        "folder of a chat model"
      )

  def prompt(self, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation, up to where the assistant's answer begins.

    Raises:
      SavedModelError: the template refuses the conversation.
    """
    ids: list[int] = self._apply(messages, add_generation_prompt=True, tokenize=True)
    return ids

  def end_tokens(self) -> frozenset[int]:
    """The special token that the template puts after an answer, such as `<|im_end|>`; empty if it puts none.

    A tokenizer's eos_token is often the end of a text and not of a turn, and only some folders list both in
    generation_config.json.
    """
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}]
    text: str = self._apply(messages, add_generation_prompt=False, tokenize=False)
    _, mark, rest = text.rpartition(_MARK)
    after = self._tokenizer.encode(rest, add_special_tokens=False) if mark else []
    special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
    return frozenset(next(([token] for token in after if token in special), []))

  def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
    import jinja2

    if self._template is not None:
      options["chat_template"] = self._template
    try:
      return self._tokenizer.apply_chat_template(list(messages), return_dict=False, **options)
    except jinja2.TemplateError as error:
      raise SavedModelError(
        f"the chat template refuses the conversation ({error}); change its messages, or pass another --chat-template"
      ) from error


def read(text: str, source: str, system: str | None = None) -> list[list[Message]]:
  """Reads conversations from JSON.

  Args:
    text: a list of messages, an object with `messages`, a list of such objects, or one such object per line.
    source: what to call it in errors.
    system: system prompt of the conversations, which then have none.

  Returns:
    The messages of each conversation; the last one is not the assistant's.

  Raises:
    SavedModelError: it is none of these; the text names the conversation and the message.
  """
  found = _conversations(text, source)
  if not found:
    raise SavedModelError(f"{source}: there is no conversation in it; write at least one message")
  names = [f"{source}: conversation {number}" if len(found) > 1 else source for number in range(1, len(found) + 1)]
  return [_checked(one, name, system) for one, name in zip(found, names, strict=True)]


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
  """Messages after a system prompt, if there is one."""
  return [*([] if system is None else [{"role": "system", "content": system}]), *messages]


def _conversations(text: str, source: str) -> list[Any]:
  """What a file has as conversations, unchecked."""
  try:
    value = json.loads(text)
  except json.JSONDecodeError as error:
    value = _lines(text, source, error)
  if isinstance(value, list) and all(isinstance(one, dict) and "role" in one for one in value):
    return [value] if value else []
  return value if isinstance(value, list) else [value]


def _lines(text: str, source: str, error: json.JSONDecodeError) -> list[Any]:
  """JSON Lines; `error` is that of reading it as one JSON value."""
  lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
  found = []
  for number, line in lines:
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError as of_line:
      reason = of_line.msg if found else f"{error.msg}, line {error.lineno}"
      where = f"line {number}: " if found else ""
      raise SavedModelError(
        f"{source}: {where}not JSON ({reason}); write a list of messages, each with role and content, or one object with "
        "messages per line"
      ) from of_line
  return found


def _checked(conversation: Any, name: str, system: str | None) -> list[Message]:
  if isinstance(conversation, dict) and "messages" in conversation:
    if unread := {"tools", "documents", "functions"} & set(conversation):
      raise SavedModelError(f"{name}: {min(unread)} would change the prompt, and is not read; take it out")
    conversation = conversation["messages"]
  if not isinstance(conversation, list) or not conversation:
    raise SavedModelError(f'{name}: no list of messages; write [{{"role": "user", "content": "..."}}]')
  for number, message in enumerate(conversation, 1):
    _check_message(message, f"{name}: message {number}", first=number == 1)
  if conversation[-1]["role"] == "assistant":
    raise SavedModelError(f"{name}: the last message is the assistant's, so there is nothing to answer; take it out")
  if system is not None and conversation[0]["role"] == "system":
    raise SavedModelError(f"{name}: --system-prompt and a system message: two for one conversation; leave one out")
  return with_system(conversation, system)


def _check_message(message: Any, name: str, first: bool) -> None:
  if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
    raise SavedModelError(f"{name}: {_short(message)} is not a message; write role and content")
  if message["role"] not in ROLES:
    raise SavedModelError(f"{name}: role {_short(message['role'])} is none of {', '.join(ROLES)}; write one of them")
  if message["role"] == "system" and not first:
    raise SavedModelError(f"{name}: a system message that is not the first one; put it first")
  if not isinstance(message["content"], str):
    raise SavedModelError(f"{name}: content {_short(message['content'])} is not a text; write a string")


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 40 else f"{text[:37]}..."
