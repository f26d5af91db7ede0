"""Conversations as token ids, and which of them the assistant wrote: what LING2's fine-tuning reads.

The text is the tokenizer's own chat template of the whole conversation, tokenized as a whole. A turn of the assistant
begins where the text stops to agree with the template's generation prompt, and ends where its message does.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from maxtext_ling2.errors import Ling2Error, reason_of

Message = dict[str, Any]

IS_PROMPT = "is_prompt"
"""MaxText's column: which of a conversation's pieces are not the assistant's."""

PAIRS = (("prompt", "completion"), ("question", "answer"))
"""MaxText's names of two columns that make a conversation."""

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_SHOWN = 60  # characters of a conversation in an error


class ChatError(Ling2Error, ValueError):
  """A conversation cannot be turned into tokens with a loss mask; the text names it, the template, and what to do."""


@dataclasses.dataclass(frozen=True)
class Chat:
  """A conversation as tokens.

  Attributes:
    ids: token ids [T] of the whole text.
    turns: [start, end) in `ids` of each turn of the assistant, its end-of-turn token included.
  """

  ids: list[int]
  turns: list[tuple[int, int]]

  def pieces(self) -> tuple[list[list[int]], list[bool]]:
    """The ids in pieces, and whether each is a prompt; prompts and turns of the assistant alternate."""
    pieces, prompts, done = [], [], 0
    for start, end in self.turns:
      pieces += [self.ids[done:start], self.ids[start:end]]
      prompts += [True, False]
      done = end
    return ([*pieces, self.ids[done:]], [*prompts, True]) if done < len(self.ids) else (pieces, prompts)


@dataclasses.dataclass(frozen=True)
class ChatTokens:
  """Turns the conversation in a column of MaxText's pipelines into pieces of ids and `is_prompt`.

  Called as MaxText's `apply_chat_template`; travels to the processes of a data loader.

  Attributes:
    ignored: ids that MaxText takes out of the loss wherever they are targets.
    padding: the id whose tokens MaxText takes for padding; None: none, as rows are packed.
  """

  ignored: frozenset[int]
  padding: int | None

  def __call__(self, example: dict[str, Any], tokenizer_model: Any, data_column_name: str) -> dict[str, Any]:
    messages = example[data_column_name]
    chat = tokenize(messages, tokenizer_model)
    self._check(chat, messages, tokenizer_model)
    example[data_column_name], example[IS_PROMPT] = chat.pieces()
    return example

  def _check(self, chat: Chat, messages: Sequence[Message], tokenizer: Any) -> None:
    """Raises ChatError if MaxText would lose the loss on a token, or take one for padding."""
    trained = {token for start, end in chat.turns for token in chat.ids[start:end]}
    lost = sorted(trained & self.ignored) or [token for token in chat.ids if token == self.padding]
    if lost:
      shown = tokenizer.convert_ids_to_tokens(lost[0])
      raise _error(
        messages,
        tokenizer,
        f"has token {lost[0]} ({shown!r}), which the tokenizer also has for padding (pad_token, else unk_token) or as "
        "bos_token, so that MaxText leaves it out of loss or attention; give the tokenizer a pad_token (and bos_token) "
        "that no conversation has, or take this text out of the data",
      )


def tokenize(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> Chat:
  """Tokenizes a conversation by its tokenizer's chat template.

  Args:
    messages: role and content of each, and whatever else the template reads; empty values (None) count as absent.
    tokenizer: of transformers.

  Raises:
    ChatError: the template refuses the conversation, leaves out a message, or cannot be cut into turns.
  """
  plain = [_plain(message) for message in messages]
  if not plain or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in plain):
    raise _error(plain, tokenizer, "is not a list of messages with role and content; correct the data")
  for message in plain:
    message.setdefault("content", None)
  text = _render(plain, tokenizer)
  _check_all_is_rendered(plain, tokenizer, text)
  ids = _ids(tokenizer, text)
  try:
    return Chat(ids, _turns(plain, tokenizer, text, ids))
  except ChatError:
    if _GENERATION.search(_template(tokenizer)) is None:
      raise
  return _by_generation_marks(plain, tokenizer)


