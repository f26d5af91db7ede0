"""A conversation that is typed: `generate --chat -` in a terminal."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from maxtext_ling2.inference.chats import Message, with_system
from maxtext_ling2.inference.generate import Generator
from maxtext_ling2.inference.saved_model import SavedModelError

LONGEST = 4096
"""Tokens of a conversation before an answer; max_prefill_predict_length changes it."""

HELP = "Type a message. /clear begins a new conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer."


Print = Callable[[str], None]


def run(generator: Generator, system: str | None, read: Callable[[], str], write: Print, tell: Print) -> None:
  """Answers messages until the input ends.

  Args:
    generator: with a chat template.
    system: system prompt, or None.
    read: returns the next message; raises EOFError at the end of the input.
    write: prints a part of an answer.
    tell: prints a line that is no part of the conversation.
  """
  tell(HELP)
  start = with_system([], system)
  messages = list(start)
  while True:
    try:
      text = read().strip()
    except EOFError:
      return
    if text == "/exit":
      return
    if text == "/clear":
      messages = list(start)
    elif text == "/help":
      tell(HELP)
    elif text:
      messages = _turn(generator, [*messages, {"role": "user", "content": text}], write, tell)


def _turn(generator: Generator, messages: list[Message], write: Print, tell: Print) -> list[Message]:
  """The messages with the answer; without the last one if it is refused."""
  answer = ""
  try:
    with _interrupted() as stopped:
      for piece in generator.answer([messages]):
        answer = piece.answer.text
        write(piece.text)
        if stopped.is_set():
          break
  except SavedModelError as error:
    tell(f"{error}; or begin a new conversation with /clear")
    return messages[:-1]
  write("\n")
  return [*messages, {"role": "assistant", "content": answer}]


@contextlib.contextmanager
def _interrupted() -> Iterator[threading.Event]:
  """Ctrl-C sets the event, a second one raises KeyboardInterrupt.

  An exception in the middle of a decoding step would lose the engine's state, which a step takes and replaces.
  """
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers only there
    yield event
    return

  def interrupt(number: int, frame: FrameType | None) -> None:
    if event.is_set():
      raise KeyboardInterrupt
    event.set()

  before = signal.signal(signal.SIGINT, interrupt)
  try:
    yield event
  finally:
    signal.signal(signal.SIGINT, before)
