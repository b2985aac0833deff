"""An Ollama Modelfile whose Go template says what the trained chat template says.

In: the tokenizer files that training wrote, the run's facts. Out: `Modelfile`.

How a template writes its turns is found by rendering: it is cut at the contents of a few messages,
the pieces are put together as Go would, and both must agree on conversations of every kind. Words in
the template's source decide nothing. Tests run the Go template with an interpreter of the part of Go
that is used here; Ollama itself was not run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from export.base_model import read_json
from export.run_facts import RunFacts

Messages = Sequence[Mapping[str, str]]
# Ollama's names of what `RunFacts.sampling` holds.
PARAMETERS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
}
# A template is a program of somebody else's; these are its faults, and no reason to stop.
_TEMPLATE_FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_BOS_MARK = "[tome-bos]"
_SYSTEM, _USER, _ANSWER, _NEXT = "tome-system", "tome-question", "tome-answer", "tome-another"
_ROLES = ("user", "assistant")
_TEXTS = (
    "Be brief.\n\nAnswer in verse.",
    "What is a tome?",
    "A book.\n\n- large\n- old",
    'And "it"?',
)


@dataclass(frozen=True)
class ChatFormat:
    """The tokenizer's chat template and control tokens, as training wrote them.

    Attributes:
        end_tokens: Further tokens that end an answer, by the base's generation_config.json.
        adds_bos: What tokenizer_config.json says; None if it says nothing.
    """

    template: str | None
    eos_token: str | None
    bos_token: str | None = None
    end_tokens: tuple[str, ...] = ()
    adds_bos: bool | None = None


@dataclass(frozen=True)
class TurnFormat:
    """How a chat template writes a conversation: what stands around each turn.

    Attributes:
        start: What every conversation begins with; BOS only where the runtime adds none.
        user, assistant: Before and after such a turn.
        prompt: What asks for an answer, after the last turn.
        system: Before and after a system turn; None: it takes none, or has no turn for it.
        system_in: `own`, or the user turn that the system text is put in front of: `first`, `last`.
        without_system: Stands where no system text is given.
        default_system: The system prompt that is put in when none is given.
    """

    start: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    system: tuple[str, str] | None = None
    system_in: str = "own"
    without_system: str = ""
    default_system: str | None = None

    def render(self, messages: Messages) -> str:
        """Write a conversation up to the answer to come, as the Go template does."""
        texts = [turn["content"] for turn in messages if turn["role"] == "system"]
        if not texts and self.default_system:
            return self.render([{"role": "system", "content": self.default_system}, *messages])
        around = {"user": self.user, "assistant": self.assistant}
        if self.system and self.system_in == "own":
            around["system"] = self.system
        parts = [self.start, "" if texts else self.without_system]
        for place, turn in enumerate(messages):
            if turn["role"] not in around:
                continue
            before, after = around[turn["role"]]
            chosen = {"first": place == 1, "last": place == len(messages) - 1}
            if turn["role"] == "user" and self.system and texts and chosen.get(self.system_in):
                before += self.system[0] + texts[0] + self.system[1]
            parts += [before, turn["content"], after]
        return "".join([*parts, self.prompt])

    def to_go(self) -> str:
        """Give the template in Go, in the form that Ollama executes with `.Messages`.

        No trim markers: every character outside the braces is meant. Ollama has no function that
        trims, so contents that a template strips of outer blanks keep them here.
        """
        folded = ""
        if self.system and self.system_in != "own":
            # Ollama hands the system turn in `.Messages` as well: it is the one before the first.
            place = "eq $i 1" if self.system_in == "first" else "eq (len (slice $.Messages $i)) 1"
            around = f"{self.system[0]}{{{{ $.System }}}}{self.system[1]}"
            folded = f"{{{{ if and $.System ({place}) }}}}{around}{{{{ end }}}}"
        turns = [
            _go_turn("if", "user", (self.user[0] + folded, self.user[1])),
            _go_turn("else if", "assistant", self.assistant),
        ]
        if self.system and self.system_in == "own":
            turns.append(_go_turn("else if", "system", self.system))
        alone = self.without_system
        return "".join(
            [
                self.start,
                f"{{{{ if not .System }}}}{alone}{{{{ end }}}}" if alone else "",
                "{{ range $i, $_ := .Messages }}",
                *turns,
                "{{ end }}{{ end }}",
                self.prompt,
            ]
        )

    @property
    def is_writable(self) -> bool:
        """Tell whether a Modelfile can hold the pieces: it knows no escapes."""
        pieces = [self.start, *self.user, *self.assistant, self.prompt, *(self.system or ())]
        pieces.append(self.without_system)
        text = "".join([*pieces, self.default_system or ""])
        plain = text.replace("\n", "").replace("\t", "")
        braces = any("{" in piece for piece in pieces)
        return not braces and '"""' not in text and plain.isprintable()