@dataclasses.dataclass(frozen=True)
class _Turn:
  """A turn of the assistant in the text: it ends at character `end`, and `prompt` asks for it."""

  prompt: str
  end: int


def _turns(messages: list[Message], tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]]:
  """[start, end) of each turn of the assistant in `ids`.

  Each begins with the first token that a generation prompt does not give: MaxText's rule for a conversation of one round.
  """
  found: list[_Turn] = []
  for index in (place for place, message in enumerate(messages) if message["role"] == "assistant"):
    if index == 0:
      raise _error(messages, tokenizer, "has nothing that the assistant answers; let it begin with another role")
    turn = _turn(messages, index, tokenizer, text, found[-1].end if found else 0)
    if turn is None:
      raise _not_cut(messages, tokenizer, index)
    found.append(turn)
  borders = [0, *(turn.end for turn in found)]
  pieces = [_ids(tokenizer, text[begin:end]) for begin, end in itertools.pairwise([*borders, len(text)])]
  if ids != list(itertools.chain(*pieces)):  # the tokens of a piece depend on the text before it
    return _turns_of_whole(messages, tokenizer, text, ids, found)
  turns, done = [], 0
  for turn, begin, piece in zip(found, borders, pieces, strict=False):
    turns.append((done + _common(piece, _ids(tokenizer, turn.prompt[begin:])), done + len(piece)))
    done += len(piece)
  return turns


def _turn(messages: list[Message], index: int, tokenizer: Any, text: str, after: int) -> _Turn | None:
  """The turn of message `index`, after character `after`; None: the text is not that of one message after the other."""
  prompt = _render(messages[:index], tokenizer, add_generation_prompt=True)
  before = _render(messages[:index], tokenizer)  # without the generation prompt
  if not prompt.startswith(before):  # a template that closes what is not to be continued
    before = os.path.commonprefix([prompt, before])
  end = _end(messages, index, tokenizer, text, before, prompt)
  return _Turn(prompt, end) if end is not None and len(before) >= after and text.startswith(before) else None


def _turns_of_whole(
  messages: list[Message], tokenizer: Any, text: str, ids: list[int], found: list[_Turn]
) -> list[tuple[int, int]]:
  """As `_turns`, each border from the beginning of the text: the work grows with the square of the turns."""
  turns = []
  for number, turn in enumerate(found):
    through = _ids(tokenizer, text[: turn.end])
    if ids[: len(through)] != through:
      indices = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
      raise _not_cut(messages, tokenizer, indices[number])
    turns.append((_common(ids, _ids(tokenizer, turn.prompt)), len(through)))
  return turns


def _common(one: list[int], other: list[int]) -> int:
  """Length of the common prefix."""
  return len(os.path.commonprefix([one, other]))


def _not_cut(messages: list[Message], tokenizer: Any, index: int) -> ChatError:
  return _error(
    messages,
    tokenizer,
    f"cannot be cut into turns: message {index} (assistant) is written otherwise when others follow, or its last token "
    "is also part of the next message; put each conversation that ends with this message on a line of its own, or set "
    "chat_template to a template with {% generation %} around what the assistant writes",
  )


def _end(messages: list[Message], index: int, tokenizer: Any, text: str, before: str, prompt: str) -> int | None:
  """Where the text of the assistant's message `index` ends; None: that cannot be told.

  Some templates write something at the beginning of the last turn only, such as Qwen3's empty <think>. What follows the
  message is then the same, and between the text before it and its content is nothing but the generation prompt.
  """
  if index == len(messages) - 1:
    return len(text)
  alone = _render(messages[: index + 1], tokenizer)
  if text.startswith(alone):
    return len(alone)
  content = str(messages[index]["content"] or "").strip()
  if not content or content not in alone:
    return None
  written = alone[alone.rindex(content) :]
  at = text.find(written, len(before))
  return at + len(written) if at >= 0 and prompt.startswith(text[:at]) else None


