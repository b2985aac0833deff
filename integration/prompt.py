"""Messages to token ids with the model's own chat template, so that text can never become a turn.

The template is rendered in Jinja's sandbox, with limits of time and size: it comes with a file that
somebody else may have made. Control tokens count only where the template wrote them: `<|im_end|>` in a
message stays text.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from integration._cli import MODEL, CommandError
from integration.time_limit import TimeLimitError, call_limited

Message = dict[str, str]
TEMPLATES_DIR = Path(__file__).parent / "templates"
_MAX_TEMPLATE = 100_000
_MAX_RENDERED = 20_000_000
_RENDER_SECONDS = 5.0


def load_template(value: str) -> str:
    """Read a chat template by name (``chatml``, ``alpaca``) or from a file.

    Raises:
        CommandError: Exit 2; there is neither.
    """
    names = sorted(path.stem for path in TEMPLATES_DIR.glob("*.jinja"))
    path = TEMPLATES_DIR / f"{value}.jinja" if value in names else Path(value)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(
            f"--template: '{value}' is no template file; expected one, or {', '.join(names)}"
        ) from error


class ChatTemplate:
    """A chat template with the control tokens of its model.

    Args:
        source: The Jinja source from the GGUF.
        control_tokens: Text of every control token, with its id.
        bos_token: Text of the BOS token, for templates that write it.
        eos_token: Text of the EOS token.

    Raises:
        CommandError: Exit 3; the template is missing, too long or has a syntax error.
    """

    def __init__(
        self, source: str | None, control_tokens: dict[str, int], bos_token: str, eos_token: str
    ) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not source:
            raise CommandError(
                "the model has no chat template, so its prompt format is unknown; name the one it was "
                "trained with: --template chatml, alpaca or a FILE",
                MODEL,
            )
        if len(source) > _MAX_TEMPLATE:
            raise CommandError(f"the chat template has {len(source)} characters, too many", MODEL)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CommandError(
                f"the chat template is no valid Jinja: {error}; give another one with --template",
                MODEL,
            ) from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._control_tokens = control_tokens
        names = sorted(filter(None, control_tokens), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names))) if names else None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render messages to the prompt text.

        Raises:
            CommandError: Exit 2; the template refuses these messages.
        """
        from jinja2 import TemplateError

        try:
            return call_limited(
                lambda: self._join(list(messages), add_generation_prompt), _RENDER_SECONDS
            )
        except TimeLimitError as error:
            raise CommandError(
                f"the model's chat template did not end within {_RENDER_SECONDS:g} s; give another "
                "one with --template",
                MODEL,
            ) from error
        except MemoryError as error:
            raise CommandError(
                "the model's chat template takes more memory than there is; give another one with "
                "--template",
                MODEL,
            ) from error
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise CommandError(
                f"the model's chat template refuses these messages: {error}"
            ) from error

    def _join(self, messages: list[Message], add_generation_prompt: bool) -> str:
        parts, size = [], 0
        for part in self._template.generate(
            messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens
        ):
            parts.append(part)
            size += len(part)
            if size > _MAX_RENDERED:
                raise CommandError(
                    f"the model's chat template writes more than {_MAX_RENDERED} characters; give "
                    "another one with --template",
                    MODEL,
                )
        return "".join(parts)

    def encode(
        self,
        messages: Sequence[Message],
        tokenize: Callable[[str], list[int]],
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Render messages and tokenize them.

        Args:
            messages: Turns with ``role`` and ``content``.
            tokenize: Tokenizer for plain text, with special tokens off and no BOS.
            add_generation_prompt: End with the start of the assistant's turn.

        Returns:
            Token ids, equal to those of the training tokenizer for the same messages.
        """
        if self._control is None:
            return list(tokenize(self.render(messages, add_generation_prompt)))
        mark = _unused_character(messages)
        # Break control tokens in bodies with a mark, so that only the template's own are found.
        safe = [
            {
                **message,
                "content": self._control.sub(
                    lambda match: match[0][0] + mark + match[0][1:], message["content"]
                ),
            }
            for message in messages
        ]
        text = self.render(safe, add_generation_prompt)
        ids: list[int] = []
        end = 0
        for match in self._control.finditer(text):
            ids += tokenize(text[end : match.start()].replace(mark, ""))
            ids.append(self._control_tokens[match[0]])
            end = match.end()
        return ids + tokenize(text[end:].replace(mark, ""))


def _raise_exception(message: str) -> Any:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _unused_character(messages: Sequence[Message]) -> str:
    used = set().union(*(message["content"] for message in messages)) if messages else set()
    # Private use characters: no template and hardly any text has them.
    return next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in used)