def _go_turn(keyword: str, role: str, around: tuple[str, str]) -> str:
    return f'{{{{ {keyword} eq .Role "{role}" }}}}{around[0]}{{{{ .Content }}}}{around[1]}'


def read_chat_format(sources: Mapping[str, Path], base_dir: Path | None = None) -> ChatFormat:
    """Read the chat format from tokenizer files.

    Args:
        sources: By file name, as `tokenizer_sources` gives them.
        base_dir: The base, whose generation_config.json may name further end tokens.

    Raises:
        CommandError: Exit 3: a file is no valid JSON.
    """
    name = "tokenizer_config.json"
    config = read_json(sources[name]) if name in sources else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones, as for tools
        named = {item.get("name"): item.get("template") for item in template}
        template = named.get("default")
    if "chat_template.jinja" in sources:
        template = sources["chat_template.jinja"].read_text(encoding="utf-8")
    adds_bos = config.get("add_bos_token")
    return ChatFormat(
        template if isinstance(template, str) and template else None,
        _token(config.get("eos_token")),
        _token(config.get("bos_token")),
        _end_tokens(sources, config, base_dir),
        adds_bos if isinstance(adds_bos, bool) else None,
    )


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _end_tokens(
    sources: Mapping[str, Path], config: Mapping[str, Any], base_dir: Path | None
) -> tuple[str, ...]:
    """Name the tokens of generation_config's list; a single one is eos_token, or was replaced."""
    path = base_dir / "generation_config.json" if base_dir else None
    ids = read_json(path).get("eos_token_id") if path and path.is_file() else None
    if not isinstance(ids, list):
        return ()
    names = {str(key): _token(item) for key, item in config.get("added_tokens_decoder", {}).items()}
    if not names and "tokenizer.json" in sources:
        added = read_json(sources["tokenizer.json"]).get("added_tokens", [])
        names = {str(item.get("id")): _token(item) for item in added}
    return tuple(name for number in ids if (name := names.get(str(number))))


