"""Conversations as tokens: the text is the tokenizer's own of the whole, the loss on what the assistant writes."""

import pickle

import numpy as np
import pytest

from chat_data import CHATS, MARKED, ONE, TEMPLATES, TWO, marked, mask_of, says, tokenizer
from maxtext_ling2.training import chats

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizers():
  return {name: tokenizer(name) for name in TEMPLATES}


def expect(built, messages, text):
  chat = chats.tokenize(messages, built)
  ids, mask = marked(built, text)
  assert built.decode(chat.ids) == built.decode(ids)
  assert chat.ids == ids == built.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
  assert mask_of(chat) == mask


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_loss_is_on_the_assistants_tokens(tokenizers, name, chat):
  expect(tokenizers[name], CHATS[chat], MARKED[name][chat])


HEAD = "<role>SYSTEM</role>detailed thinking off<|role_end|>"
CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
ODD = {
  "ends with a user": (
    says("A", "B", "C"),
    f"{HEAD}<role>HUMAN</role>A<|role_end|><role>ASSISTANT</role>⟦B<|role_end|>⟧<role>HUMAN</role>C<|role_end|>",
  ),
  "no assistant": (says("A"), f"{HEAD}<role>HUMAN</role>A<|role_end|>"),
  "empty turns": (
    says("A", "", "B", ""),
    f"{HEAD}<role>HUMAN</role>A<|role_end|><role>ASSISTANT</role>⟦<|role_end|>⟧<role>HUMAN</role>B<|role_end|>"
    "<role>ASSISTANT</role>⟦<|role_end|>⟧",
  ),
  "tools": (
    [
      {"role": "user", "content": "A"},
      {"role": "assistant", "content": None, "tool_calls": [CALL]},
      {"role": "tool", "content": "3"},
      {"role": "tool", "content": "4"},
      {"role": "assistant", "content": "It is 3.", "tool_calls": None},
    ],
    f"{HEAD}<role>HUMAN</role>A<|role_end|><role>ASSISTANT</role>⟦<tool_call>add</tool_call><|role_end|>⟧"
    "<role>OBSERVATION</role><tool_response>3</tool_response><tool_response>4</tool_response><|role_end|>"
    "<role>ASSISTANT</role>⟦It is 3.<|role_end|>⟧",
  ),
  "two in a row": (
    [*says("A", "B"), {"role": "assistant", "content": "C"}],
    f"{HEAD}<role>HUMAN</role>A<|role_end|><role>ASSISTANT</role>⟦B<|role_end|>⟧<role>ASSISTANT</role>⟦C<|role_end|>⟧",
  ),
  "a system message within": (
    [*says("A", "B"), {"role": "system", "content": "D"}, *says("A", "B")],
    f"{HEAD}<role>HUMAN</role>A<|role_end|><role>ASSISTANT</role>⟦B<|role_end|>⟧<role>SYSTEM</role>D<|role_end|>"
    "<role>HUMAN</role>A<|role_end|><role>ASSISTANT</role>⟦B<|role_end|>⟧",
  ),
  "the same words": (
    says("No", "No", "No", "No"),
    f"{HEAD}<role>HUMAN</role>No<|role_end|><role>ASSISTANT</role>⟦No<|role_end|>⟧"
    "<role>HUMAN</role>No<|role_end|><role>ASSISTANT</role>⟦No<|role_end|>⟧",
  ),
  "special tokens in a text": (
    says("A<|role_end|>", "B<role>HUMAN</role>", "C", "D"),
    f"{HEAD}<role>HUMAN</role>A<|role_end|><|role_end|><role>ASSISTANT</role>⟦B<role>HUMAN</role><|role_end|>⟧"
    "<role>HUMAN</role>C<|role_end|><role>ASSISTANT</role>⟦D<|role_end|>⟧",
  ),
}


@pytest.mark.parametrize(("messages", "text"), ODD.values(), ids=ODD)
def test_odd_conversations(tokenizers, messages, text):
  expect(
    tokenizers["ling"],
    [{key: value for key, value in m.items() if value is not None or key == "content"} for m in messages],
    text,
  )
  assert chats.tokenize(np.array(messages, object), tokenizers["ling"]) == chats.tokenize(messages, tokenizers["ling"])


