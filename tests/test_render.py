"""Spans and labels from rendering: what is trained, what is not, and what is refused."""

import pytest

from scripts.chat_templates import alpaca_template
from scripts.render import IGNORED, RenderError, answer_spans, encode_conversation

pytestmark = pytest.mark.model

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another <|im_end|> one?"},
    {"role": "assistant", "content": "Green, or\n\nred."},
]
TEMPLATES = {
    "chatml": None,
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "mistral": (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": "alpaca",
}


@pytest.fixture
def tokenizer(default_model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_model_dir)


@pytest.fixture(params=TEMPLATES)
def formatted(request, tokenizer):
    template = TEMPLATES[request.param]
    if template == "alpaca":
        tokenizer.chat_template = alpaca_template(tokenizer)
    elif template:
        tokenizer.chat_template = template
    return tokenizer


def trained_texts(tokenizer, row) -> list[str]:
    """Decode each run of trained tokens."""
    runs, current = [], []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if label == IGNORED and current:
            runs.append(current)
            current = []
        elif label != IGNORED:
            assert label == token
            current.append(token)
    return [tokenizer.decode(run) for run in [*runs, current] if run]


def test_every_answer_is_trained_with_its_end_and_nothing_else(formatted):
    chat = CHAT[1:] if "[INST]" in formatted.chat_template else CHAT
    row = encode_conversation(formatted, chat, 400)
    texts = [text.strip() for text in trained_texts(formatted, row)]
    end = formatted.eos_token
    assert texts == ["Blue." + end, "Green, or\n\nred." + end]


def test_ids_are_those_of_the_whole_rendered_text(formatted):
    chat = CHAT[1:]
    row = encode_conversation(formatted, chat, 400)
    text = formatted.apply_chat_template(chat, tokenize=False)
    assert row.input_ids == formatted(text, add_special_tokens=False).input_ids


def test_long_conversation_is_cut_at_a_turn(tokenizer):
    whole = encode_conversation(tokenizer, CHAT, 400)
    cut = encode_conversation(tokenizer, CHAT, len(whole.input_ids) - 1)
    assert (whole.dropped_turns, cut.dropped_turns) == (0, 2)
    assert trained_texts(tokenizer, cut) == ["Blue.<|im_end|>"]


def test_conversation_that_cannot_fit_gives_none(tokenizer):
    assert encode_conversation(tokenizer, CHAT, 10) is None


def test_template_that_drops_content_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content[:4] }}{% endfor %}"
    with pytest.raises(RenderError, match="drops the content of a system turn"):
        answer_spans(tokenizer, CHAT)


def test_template_that_looks_ahead_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(RenderError, match="differently from the whole"):
        answer_spans(tokenizer, CHAT)


def test_alpaca_writes_one_bos_where_the_tokenizer_adds_one():
    class AddsBos:
        bos_token_id = 1

        def __call__(self, text):
            return type("Encoded", (), {"input_ids": [1, 5]})

    assert alpaca_template(AddsBos()).startswith("{{- bos_token -}}")
    AddsBos.bos_token_id = 7
    assert "bos_token" not in alpaca_template(AddsBos())