def render_chat(chat: ChatFormat, messages: Messages, *, prompt: bool = True) -> str | None:
    """Render messages as chat does; None if there is no template, or it refuses them.

    Args:
        chat: Template and tokens.
        messages: Turns with `role` and `content`.
        prompt: End with what asks for an answer.
    """
    from jinja2 import TemplateError

    try:
        text: str = _compile(chat.template or "").render(
            messages=[dict(turn) for turn in messages],
            add_generation_prompt=prompt,
            bos_token=chat.bos_token or "",
            eos_token=chat.eos_token or "",
        )
    except (TemplateError, *_TEMPLATE_FAULTS):
        return None
    return text or None


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """Compile as chat does (`export.plain_tokens`): sandboxed, with no date and no extra names."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> Any:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def find_turn_format(chat: ChatFormat) -> TurnFormat | None:
    """Find how a chat template writes its turns, None if it does not write turn after turn."""
    # A mark of our own shows where the template writes BOS: SmolLM2's <|im_start|> is BOS too.
    marked = replace(chat, bos_token=_BOS_MARK)
    cut = _cut(marked)
    if cut is not None:
        lead, turns = cut
        for form in _system_forms(lead, turns, _cut_system(marked)):
            if _agrees(form, marked):
                return replace(form, start=_without_bos(form, chat))
    return None


def _cut(chat: ChatFormat) -> tuple[str, TurnFormat] | None:
    """Cut two exchanges at their contents: what is in front of all turns, and around each."""
    question = {"role": "user", "content": _USER}
    answer = {"role": "assistant", "content": _ANSWER}
    asked = render_chat(chat, [question])
    unasked = render_chat(chat, [question], prompt=False)
    answered = render_chat(chat, [question, answer], prompt=False)
    whole = render_chat(chat, [question, answer, {"role": "user", "content": _NEXT}])
    if asked is None or unasked is None or answered is None or whole is None:
        return None
    if not asked.startswith(unasked) or _USER not in unasked or _ANSWER not in answered:
        return None
    prompt = asked[len(unasked) :]
    head, _, user_end = unasked.partition(_USER)
    between = answered.partition(_USER)[2].partition(_ANSWER)[0]
    answer_end = answered.partition(_ANSWER)[2]
    next_start = whole.partition(_ANSWER)[2].partition(_NEXT)[0]
    if not between.startswith(user_end) or not next_start.startswith(answer_end):
        return None
    user_start = next_start[len(answer_end) :]
    if not head.endswith(user_start):
        return None
    lead = head[: len(head) - len(user_start)]
    assistant = (between[len(user_end) :], answer_end)
    return lead, TurnFormat("", (user_start, user_end), assistant, prompt)


def _cut_system(chat: ChatFormat) -> tuple[str, str] | None:
    """Give what stands before a system text, and between it and the question."""
    turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    text = render_chat(chat, turns, prompt=False)
    if text is None or text.count(_SYSTEM) != 1 or text.count(_USER) != 1:
        return None
    before, _, rest = text.partition(_SYSTEM)
    between, found, _ = rest.partition(_USER)
    return (before, between) if found else None


def _system_forms(
    lead: str, turns: TurnFormat, cut: tuple[str, str] | None
) -> Iterator[TurnFormat]:
    """List what the pieces could mean; rendering decides."""
    plain = replace(turns, start=lead)
    if cut is None:
        yield plain
        return
    before, between = cut
    if between.endswith(turns.user[0]):
        after = between[: len(between) - len(turns.user[0])]
        if before.startswith(lead):
            yield replace(plain, system=(before[len(lead) :], after))
        if lead.startswith(before) and lead.endswith(after):
            # Without a system turn, the template writes one: its default, or an empty one.
            bos = _BOS_MARK if before.startswith(_BOS_MARK) else ""
            default = lead[len(before) : len(lead) - len(after)]
            system = (before[len(bos) :], after)
            found = replace(turns, start=bos, system=system, default_system=default or None)
            yield replace(found, without_system="" if default else lead[len(bos) :])
    if before.startswith(lead + turns.user[0]):
        inside = (before[len(lead + turns.user[0]) :], between)
        yield replace(plain, system=inside, system_in="first")
        yield replace(plain, system=inside, system_in="last")


def _agrees(form: TurnFormat, chat: ChatFormat) -> bool:
    """Compare with the chat template on conversations of every kind."""
    system, *turns = _TEXTS
    talk = [{"role": _ROLES[n % 2], "content": text} for n, text in enumerate(turns)]
    talk += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Thanks"}]
    talks: list[Messages] = [talk[:1], talk[:3], talk]
    if form.system:
        talks += [[{"role": "system", "content": system}, *talk] for talk in talks]
    return all(form.render(talk) == render_chat(chat, talk) for talk in talks)


def _without_bos(form: TurnFormat, chat: ChatFormat) -> str:
    """Leave BOS to the runtime, which adds it to every prompt; keep it where that is off."""
    bos, start = chat.bos_token or "", form.start
    if start.startswith(_BOS_MARK):
        start = bos + start[len(_BOS_MARK) :]
    elif form.user[0].startswith(bos):
        return start  # such as <|im_start|>: a turn's own, or there is none
    return start.removeprefix(bos) if chat.adds_bos is not False else start


def stop_tokens(chat: ChatFormat, form: TurnFormat | None) -> list[str]:
    """List the tokens that end an answer, that of the template first."""
    written = form.assistant[1].split()[:1] if form else []
    found = [*written, chat.eos_token, *chat.end_tokens]
    return list(dict.fromkeys(token for token in found if token))


def modelfile(
    best_file: str, chat: ChatFormat, facts: RunFacts, adapter_file: str | None = None
) -> str:
    """Write an Ollama Modelfile.

    Args:
        best_file: The GGUF beside it.
        chat: What training wrote.
        facts: For sampling and licence: the same values as in metadata and card.
        adapter_file: A LoRA GGUF beside it, for the base's GGUF as `best_file`.
    """
    lines = [f"FROM ./{best_file}"]
    lines += [f"ADAPTER ./{adapter_file}"] if adapter_file else []
    form = find_turn_format(chat)
    if form is None or not form.is_writable:
        lines += [
            "",
            "# TEMPLATE is left out: Ollama writes templates in Go, and this chat template has no",
            "# known Go form. Ollama then uses the one in the GGUF where it can read it.",
        ]
    else:
        lines += ["", f'TEMPLATE """{form.to_go()}"""']
        if form.system is None:
            lines.append(
                "# The chat template takes no system turn; Ollama drops one without a word."
            )
        if form.default_system:
            lines.append(f'SYSTEM """{form.default_system}"""')
    lines += [f"PARAMETER stop {_quoted(token)}" for token in stop_tokens(chat, form)]
    lines += [f"PARAMETER {PARAMETERS[key]} {value:g}" for key, value in facts.sampling.items()]
    licence = [facts.license, facts.license_name, facts.license_link]
    if any(licence):
        lines.append(f"LICENSE {_quoted(' '.join(part for part in licence if part))}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'