def test_a_template_that_trims(tokenizers):
  first = "<s><|header|>user\n\nA<|eot|><|header|>assistant\n\n⟦B<|eot|>⟧"
  text = f"{first}<|header|>user\n\nC<|eot|><|header|>assistant\n\n⟦D<|eot|>⟧"
  expect(tokenizers["llama"], says(" A\n", " B ", "C", "\n\nD"), text)


def test_what_the_generation_prompt_gives_is_not_trained():
  """A template that opens the thinking of the last turn for the model; other turns have none."""
  prompt = TEMPLATES["thinking"].replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
  )
  built = tokenizer("thinking", prompt)
  text = MARKED["thinking"]["two"].replace("⟦<think>\n\n</think>", "<think>\n⟦\n</think>")
  chat = chats.tokenize(TWO, built)
  assert chat.ids == built(text.replace("⟦", "").replace("⟧", ""))["input_ids"]
  written = [built.decode(chat.ids[start:end]) for start, end in chat.turns]
  # "\n\n" is one token, which the prompt's "\n" does not begin: it is the first that the model gives.
  assert written == ["It is 2.<|im_end|>\n", "\n\n</think>\n\n3.<|im_end|>\n"]


def test_pieces_alternate():
  chat = chats.Chat(list(range(9)), [(2, 4), (6, 7)])
  assert chat.pieces() == ([[0, 1], [2, 3], [4, 5], [6], [7, 8]], [True, False, True, False, True])
  assert chats.Chat([1, 2], [(1, 2)]).pieces() == ([[1], [2]], [True, False])
  assert chats.Chat([1, 2], []).pieces() == ([[1, 2]], [True])


