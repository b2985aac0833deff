"""The Modelfile's Go template says what the chat template says.

Ollama itself is not run: `run_go` interprets the part of Go that is used, and `read_modelfile` reads
commands by the rules of Ollama's parser.
"""

from pathlib import Path

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from export._cli import MODEL, CommandError
from export.modelfile import (
    ChatFormat,
    find_turn_format,
    modelfile,
    read_chat_format,
    render_chat,
    stop_tokens,
)
from export.run_facts import RunFacts
from tests.go_template import run_go
from tests.published_templates import LLAMA_3, ZEPHYR

# ruff: noqa: E501 (published templates are copied as they are)
FACTS = RunFacts("run", "org/Base-1B", 10**9, license="apache-2.0")
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SMOLLM_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = SMOLLM.replace("{% if loop.first and messages[0]['role'] != 'system' %}", "{% if 0 %}")
QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" and loop.last and system_message is defined %}
        {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "user" %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
# Llama 3.1 writes a system turn even where there is no system text.
LLAMA_31 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: 26 Jul 2024\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def published() -> dict[str, ChatFormat]:
    from scripts.chat_templates import _ALPACA, _FOLD_SYSTEM

    return {
        "smollm": ChatFormat(SMOLLM, "<|im_end|>", "<|im_start|>", adds_bos=False),
        "chatml": ChatFormat(CHATML, "<|im_end|>", None),
        "qwen": ChatFormat(QWEN, "<|im_end|>", None),
        "zephyr": ChatFormat(ZEPHYR, "</s>", "<s>"),
        "alpaca": ChatFormat(_ALPACA, "<|im_end|>", "<|im_start|>"),
        "alpaca with BOS": ChatFormat("{{- bos_token -}}" + _ALPACA, "</s>", "<s>"),
        "mistral": ChatFormat(MISTRAL, "</s>", "<s>"),
        "mistral folded": ChatFormat(_FOLD_SYSTEM + MISTRAL, "</s>", "<s>"),
        "mistral v3": ChatFormat(MISTRAL_V3, "</s>", "<s>"),
        "llama-3": ChatFormat(LLAMA_3, "<|eot_id|>", "<|begin_of_text|>"),
        "llama-3.1": ChatFormat(LLAMA_31, "<|eot_id|>", "<|begin_of_text|>"),
    }


PUBLISHED = published()
WRITES_BOS = {"alpaca with BOS", "mistral", "mistral folded", "mistral v3", "llama-3", "llama-3.1"}
USER = [{"role": "user", "content": 'Why?\n\n- {{ braces }} and "quotes"'}]
TALK = [*USER, {"role": "assistant", "content": "So:\n1. é"}, {"role": "user", "content": "Go on"}]
SYSTEM = {"role": "system", "content": "Be brief.\nAlways."}
CONVERSATIONS = {
    "user": USER,
    "system, user": [SYSTEM, *USER],
    "talk": TALK,
    "all": [SYSTEM, *TALK],
}


def hf_render(chat: ChatFormat, messages: list[dict[str, str]]) -> str:
    """Render as transformers' apply_chat_template does."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(chat.template).render(
        messages=messages,
        add_generation_prompt=True,
        bos_token=chat.bos_token or "",
        eos_token=chat.eos_token,
    )


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Read commands as Ollama's parser does: a value goes on until its quotes are closed."""
    commands: list[tuple[str, str]] = []
    lines = iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        while (found := unquote(value.strip())) is None:
            value += "\n" + next(lines)
        commands.append((name, found))
    return commands


def unquote(value: str) -> str | None:
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value


def ollama_prompt(chat: ChatFormat, text: str, messages: list[dict[str, str]], bos: bool) -> str:
    """Build the prompt: SYSTEM in front where there is no system turn, BOS by the runtime."""
    commands = dict(read_modelfile(text))
    if "SYSTEM" in commands and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": commands["SYSTEM"]}, *messages]
    return (chat.bos_token or "") * bos + run_go(commands["TEMPLATE"], messages)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_go_template_writes_what_the_chat_template_writes(name: str, conversation: str) -> None:
    chat, messages = PUBLISHED[name], CONVERSATIONS[conversation]
    text = modelfile("a.gguf", chat, FACTS)
    if name == "mistral" and messages[0] is SYSTEM:
        with pytest.raises(TemplateError):
            hf_render(chat, messages)
        assert "takes no system turn" in text
        return
    assert ollama_prompt(chat, text, messages, name in WRITES_BOS) == hf_render(chat, messages)


@pytest.mark.parametrize("name", PUBLISHED)
def test_another_template_would_be_noticed(name: str) -> None:
    chat = PUBLISHED[name]
    text = modelfile("a.gguf", chat, FACTS).replace("{{ .Content }}", "{{ .Content }} ")
    assert ollama_prompt(chat, text, TALK, name in WRITES_BOS) != hf_render(chat, TALK)


def test_interpreter_refuses_what_it_does_not_know() -> None:
    for template in ("{{- .System }}", "{{ if .System }}x", "{{ printf .System }}", "{{ end }}"):
        with pytest.raises((AssertionError, KeyError)):
            run_go(template, USER)
    assert run_go("{{ if .System }}a{{ else }}b{{ end }}", USER) == "b"


def test_default_system_prompts_are_found_by_rendering() -> None:
    found = {name: find_turn_format(chat) for name, chat in PUBLISHED.items()}
    defaults = {name: form.default_system for name, form in found.items() if form}
    assert {name: text for name, text in defaults.items() if text} == {
        "smollm": SMOLLM_SYSTEM,
        "qwen": "You are Qwen.",
    }
    assert len(defaults) == len(PUBLISHED)


@pytest.mark.parametrize(
    "template",
    [
        # ChatML's and alpaca's words, and other templates.
        "{# <|im_start|> <|im_end|> #}{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}",
        "{# ### Instruction: ### Response: #}{{ messages[-1].content }}",
        SMOLLM.replace("message['content'] +", "message['content'] | upper +"),
        SMOLLM.replace("loop.first and", "loop.last and"),
        "{{ broken",
        "{{ raise_exception('never') }}",
        "the same always",
        "",
        None,
    ],
)
def test_unknown_template_is_left_out(template: str | None) -> None:
    chat = ChatFormat(template, "</s>", "<s>")
    assert find_turn_format(chat) is None
    text = modelfile("a.gguf", chat, FACTS)
    assert "# TEMPLATE is left out" in text
    assert "TEMPLATE" not in dict(read_modelfile(text))
    assert ("stop", "</s>") in read_modelfile(text)


@pytest.mark.parametrize("token", ['<"""">', "<{{ .System }}>", "<{", "<\x07>"])
def test_what_a_modelfile_cannot_hold_is_left_out(token: str) -> None:
    chat = ChatFormat(CHATML.replace("<|im_end|>", token), "</s>")
    assert find_turn_format(chat) is not None
    assert "# TEMPLATE is left out" in modelfile("a.gguf", chat, FACTS)


def test_bos_is_left_to_the_runtime_unless_it_adds_none() -> None:
    for name in sorted(WRITES_BOS):
        chat = PUBLISHED[name]
        form = find_turn_format(chat)
        assert form is not None
        assert form.start == ""
        kept = find_turn_format(ChatFormat(chat.template, "</s>", chat.bos_token, adds_bos=False))
        assert kept is not None
        assert kept.start == chat.bos_token
    literal = ChatFormat("<s>" + ZEPHYR, "</s>", "<s>")
    form = find_turn_format(literal)
    assert form is not None
    assert form.start == ""


def test_all_lines_of_a_modelfile() -> None:
    facts = RunFacts(
        "run",
        "org/Base-1B",
        10**9,
        license="other",
        license_name='the "tome" licence',
        sampling={"temp": 0.6, "top_k": 50, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1},
    )
    chat = ChatFormat(ZEPHYR, "</s>", "<s>", end_tokens=("<|end|>", "</s>", '<"q">'))
    commands = read_modelfile(modelfile("a b.gguf", chat, facts, "x-F16-LoRA.gguf"))
    assert commands[:2] == [("FROM", "./a b.gguf"), ("ADAPTER", "./x-F16-LoRA.gguf")]
    assert [value for name, value in commands if name == "stop"] == ["</s>", "<|end|>", '<"q">']
    parameters = dict(commands)
    assert parameters["temperature"] == "0.6"
    assert parameters["top_k"] == "50"
    assert parameters["top_p"] == "0.95"
    assert parameters["min_p"] == "0.05"
    assert parameters["repeat_penalty"] == "1.1"
    assert parameters["LICENSE"] == 'other the "tome" licence'
    plain = modelfile("a.gguf", chat, RunFacts("run", "b", 1))
    assert "LICENSE" not in plain
    assert "ADAPTER" not in plain


def test_stop_tokens_of_the_template_and_of_the_tokenizer() -> None:
    chat = ChatFormat(CHATML, "<|endoftext|>")
    assert stop_tokens(chat, find_turn_format(chat)) == ["<|im_end|>", "<|endoftext|>"]
    assert stop_tokens(ChatFormat(None, None), None) == []


def test_chat_format_of_tokenizer_files(tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    config = '{"eos_token": {"content": "</s>"}, "bos_token": "<s>", "add_bos_token": false, %s}'
    sources = {
        "tokenizer_config.json": write("tokenizer_config.json", config % '"chat_template": "a"')
    }
    assert read_chat_format(sources) == ChatFormat("a", "</s>", "<s>", (), False)
    named = '"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]'
    write("tokenizer_config.json", config % named)
    assert read_chat_format(sources).template == "d"
    added = '{"added_tokens": [{"id": 2, "content": "</s>"}, {"id": 7, "content": "<|end|>"}]}'
    sources["tokenizer.json"] = write("tokenizer.json", added)
    write("generation_config.json", '{"eos_token_id": [2, 7, 99]}')
    sources["chat_template.jinja"] = write("chat_template.jinja", "j")
    chat = read_chat_format(sources, tmp_path)
    assert (chat.template, chat.end_tokens) == ("j", ("</s>", "<|end|>"))
    write("generation_config.json", '{"eos_token_id": 2}')
    assert read_chat_format(sources, tmp_path).end_tokens == ()
    assert read_chat_format({}) == ChatFormat(None, None)
    write("tokenizer_config.json", "{")
    with pytest.raises(CommandError, match="tokenizer_config") as caught:
        read_chat_format(sources)
    assert caught.value.exit_code == MODEL


def test_rendering_tells_a_refusal() -> None:
    assert render_chat(PUBLISHED["mistral"], [SYSTEM, *USER]) is None
    assert render_chat(PUBLISHED["chatml"], USER) == hf_render(PUBLISHED["chatml"], USER)
