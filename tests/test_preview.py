"""Preview: what is trained can be seen, on a terminal and in a file."""

import io
import re

import pytest

from scripts.preview import preview_rows
from scripts.render import encode_conversation
from tests.tokenizers import make_byte_tokenizer

pytestmark = pytest.mark.model

CHAT = [
    {"role": "user", "content": "Größe?"},
    {"role": "assistant", "content": "Blue 🙂"},
    {"role": "user", "content": "\x1b[31mred"},
    {"role": "assistant", "content": "no"},
]
GREEN, DIM, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def no_colour_wishes(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def tokenizer():
    tokenizer = make_byte_tokenizer(["<s>", "</s>"], "<s>", "</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def preview(tokenizer, count=9, file=None, max_lengths=(400,)) -> str:
    file = file or io.StringIO()
    rows = [encode_conversation(tokenizer, CHAT, max_length) for max_length in max_lengths]
    preview_rows(tokenizer, rows, count, file)
    return file.getvalue()


def test_without_colour_trained_spans_stand_in_brackets(tokenizer):
    assert preview(tokenizer).splitlines() == [
        "trained tokens are ⟦in brackets⟧, everything else is only read",
        "",
        "--- row 1: 56 tokens, 13 trained ---",
        "<s>[INST]Größe?[/INST]⟦Blue 🙂</s>⟧[INST]␛[31mred[/INST]⟦no</s>⟧",
    ]


def test_terminal_gets_colours_and_no_command_from_the_data(tokenizer):
    shown = preview(tokenizer, file=Terminal())
    assert f"{DIM}<s>[INST]Größe?[/INST]{RESET}{GREEN}Blue 🙂</s>{RESET}" in shown
    assert set(re.findall("\x1b[^m]*m", shown)) == {GREEN, DIM, RESET}
    assert "⟦" not in shown


@pytest.mark.parametrize(
    ("wishes", "file", "is_coloured"),
    [
        ({"FORCE_COLOR": "1"}, io.StringIO, True),
        ({"NO_COLOR": "1"}, Terminal, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, Terminal, False),
        ({"NO_COLOR": ""}, Terminal, True),
    ],
)
def test_wishes_about_colour_are_honoured(tokenizer, monkeypatch, wishes, file, is_coloured):
    for name, value in wishes.items():
        monkeypatch.setenv(name, value)
    assert (GREEN in preview(tokenizer, file=file())) == is_coloured


def test_count_and_cut_turns_are_shown(tokenizer):
    shown = preview(tokenizer, count=2, max_lengths=(400, 40, 400))
    assert re.findall("--- .* ---", shown) == [
        "--- row 1: 56 tokens, 13 trained ---",
        "--- row 2: 32 tokens, 10 trained, 2 turns cut ---",
    ]
    assert preview(tokenizer, count=0).count("row") == 0