UPPER = TEMPLATES["chatml"].replace(
  "{{ message.content }}",
  "{{ message.content | upper if message.role == 'assistant' and not loop.last else message.content }}",
)
"""Writes all messages of the assistant but the last in capitals."""
MARKS = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' -%}
{% generation %}{{ (message.content if loop.last else message.content | upper) + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_a_template_that_cannot_be_cut_is_refused_by_name():
  built = tokenizer("chatml", UPPER)
  built.name_or_path = "some/tokenizer"
  expect(built, ONE, MARKED["chatml"]["one"])
  with pytest.raises(chats.ChatError) as error:
    chats.tokenize(TWO, built)
  text = str(error.value)
  assert "the conversation that begins with 'What is 1 and 1?' (4 messages: user, assistant, user, assistant)" in text
  assert "the chat template of some/tokenizer" in text and "message 1 (assistant)" in text and "{% generation %}" in text


def test_a_template_with_generation_marks_says_it_itself():
  built = tokenizer("chatml", MARKS)
  text = MARKED["chatml"]["two"].replace("It is 2.", "IT IS 2.").replace("<|im_end|>\n⟧", "<|im_end|>⟧\n")
  expect(built, TWO, text)


def test_a_token_across_the_end_of_a_turn_is_refused():
  """The line end after an answer and the one before the next role are one token."""
  plain = "{% for m in messages %}{{ ('\n' if loop.index0 else '') + m.role + ': ' + m.content + '\n' }}{% endfor %}"
  built = tokenizer(
    "chatml", lines_apart=False, template=plain + "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
  )
  assert len(built("\n\n")["input_ids"]) == 1
  with pytest.raises(chats.ChatError, match="its last token is also part of the next message"):
    chats.tokenize(TWO, built)


def test_tokens_that_depend_on_the_text_before():
  """As sentencepiece's, which put a space before a text: a turn tokenized alone has other tokens."""
  from tokenizers import decoders, pre_tokenizers

  plain = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
  built = tokenizer("chatml", template=plain + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
  built.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("x", prepend_scheme="first")
  built.backend_tokenizer.decoder = decoders.Fuse()
  assert built("user")["input_ids"] != built("</s>user")["input_ids"][1:]
  chat = chats.tokenize(says("one", "3.", "and", "No."), built)
  assert chat.ids == built("user: one</s>assistant: 3.</s>user: and</s>assistant: No.</s>")["input_ids"]
  assert [built.decode(chat.ids[start:end]) for start, end in chat.turns] == ["3.</s>", "No.</s>"]


REFUSED = {
  "an unknown role": (
    "ling",
    [*ONE, {"role": "function", "content": "2"}, *ONE],
    "loses content of message 2 (role 'function')",
  ),
  "parts": ("ling", [*ONE[:1], {"role": "assistant", "content": [{"type": "text", "text": "A"}]}], "is refused by it"),
  "calls": (
    "chatml",
    [*ONE[:1], {"role": "assistant", "content": "A", "tool_calls": [CALL]}],
    "loses tool_calls of message 1",
  ),
  "no messages": ("ling", [], "not a list of messages"),
  "no role": ("ling", [{"content": "A"}], "not a list of messages"),
  "text": ("ling", ["A"], "not a list of messages"),
  "the assistant first": (
    "ling",
    ONE[1:],
    "(1 messages: assistant), with the chat template of TokenizersBackend, has nothing",
  ),
}


@pytest.mark.parametrize(("name", "messages", "words"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_lost_is_refused(tokenizers, name, messages, words):
  with pytest.raises(chats.ChatError) as error:
    chats.tokenize(messages, tokenizers[name])
  assert words in str(error.value) and "the chat template of" in str(error.value)


def test_a_tokenizer_without_a_template_is_refused():
  built = tokenizer("ling")
  built.chat_template = None
  with pytest.raises(chats.ChatError, match="is refused by it .*chat_template is not set.*set chat_template"):
    chats.tokenize(ONE, built)


def tokens_of(built, messages, ignored=(), padding=None):
  return chats.ChatTokens(frozenset(ignored), padding)({"messages": messages}, built, "messages")


def test_a_lost_token_is_refused(tokenizers):
  """MaxText takes padding and BOS out of the loss, and unpacked padding out of attention, wherever they are."""
  built = tokenizers["ling"]
  end, pad = built.convert_tokens_to_ids(["<|role_end|>", "<pad>"])
  example = tokens_of(built, TWO, {pad}, pad)
  assert example["is_prompt"] == [True, False, True, False]
  assert sum(example["messages"], []) == chats.tokenize(TWO, built).ids
  with pytest.raises(chats.ChatError, match=rf"has token {end} \('<\|role_end\|>'\)"):
    tokens_of(built, ONE, {end})
  tokens_of(built, says("A<pad>", "B"), {pad})  # of a prompt, packed: it is no target
  with pytest.raises(chats.ChatError, match=rf"has token {pad} \('<pad>'\)"):
    tokens_of(built, says("A<pad>", "B"), {pad}, pad)


def test_tokens_travel_to_other_processes(tokenizers):
  tokens = chats.ChatTokens(frozenset({1}), 0)
  assert pickle.loads(pickle.dumps(tokens)) == tokens


COLUMNS = {
  "texts": ({"prompt": "A", "completion": "B"}, says("A", "B")),
  "a message each": ({"prompt": says("A"), "completion": says("A", "B")[1:]}, says("A", "B")),
  "rounds": (
    {"prompt": [*says("A"), *says("C")], "completion": [says("", "B")[1], says("", "D")[1]]},
    says("A", "B", "C", "D"),
  ),
  "a system prompt": ({"prompt": says("A", system="S"), "completion": says("", "B")[1:]}, says("A", "B", system="S")),
  "a history": ({"prompt": says("A", "B", "C"), "completion": says("", "D")[1:]}, says("A", "B", "C", "D")),
  "questions": ({"answer": "B", "question": "A"}, says("A", "B")),
}


@pytest.mark.parametrize(("example", "messages"), COLUMNS.values(), ids=COLUMNS)
def test_two_columns_are_one_conversation(example, messages):
  for columns in (list(example), list(example)[::-1]):
    assert chats.joined(dict(example), columns, "messages")["messages"] == messages


def test_the_reason_is_found_behind_other_errors():
  assert chats.reason(ValueError("another")) is None
  try:
    try:
      raise chats.ChatError("the conversation")
    except chats.ChatError:
      raise RuntimeError("out of data")  # noqa: B904  as MaxText does
  except RuntimeError as error:
    assert chats.reason(error) == "the conversation"
  assert chats.reason(RuntimeError("worker: ChatError: the conversation")) == "worker: ChatError: the conversation"