def _by_generation_marks(messages: list[Message], tokenizer: Any) -> Chat:
  """Turns by the template's own {% generation %} blocks."""
  found = tokenizer.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
  )
  mask = [0, *found["assistant_masks"], 0]
  borders = [place for place in range(len(mask) - 1) if mask[place] != mask[place + 1]]
  return Chat(list(found["input_ids"]), list(zip(borders[::2], borders[1::2], strict=True)))


def _check_all_is_rendered(messages: list[Message], tokenizer: Any, text: str) -> None:
  """Raises ChatError if the template leaves out a message, as those of a role that it does not know."""
  for index, message in enumerate(messages):
    content = message["content"]
    seen = message["role"] in ("user", "assistant") and isinstance(content, str) and content.strip() in text
    if content and not seen:  # of another role, or escaped
      empty: dict[str, Any] = {"content": ""}
    elif message.get("tool_calls"):
      empty = {"tool_calls": []}
    else:
      continue
    others = [*messages[:index], {**message, **empty}, *messages[index + 1 :]]
    if _render(others, tokenizer) == text:
      (what,) = empty
      raise _error(
        messages,
        tokenizer,
        f"loses {what} of message {index} (role {message['role']!r}): the template does not write it; correct the role, "
        "take the message out, or set chat_template to a template that knows it",
      )


def _render(messages: list[Message], tokenizer: Any, add_generation_prompt: bool = False) -> str:
  try:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
  except Exception as error:  # jinja2's, Python's, and transformers' for a tokenizer without a template
    reason = f"is refused by it ({type(error).__name__}: {error}); correct the data, or set chat_template to another one"
    raise _error(messages, tokenizer, reason) from error


def _ids(tokenizer: Any, text: str) -> list[int]:
  """Token ids of a text that has its special tokens already, as `apply_chat_template(tokenize=True)`."""
  return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _template(tokenizer: Any) -> str:
  return str(getattr(tokenizer, "chat_template", None) or "")


def _error(messages: Sequence[Any], tokenizer: Any, reason: str) -> ChatError:
  """An error that names the conversation and whose template it is."""
  texts = (message.get("content") for message in messages if isinstance(message, dict))
  first = next((text for text in texts if isinstance(text, str) and text), "")
  roles = ", ".join(str(message.get("role")) if isinstance(message, dict) else "?" for message in messages)
  name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
  return ChatError(
    f"the conversation that begins with {first[:_SHOWN]!r} ({len(messages)} messages: {roles}), with the chat template "
    f"of {name}, {reason}"
  )


def _plain(value: Any) -> Any:
  """A message without the keys that it does not have: Arrow fills those of other messages in, as None."""
  if isinstance(value, Mapping):
    return {key: _plain(entry) for key, entry in value.items() if entry is not None}
  if hasattr(value, "tolist"):  # of NumPy
    return _plain(value.tolist())
  if isinstance(value, (list, tuple)):
    return [_plain(entry) for entry in value]
  return value.decode() if isinstance(value, bytes) else value


def joined(example: dict[str, Any], columns: Sequence[str], data_column: str) -> dict[str, Any]:
  """Joins a prompt column and a completion column to one conversation; in place of MaxText's `combine_columns`.

  One prompt (completion) per round is MaxText's form; else the messages of the prompt come first, then the completion's.

  Args:
    example: text or a list of messages in each column.
    columns: a pair of `PAIRS`, in any order.
    data_column: the column to write.
  """
  prompt, completion = next(pair for pair in PAIRS if set(pair) == set(columns))
  asked, answered = _messages(example[prompt], "user"), _messages(example[completion], "assistant")
  rounds = len(asked) == len(answered) and all(message.get("role") == "user" for message in asked)
  pairs = zip(asked, answered, strict=True) if rounds else [(*asked, *answered)]
  example[data_column] = [message for pair in pairs for message in pair]
  return example


def _messages(value: Any, role: str) -> list[Message]:
  """A column's value as messages; a text is one message."""
  plain = _plain(value)
  return [{"role": role, "content": plain}] if isinstance(plain, str) else list(plain)


def reason(error: BaseException) -> str | None:
  """The text of the ChatError that led to an error, or None: it was another; from another process only the text comes."""
  if (found := reason_of(error, ChatError)) is not None:
    return found
  return str(error) if ChatError.__name__ in str(error) else None
