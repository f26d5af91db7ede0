"""What `maxtext-ling2 generate` does: reads prompts, opens the model, prints answers as they come."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from maxtext_ling2.errors import OptionError
from maxtext_ling2.inference import chat_loop, chats
from maxtext_ling2.inference.chats import Message
from maxtext_ling2.inference.generate import Generator, Options, Piece, in_order

STDIN = "-"


@dataclasses.dataclass(frozen=True)
class Request:
  """The arguments of the command; cli/inference.py documents the options.

  Attributes:
    checkpoint: MaxText checkpoint or Hugging Face folder.
    overrides: KEY=VALUE settings of MaxText.
    prompts: texts to continue; "-" is standard input.
    chat: a file of conversations; "-" is standard input, typed messages if that is a terminal.
    system: system prompt of the conversations.
    model: MaxText's model_name, or a yml.
    tokenizer: file or folder.
    options: how text is generated.
    as_json: whether to print an object per answer.
  """

  checkpoint: Path
  overrides: Sequence[str]
  prompts: Sequence[str]
  chat: str | None
  system: str | None
  model: str | None
  tokenizer: Path | None
  options: Options
  as_json: bool

  def check(self) -> None:
    """Raises OptionError if options contradict each other."""
    if (self.chat is None) == (not self.prompts):
      raise OptionError(
        "pass --prompt TEXT, or --chat FILE with messages" if self.chat is None else "--prompt and --chat: leave one out"
      )
    for option, value in {"--system-prompt": self.system, "--chat-template": self.options.chat_template}.items():
      if value is not None and self.chat is None:
        raise OptionError(f"{option}: only a conversation has one; pass --chat, or leave it out")


def run(request: Request, stdin: TextIO, stdout: TextIO) -> None:
  """Prints the answers.

  Args:
    request: what to do.
    stdin: for the prompt, the conversation or the messages `-`.
    stdout: for the answers alone; what MaxText prints goes to standard error.

  Raises:
    OptionError: options contradict each other.
    ValueError: see `Generator` and `chats.read`.
    OSError: a file cannot be read.
  """
  request.check()
  if request.chat == STDIN and stdin.isatty():
    if request.as_json:
      raise OptionError("--json: a typed conversation is printed as it comes; pass a file to --chat, or leave --json out")
    _converse(request, stdin, stdout)
    return
  prompts = _prompts(request, stdin)
  with contextlib.redirect_stdout(sys.stderr):
    generator = _open(request, prompts)
    pieces = in_order(generator.answer())
    if request.as_json:
      for piece in pieces:
        if piece.is_last:
          print(_json(prompts[piece.index], piece), file=stdout, flush=True)
    else:
      _print(pieces, prompts, stdout)


def _open(request: Request, prompts: Sequence[str | list[Message]], longest: int = 0) -> Generator:
  return Generator(
    request.checkpoint, request.options, prompts, longest=longest, model_name=request.model, tokenizer=request.tokenizer,
    overrides=request.overrides, chat=request.chat is not None,
  )  # fmt: skip


def _prompts(request: Request, stdin: TextIO) -> list[str | list[Message]]:
  """The texts or conversations that are asked for."""
  if request.chat is None:
    if request.prompts.count(STDIN) > 1:
      raise OptionError("--prompt -: standard input can be read only once")
    return [stdin.read() if prompt == STDIN else prompt for prompt in request.prompts]
  if request.chat == STDIN:
    return list(chats.read(stdin.read(), "standard input", request.system))
  return list(chats.read(read_text(Path(request.chat)), request.chat, request.system))


def read_text(path: Path) -> str:
  """The text of a file; raises ValueError if it is not UTF-8."""
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not a text in UTF-8 ({error}); convert it, or name another file") from error


def _print(pieces: Iterator[Piece], prompts: Sequence[str | list[Message]], stdout: TextIO) -> None:
  """Prints each text after its prompt, each answer of a conversation by itself; with a title if there are several."""
  shown = -1
  for piece in pieces:
    prompt = prompts[piece.index]
    if piece.index != shown:
      shown = piece.index
      title = f"==> {shown + 1} of {len(prompts)} <==\n" if len(prompts) > 1 else ""
      print(title, prompt if isinstance(prompt, str) else "", sep="", end="", file=stdout)
    print(piece.text, end="\n" if piece.is_last else "", flush=True, file=stdout)


def _json(prompt: str | list[Message], piece: Piece) -> str:
  """An answer as a JSON object; the names are those of OpenAI's interface."""
  asked: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
  answer = piece.answer
  found = {**asked, "text": answer.text, "completion_tokens": answer.tokens, "finish_reason": answer.reason}
  return json.dumps(found, ensure_ascii=False)


def _converse(request: Request, stdin: TextIO, stdout: TextIO) -> None:
  """Answers typed messages."""
  with contextlib.redirect_stdout(sys.stderr):
    generator = _open(request, [], chat_loop.LONGEST)

  def read() -> str:
    if stdin is sys.stdin:
      with contextlib.suppress(ImportError):
        import readline  # noqa: F401  so that input() can edit the line

      return input("> ")
    if not (line := stdin.readline()):
      raise EOFError
    return line

  def write(text: str) -> None:
    print(text, end="", flush=True, file=stdout)

  chat_loop.run(generator, request.system, read, write, lambda text: print(text, file=sys.stderr))
