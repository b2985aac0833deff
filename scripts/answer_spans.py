"""Chat templates rendered as chat renders them, and where in the text the assistant speaks.

In: messages and a tokenizer with a chat template. Out: text and character spans. No marker string is
searched for: an answer's span is the difference between the template rendered up to it (with the
generation prompt) and through it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Message = dict[str, Any]
USE_ALPACA = "set prompt_format: alpaca, or give the tokenizer another chat template"


class RenderError(ValueError):
    """The chat template does not show the conversation as it is, or no answer would be learned.

    Attributes:
        place: Which of several conversations it is about, counted from 0.
    """

    place: int | None = None


@lru_cache(maxsize=64)
def compile_template(source: str) -> Any:
    """Compile a chat template as chat does: sandboxed, with no date and no extra names.

    Transformers' own environment knows more (today's date, for one), so a row rendered there could
    differ from the prompt that chat makes of the same messages.

    Raises:
        RenderError: It is no valid Jinja.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise RenderError(f"the chat template is no valid Jinja ({error}); {USE_ALPACA}") from error


def _raise_exception(message: str) -> Any:
    from jinja2 import TemplateError

    raise TemplateError(message)


def render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Render messages with the tokenizer's chat template.

    Raises:
        RenderError: There is no template, or it refuses the messages.
    """
    from jinja2 import TemplateError

    source = tokenizer.chat_template
    if not isinstance(source, str) or not source:
        raise RenderError(f"the tokenizer has no chat template; {USE_ALPACA}")
    template = compile_template(source)
    try:
        return template.render(
            messages=[{"role": turn["role"], "content": turn["content"]} for turn in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
        )
    except (TemplateError, TypeError, ValueError, OverflowError) as error:
        raise RenderError(
            f"the chat template refuses a conversation ({error}); {USE_ALPACA}"
        ) from error


def answer_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and give the character spans of the assistant's turns.

    A span runs from the first character after the generation prompt to the end of the turn's own
    end marker; white space that the template writes after that marker is not trained.

    Rendering the start of the conversation anew for every answer would be quadratic. The first two
    answers, those at powers of two and the last are rendered; between them a turn counts as known
    when the text goes on with exactly what the template wrote around the turns before.

    Raises:
        RenderError: The template drops a turn's content, or renders a prefix of the conversation
            differently from the whole, so that spans cannot be known.
    """
    text = render(tokenizer, messages)
    answers = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    spans: list[tuple[int, int]] = []
    glue: _Glue | None = None
    end = 0
    for number, index in enumerate(answers):
        asked = messages[answers[number - 1] + 1 if number else 0 : index]
        span = None
        is_milestone = index == answers[-1] or not number & (number - 1)
        if glue and not is_milestone:
            span = glue.find_span(text, end, asked, messages[index])
        if span is None:
            span = _render_span(tokenizer, messages, index, text)
            _check_content(asked, text[end : span[0]])
            _check_content(messages[index : index + 1], text[span[0] : span[1]])
            glue = _Glue.learn(text, end, span, asked, messages[index]) or glue
        spans.append(span)
        end = span[1]
    _check_content(messages[answers[-1] + 1 if answers else 0 :], text[end:])
    return text, spans


def _render_span(
    tokenizer: Any, messages: Sequence[Message], index: int, text: str
) -> tuple[int, int]:
    before = render(tokenizer, messages[:index], add_generation_prompt=True)
    is_whole = index == len(messages) - 1
    through = (text if is_whole else render(tokenizer, messages[: index + 1])).rstrip()
    if not (text.startswith(through) and through.startswith(before)):
        raise RenderError(
            "the chat template renders the start of a conversation differently from the whole, so "
            f"training would not see what chat does; {USE_ALPACA}"
        )
    return len(before), len(through)


def _check_content(turns: Sequence[Message], rendered: str) -> None:
    position = 0
    for turn in turns:
        content = turn["content"].strip()
        position = rendered.find(content, position)
        if position < 0:
            raise RenderError(
                f"the chat template drops the content of a {turn['role']} turn; {USE_ALPACA}"
            )
        position += len(content)


@dataclass(frozen=True)
class _Glue:
    """What a template writes around a question and its answer: four strings, two contents."""

    before_question: str
    after_question: str
    before_answer: str
    after_answer: str

    @classmethod
    def learn(
        cls,
        text: str,
        start: int,
        span: tuple[int, int],
        asked: Sequence[Message],
        answer: Message,
    ) -> "_Glue | None":
        """Take a rendered exchange apart; None where that is not possible in one way only."""
        question_part, answer_part = text[start : span[0]], text[span[0] : span[1]]
        if len(asked) != 1:
            return None
        question, reply = asked[0]["content"].strip(), answer["content"].strip()
        if question_part.count(question) != 1 or answer_part.count(reply) != 1:
            return None
        return cls(*question_part.split(question), *answer_part.split(reply))

    def find_span(
        self, text: str, start: int, asked: Sequence[Message], answer: Message
    ) -> tuple[int, int] | None:
        """Give the answer's span if the text goes on at ``start`` as this template would."""
        if len(asked) != 1 or asked[0]["role"] != "user":
            return None
        question = asked[0]["content"].strip()
        asks = self.before_question + question + self.after_question
        says = self.before_answer + answer["content"].strip() + self.after_answer
        if not text.startswith(asks + says, start):
            return None
        return start + len(asks), start + len(asks) + len(says)
