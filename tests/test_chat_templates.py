"""Prompt formats: published templates made fit for training, and Mistral's own tokenizer."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from integration.prompt import ChatTemplate
from scripts._cli import CommandError
from scripts.chat_templates import (
    BOS_WRITTEN,
    FOLDED,
    alpaca_template,
    ensure_pad_token,
    prepare_template,
)
from scripts.plain_tokens import control_tokens
from scripts.render import (
    IGNORED,
    RenderError,
    encode_conversation,
    encode_prompt,
    render,
)
from tests.published_templates import LLAMA_3, ZEPHYR
from tests.tokenizers import find_mistral_model, make_byte_tokenizer, make_mistral_tokenizer_dir

# Published templates are copied as they are, long lines included.
# ruff: noqa: E501
_MISTRAL_START = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
)
_MISTRAL_END = (
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_V1 = _MISTRAL_START + "{{ message['content'] + eos_token + ' ' }}" + _MISTRAL_END
MISTRAL_V2 = _MISTRAL_START + "{{ message['content'] + eos_token}}" + _MISTRAL_END
MISTRAL_V3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{#- This block checks for alternating user/assistant messages, skipping tool calling messages #}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- tool | tojson }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PUBLISHED = {
    "zephyr": ZEPHYR,
    "mistral-v0.1": MISTRAL_V1,
    "mistral-v0.2": MISTRAL_V2,
    "mistral-v0.3": MISTRAL_V3,
    "llama-3": LLAMA_3,
    "chatml": CHATML,
    "alpaca": None,
}
BRACKETS = 14626  # "]<", one token for Mistral
SYSTEM = {"role": "system", "content": "Be brief, Ümit."}
THREE = [
    {"role": "user", "content": "What is [INST] here?"},
    {"role": "assistant", "content": "A marker: [/INST] ends it."},
    {"role": "user", "content": "And\n\n    x = 1?"},
    {"role": "assistant", "content": "Code.\n\n- é 日本"},
    {"role": "user", "content": "Bye </s> 12"},
    {"role": "assistant", "content": "Bye."},
]
TOOLS = [
    {"role": "user", "content": "Upper-case: ab"},
    {
        "role": "assistant",
        "content": '<tool_call>{"name": "up", "arguments": {"t": "ab"}}</tool_call>',
    },
    {"role": "user", "content": "<tool_response>AB</tool_response>"},
    {"role": "assistant", "content": "It is AB."},
]
CHATS = {
    "single": THREE[:2],
    "three": THREE,
    "system": [SYSTEM, *THREE],
    "system single": [SYSTEM, *THREE[:2]],
    "tools": [SYSTEM, *TOOLS],
}


@pytest.fixture(scope="session")
def mistral_dir(tmp_path_factory):
    return make_mistral_tokenizer_dir(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="session", params=["llama", "mistral"])
def mistral_as(request, mistral_dir, tmp_path_factory):
    """The tokenizer as transformers loads it for a Llama (TinyLlama) and for a Mistral."""
    from transformers import AutoTokenizer, LlamaConfig, MistralConfig

    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(mistral_dir, folder, dirs_exist_ok=True)
    {"llama": LlamaConfig, "mistral": MistralConfig}[request.param]().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def mistral(mistral_as, monkeypatch):
    monkeypatch.setattr(mistral_as, "chat_template", None)
    return mistral_as


def byte_tokenizer(name: str):
    if name == "llama-3":
        special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return make_byte_tokenizer(special, special[0], special[-1], adds_bos=True)
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    return make_byte_tokenizer(special, "<s>", "</s>", adds_bos=name != "chatml")


def use(tokenizer, name: str):
    """Set a published template as training does, and give what was changed in it."""
    tokenizer.chat_template = PUBLISHED[name]
    prepared = prepare_template(tokenizer, "alpaca" if name == "alpaca" else "model")
    tokenizer.chat_template = prepared.source
    return prepared.notes


def trained_texts(tokenizer, row) -> list[str]:
    runs, was_trained = [], False
    for label in row.labels:
        if label != IGNORED:
            if not was_trained:
                runs.append([])
            runs[-1].append(label)
        was_trained = label != IGNORED
    return [tokenizer.decode(run).strip() for run in runs]


def answers(chat, end: str) -> list[str]:
    return [turn["content"] + end for turn in chat if turn["role"] == "assistant"]


@pytest.mark.model
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_train_every_answer_with_its_end(name, chat):
    tokenizer, messages = byte_tokenizer(name), CHATS[chat]
    notes = use(tokenizer, name)
    row = encode_conversation(tokenizer, messages, 4000)
    end = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}.get(name, "</s>")
    assert trained_texts(tokenizer, row) == answers(messages, end)
    bos = 0 if name == "chatml" else 1
    assert row.input_ids.count(tokenizer.bos_token_id) == bos
    assert row.input_ids[:bos] == [tokenizer.bos_token_id] * bos
    text = render(tokenizer, messages)
    assert text.count(SYSTEM["content"]) == (messages[0] == SYSTEM)
    assert (FOLDED in notes) == name.startswith("mistral")
    assert (BOS_WRITTEN in notes) == (name == "zephyr")


@pytest.mark.model
@pytest.mark.parametrize("name", ["mistral-v0.1", "mistral-v0.2", "mistral-v0.3"])
def test_folded_system_turn_is_part_of_the_first_question_in_chat_too(name):
    tokenizer = byte_tokenizer(name)
    use(tokenizer, name)
    joined = [{"role": "user", "content": "Be brief, Ümit.\n\nWhat is [INST] here?"}, *THREE[1:]]
    assert render(tokenizer, [SYSTEM, *THREE]) == render(tokenizer, joined)
    tokenizer_facts = (control_tokens(tokenizer), "<s>", "</s>")
    chat = ChatTemplate(tokenizer.chat_template, *tokenizer_facts)
    for size in (2, 4, 6):
        messages = [SYSTEM, *THREE[: size - 1]]
        assert chat.render(messages) == render(tokenizer, messages, add_generation_prompt=True)
    # Its twin: without the prelude the system turn is refused, or is not where it was.
    tokenizer.chat_template = PUBLISHED[name]
    with pytest.raises(RenderError):
        encode_conversation(tokenizer, [SYSTEM, *THREE], 4000)


@pytest.mark.model
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_and_chat_render_the_prepared_template_alike(name):
    tokenizer = byte_tokenizer(name)
    use(tokenizer, name)
    messages = CHATS["tools"][:-1]
    assert tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ) == render(tokenizer, messages, add_generation_prompt=True)


class Fake:
    """What prepare_template asks of a tokenizer."""

    bos_token, eos_token, unk_token, pad_token = "<s>", "</s>", "<unk>", None
    bos_token_id = 1

    def __init__(self, chat_template=None, adds_bos=True, special=("<unk>", "<s>", "</s>")):
        self.chat_template = chat_template
        self.first_ids = [1, 5] if adds_bos else [5]
        self.added_tokens_decoder = {
            token: SimpleNamespace(content=text, special=True) for token, text in enumerate(special)
        }

    def __call__(self, text):
        return SimpleNamespace(input_ids=self.first_ids)


@pytest.mark.parametrize("name", ["zephyr", "mistral-v0.1", "mistral-v0.3", "llama-3", "chatml"])
def test_preparing_twice_changes_nothing_more(name):
    once = prepare_template(Fake(PUBLISHED[name]), "model")
    assert prepare_template(Fake(once.source), "model").source == once.source
    assert prepare_template(Fake(once.source), "model").notes == []


def test_fit_template_is_left_as_it_is():
    for template in (CHATML, LLAMA_3, ZEPHYR):
        prepared = prepare_template(Fake(template, adds_bos=template == LLAMA_3), "model")
        assert (prepared.source, prepared.notes) == (template, [])


def test_template_that_drops_the_system_turn_gets_it_folded():
    template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    )
    prepared = prepare_template(Fake(template, adds_bos=False), "model")
    assert prepared.notes == [FOLDED]
    fake = Fake(prepared.source)
    assert render(fake, [SYSTEM, *THREE[:2]]).startswith("Be brief, Ümit.\n\nWhat is")
    assert render(fake, THREE) == render(Fake(template), THREE)


def test_template_with_other_faults_is_left_for_rendering_to_name():
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert prepare_template(Fake(template, adds_bos=False), "model").source == template


def test_first_newline_of_a_template_survives_the_prelude():
    template = "\n\n" + MISTRAL_V1.replace("{{ bos_token }}", "x")
    prepared = prepare_template(Fake(template), "model")
    assert prepared.notes == [FOLDED, BOS_WRITTEN]
    assert render(Fake(prepared.source), THREE) == "<s>" + render(Fake(template), THREE)


def test_default_of_several_templates_is_taken():
    fake = Fake({"tool_use": "x", "default": CHATML}, adds_bos=False)
    assert prepare_template(fake, "model").source == CHATML


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template; set prompt_format: alpaca"),
        ({"tool_use": "x"}, "has no chat template"),
        ("{% for m in messages %}", "no valid Jinja"),
    ],
)
def test_missing_or_broken_template_is_a_user_error(template, reason):
    with pytest.raises(CommandError, match=reason):
        prepare_template(Fake(template), "model")
    assert prepare_template(Fake(template), "alpaca").source == alpaca_template(Fake())


def test_alpaca_writes_one_bos_where_the_tokenizer_adds_one():
    assert alpaca_template(Fake()).startswith("{{- bos_token -}}")
    assert "bos_token" not in alpaca_template(Fake(adds_bos=False))
    assert prepare_template(Fake(), "alpaca").notes == []


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (["<unk>", "<s>", "</s>"], "<unk>"),
        (["<unk>", "</s>", "<pad>"], "<pad>"),
        (
            ["</s>", "<|reserved_special_token_1|>", "<|reserved_special_token_0|>"],
            "<|reserved_special_token_0|>",
        ),
        (["<s>", "</s>"], "</s>"),
    ],
)
def test_pad_token_comes_from_the_vocabulary(special, expected):
    fake = Fake(special=special)
    assert ensure_pad_token(fake) == fake.pad_token == expected
    fake.pad_token = "<kept>"
    assert ensure_pad_token(fake) == "<kept>"


@pytest.mark.model
def test_pad_token_of_real_tokenizers_adds_no_token(mistral, default_model_dir):
    size = len(mistral)
    assert ensure_pad_token(mistral) == "<unk>"
    assert len(mistral) == size == 32000
    tokenizer = make_byte_tokenizer(["</s>"], eos="</s>")
    assert ensure_pad_token(tokenizer) == "</s>"
    assert len(tokenizer) == 257


@pytest.mark.model
def test_mistral_tokenizer_is_sentencepiece(mistral):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(find_mistral_model()))
    texts = [turn["content"] for turn in [SYSTEM, *THREE, *TOOLS] if "</s>" not in turn["content"]]
    texts += [
        "héllo 12345\n\nÄpfel 日本語 🙂\ttab",
        "a  b   c",
        "def f():\n    return  1\n\n        x",
    ]
    for text in texts:
        assert mistral(text, add_special_tokens=False).input_ids == pieces.encode(text)
    assert mistral("a").input_ids == [1, *pieces.encode("a")]
    assert len(mistral) == pieces.get_piece_size() == 32000


@pytest.mark.model
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "name", ["alpaca", "zephyr", "mistral-v0.1", "mistral-v0.2", "mistral-v0.3"]
)
def test_mistral_tokenizer_trains_every_answer_with_its_end(mistral, name, chat):
    messages = CHATS[chat]
    use(mistral, name)
    row = encode_conversation(mistral, messages, 4000)
    assert trained_texts(mistral, row) == answers(messages, "</s>")
    assert (row.input_ids[0], row.input_ids.count(1)) == (1, 1)
    # `</s>` in a question is text: the only ends are those of turns.
    ends = len(messages) if name == "zephyr" else len(answers(messages, ""))
    assert row.input_ids.count(2) == ends
    assert row.labels.count(2) == len(answers(messages, ""))


@pytest.mark.model
@pytest.mark.parametrize("name", ["alpaca", "mistral-v0.2", "zephyr"])
def test_mistral_ids_are_those_of_the_whole_text(mistral, name):
    use(mistral, name)
    chat = [*THREE[:5], {"role": "assistant", "content": "Bye."}]
    chat[4] = {"role": "user", "content": "Bye 12"}
    row = encode_conversation(mistral, chat, 4000)
    assert row.input_ids == mistral(render(mistral, chat), add_special_tokens=False).input_ids


@pytest.mark.model
@pytest.mark.parametrize("name", ["alpaca", "zephyr", "mistral-v0.1"])
def test_saved_tokenizer_gives_the_same_rows(mistral, name, tmp_path):
    # Transformers forgets `legacy` on saving, which changes what follows a control token.
    from transformers import AutoTokenizer

    use(mistral, name)
    mistral.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CHATS.values():
        row = encode_conversation(mistral, messages, 4000)
        assert encode_conversation(saved, messages, 4000) == row


@pytest.mark.model
def test_embedded_model_needs_no_change(default_model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_dir)
    prepared = prepare_template(tokenizer, "model")
    assert (prepared.source, prepared.notes) == (tokenizer.chat_template, [])
    assert "bos_token" not in prepare_template(tokenizer, "alpaca").source


@pytest.fixture(scope="session")
def llama_cpp_vocabulary(mistral_dir, tmp_path_factory):
    """The tokenizer in a GGUF without weights, read by llama.cpp: what chat tokenizes with."""
    import llama_cpp
    from transformers import MistralConfig

    from export.converter import find_converter

    folder = tmp_path_factory.mktemp("vocabulary")
    shutil.copytree(mistral_dir, folder, dirs_exist_ok=True)
    MistralConfig(architectures=["MistralForCausalLM"], vocab_size=32000).save_pretrained(folder)
    path = folder / "vocabulary.gguf"
    script = [sys.executable, str(find_converter()), str(folder), "--vocab-only", "--outfile"]
    subprocess.run([*script, str(path)], check=True, capture_output=True)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    yield model
    model.close()


@pytest.mark.model
@pytest.mark.parametrize(
    "name", ["alpaca", "zephyr", "mistral-v0.1", "mistral-v0.2", "mistral-v0.3"]
)
def test_training_and_chat_give_the_same_ids(mistral, llama_cpp_vocabulary, name):
    use(mistral, name)

    def tokenize(text):
        return llama_cpp_vocabulary.tokenize(text.encode(), add_bos=False, special=False)

    chat = ChatTemplate(mistral.chat_template, {"<s>": 1, "</s>": 2}, "<s>", "</s>")
    odd = [
        {"role": "user", "content": "  </s> [INST] <s>\n\n    x  =  1 <unk> ▁"},
        {"role": "assistant", "content": "日本 </s> \tand  so"},
        {"role": "user", "content": "</s>"},
        {"role": "assistant", "content": " \n<s>"},
    ]
    joined = 0
    for messages in [*CHATS.values(), odd, [SYSTEM, *odd]]:
        row = encode_conversation(mistral, messages, 4000)
        assert row.labels.count(2) == len(answers(messages, ""))
        first = next(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
        for asked in (messages[:first], messages[:-1]):
            assert encode_prompt(mistral, asked) == chat.encode(asked, tokenize)
        prompt = chat.encode(messages[:first], tokenize)
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[: len(prompt) + 1] == [IGNORED] * len(prompt) + [
            row.input_ids[len(prompt)]
        ]
        whole = chat.encode(messages, tokenize, add_generation_prompt=False)
        if BRACKETS in whole:
            # Chat reads a former answer with its first character joined to the prompt's last one;
            # an answer that is trained starts where the prompt ends.
            joined += 1
            assert BRACKETS not in row.input_ids
        else:
            assert row.input_ids == whole
    assert joined == (name in ("mistral-v0.1", "mistral-v0.2"))


@pytest.mark.model
def test_answer_that_is_not_trained_is_read_as_in_chat(mistral):
    use(mistral, "mistral-v0.2")
    untrained = [turn | {"weight": 0} if turn == TOOLS[1] else turn for turn in TOOLS]
    row = encode_conversation(mistral, untrained, 4000)
    assert BRACKETS in row.input_ids
    assert trained_texts(mistral, row) == ["It is AB.</s>"]
    assert BRACKETS in encode_prompt(mistral, TOOLS[:3])


@pytest.mark.model
def test_answer_that_starts_with_a_line_break_keeps_it(mistral):
    mistral.chat_template = CHATML.replace("'<|im_end|>'", "eos_token").replace(
        "'\n' + m", "'\n\n' + m"
    )
    row = encode_conversation(mistral, [THREE[0], {"role": "assistant", "content": "\nso"}], 400)
    assert mistral.decode([label for label in row.labels if label != IGNORED]).endswith("\nso</s>")
