"""Conversations as text to train on."""

import numpy as np
import pytest

from goose_jax.chat import render_conversation
from goose_jax.chat.prompt import next_turn
from goose_jax.data import Document, encode_document, encode_documents
from goose_jax.text import ByteTokenizer, VocabularyTokenizer


def counted_texts(messages):
    text, counted = render_conversation(messages)
    return text, [text[start:end] for start, end in counted]


def test_a_conversation_has_the_form_of_a_chat():
    messages = [
        {"role": "system", "content": "Be brief.\n\n\nBe kind."},
        {"role": "user", "content": " What is 2 + 2?\r\n\r\nSay. "},
        {"role": "assistant", "content": "4\r\n\r\nFour."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}],
        },
        {"role": "assistant", "content": "<think>Hm</think>\nSo."},
    ]
    text, counted = counted_texts(messages)
    assert text == (
        "System: Be brief.\nBe kind.\n\n"
        "User: What is 2 + 2?\nSay.\n\n"
        "Assistant: 4\n\nFour.\n\n"
        "User: Why?\n\n"
        "Assistant: <think>Hm</think>\nSo."
    )
    assert counted == [" 4\n\nFour.\n\nUser:", " <think>Hm</think>\nSo."]


def test_it_begins_as_the_prompt_of_a_chat():
    """Up to each reply the text is what a model reads when it chats."""
    text, counted = render_conversation(
        [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "2 + 2?"},
            {"from": "gpt", "value": "4"},
            {"from": "human", "value": "3 + 3?"},
            {"from": "gpt", "value": "6"},
        ]
    )
    first = next_turn("", "2 + 2?", system="Be brief.")
    assert text[: counted[0][0]] == first
    read = first + " 4"
    assert text[: counted[1][0]] == read + next_turn(read, "3 + 3?")


def test_replies_in_a_row_and_results_of_tools():
    text, counted = counted_texts(
        [
            {"role": "system", "content": "  "},
            {"role": "assistant", "content": "Hi"},
            {"role": "assistant", "content": "```json\n{}\n```"},
            {"role": "tool", "content": "12 degrees"},
            {"role": "assistant", "content": "12"},
            {"role": "system", "content": "Stop."},
        ]
    )
    assert text == (
        "Assistant: Hi\n\nAssistant: ```json\n{}\n```\n\n"
        "User: Function output:\n12 degrees\n\nAssistant: 12\n\nSystem: Stop."
    )
    assert counted == [" Hi\n\n", " ```json\n{}\n```\n\nUser:", " 12\n\nSystem:"]


@pytest.mark.parametrize(("end", "last"), [([], True), ([{"role": "user", "content": "x"}], False)])
def test_the_loss_counts_the_tokens_of_replies(end, last):
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4ü"},
        *end,
    ]
    text, counted = render_conversation(messages)
    tokenizer = ByteTokenizer()
    tokens, is_counted = encode_document(Document("a", text, counted), tokenizer)
    assert tokens.tolist() == [*tokenizer.encode(text), 0]
    expected = " 4ü" if last else " 4ü\n\nUser:"
    assert tokenizer.decode(tokens[is_counted]) == expected
    assert bool(is_counted[-1]) == last  # the end of the document ends the last reply


def test_no_token_reaches_over_the_end_of_a_counted_range():
    vocabulary = {i: bytes([i]) for i in range(1, 128)} | {200: b"ab", 201: b"bc", 202: b"cd"}
    tokenizer = VocabularyTokenizer(vocabulary)
    document = Document("a", "abcd", ((1, 3),))
    tokens, is_counted = encode_document(document, tokenizer)
    assert tokens.tolist() == [97, 201, 100, 0]
    assert is_counted.tolist() == [False, True, False, False]
    whole = Document("a", "abcd", ((0, 4),))
    tokens, is_counted = encode_document(whole, tokenizer)
    assert tokens.tolist() == [200, 202, 0]
    assert is_counted.all()
    np.testing.assert_array_equal(encode_documents([document], tokenizer), [0, 97, 201, 100, 0])
