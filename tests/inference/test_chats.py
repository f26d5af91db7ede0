"""Conversations: what is read, the prompt's ids by hand for one to three turns, the token that ends a turn."""

import json

import pytest

from inference.chat_tokenizer import SPECIAL, ids, write
from maxtext_ling2.demo.data import tokenizer_file
from maxtext_ling2.inference import chats, saved_model
from maxtext_ling2.inference.chats import ChatTemplate
from maxtext_ling2.inference.saved_model import SavedModelError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}
SYSTEM = {"role": "system", "content": "Kurz – ß"}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
  return ChatTemplate(saved_model._tokenizer(write(tmp_path_factory.mktemp("chat"))))


def turn(role, text):
  return ["<role>", role, "</role>", text, "<|turn|>"]


OPEN = ["<role>", "ASSISTANT", "</role>"]


@pytest.mark.parametrize(
  ("messages", "expected"),
  [
    ([USER], [*turn("SYSTEM", "brief"), *turn("USER", "Hi"), *OPEN]),
    ([SYSTEM, USER], [*turn("SYSTEM", "Kurz – ß"), *turn("USER", "Hi"), *OPEN]),
    ([SYSTEM, USER, ANSWER, USER],
     [*turn("SYSTEM", "Kurz – ß"), *turn("USER", "Hi"), *turn("ASSISTANT", "Ho"), *turn("USER", "Hi"), *OPEN]),
    ([USER, ANSWER, USER, ANSWER, USER],
     [*turn("SYSTEM", "brief"), *turn("USER", "Hi"), *turn("ASSISTANT", "Ho"), *turn("USER", "Hi"),
      *turn("ASSISTANT", "Ho"), *turn("USER", "Hi"), *OPEN]),
  ],
)  # fmt: skip
def test_prompt(template, messages, expected):
  assert template.prompt(messages) == ids(*expected)


def test_the_end_of_a_turn(template, tmp_path):
  assert template.end_tokens() == {SPECIAL.index("<|turn|>")}
  tokenizer = saved_model._tokenizer(write(tmp_path, "{% for message in messages %}{{ message.content }}\n{% endfor %}"))
  assert ChatTemplate(tokenizer).end_tokens() == frozenset()


def test_the_end_of_a_turn_of_a_real_tokenizer():
  """Its template writes thoughts before an answer and a line break after the token."""
  tokenizer = saved_model._tokenizer(tokenizer_file().parent / "qwen3-tokenizer")
  template = ChatTemplate(tokenizer)
  assert template.end_tokens() == {151645}  # <|im_end|>, as in its tokenizer.json
  text = "<|im_start|>system\nKurz – ß<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  assert tokenizer.decode(template.prompt([SYSTEM, USER])) == text


def test_another_template(template, tmp_path):
  file = tmp_path / "template.jinja"
  file.write_text("{% for message in messages %}[{{ message.content }}]<|end|>{% endfor %}")
  other = ChatTemplate(saved_model._tokenizer(write(tmp_path / "hf")), file)
  assert other.prompt([USER, ANSWER, USER]) == ids("[Hi]", "<|end|>", "[Ho]", "<|end|>", "[Hi]", "<|end|>")
  assert other.end_tokens() == {0}
  assert template.end_tokens() == {SPECIAL.index("<|turn|>")}  # as before


def test_no_template(tmp_path):
  with pytest.raises(SavedModelError, match="the tokenizer has no chat template; pass --chat-template"):
    ChatTemplate(saved_model._tokenizer(write(tmp_path, template=None)))
  with pytest.raises(SavedModelError, match="a sentencepiece tokenizer has no chat template; pass --tokenizer"):
    ChatTemplate(saved_model._tokenizer(tokenizer_file()))


def test_a_refusing_template(template):
  with pytest.raises(SavedModelError, match=r"the chat template refuses the conversation \(no tools here\)"):
    template.prompt([USER, {"role": "tool", "content": "3"}])


@pytest.mark.parametrize(
  ("text", "system", "expected"),
  [
    ([USER], None, [[USER]]),
    ([USER], "short", [[{"role": "system", "content": "short"}, USER]]),
    ({"messages": [SYSTEM, USER], "id": 3}, None, [[SYSTEM, USER]]),
    ([{"messages": [USER]}, {"messages": [USER, ANSWER, USER]}], None, [[USER], [USER, ANSWER, USER]]),
    ([[USER], [SYSTEM, USER]], None, [[USER], [SYSTEM, USER]]),
    (f"{json.dumps({'messages': [USER]})}\n\n{json.dumps([SYSTEM, USER])}\n", None, [[USER], [SYSTEM, USER]]),
  ],
)
def test_read(text, system, expected):
  assert chats.read(text if isinstance(text, str) else json.dumps(text), "chat.json", system) == expected


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "chat.json: there is no conversation in it"),
    ([], "chat.json: there is no conversation in it"),
    ("[{", "chat.json: not JSON .*line 1.*; write a list of messages"),
    ('{"messages": []}\n{', "chat.json: line 2: not JSON"),
    ({"messages": []}, "chat.json: no list of messages"),
    ({"role": "user"}, "chat.json: no list of messages"),
    (3, "chat.json: no list of messages"),
    ([{"role": "user"}], "message 1: .* is not a message; write role and content"),
    ([{"role": "human", "content": "Hi"}], 'message 1: role "human" is none of system, user, assistant, tool'),
    ([USER, {"role": "user", "content": [{"type": "image"}]}], r"message 2: content \[.* is not a text"),
    ([USER, SYSTEM], "message 2: a system message that is not the first one"),
    ([USER, ANSWER], "the last message is the assistant's"),
    ([[USER], [USER, ANSWER]], "chat.json: conversation 2: the last message"),
    ({"messages": [USER], "tools": []}, "tools would change the prompt"),
  ],
)
def test_what_is_no_conversation(text, message):
  with pytest.raises(SavedModelError, match=message):
    chats.read(text if isinstance(text, str) else json.dumps(text), "chat.json")


def test_two_system_prompts():
  with pytest.raises(SavedModelError, match="--system-prompt and a system message: two for one conversation"):
    chats.read(json.dumps([SYSTEM, USER]), "chat.json", "short")
