"""What answers a conversation, one turn at a time: a GGUF, a Hugging Face folder, or a server.

A turn is a generator, so that one loop of tools serves them all: it yields text as it becomes certain
and, where the model runs in this process, tokens to evaluate. Whoever drives it evaluates the tokens
of one conversation (``ChatBackend.stream``) or those of several at once (``integration.batch``).
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Protocol, TypeVar

from langchain_core.tools import BaseTool

from integration.decoding import Answer, Settings
from integration.prompt import Message
from tools.protocol import RESPONSE_END, ToolCall, ToolDefinition

T = TypeVar("T")
Tool = BaseTool | ToolDefinition
AUTO, NONE, REQUIRED = "auto", "none", "required"
# How an answer copies a tool's result: nothing drawn, no word avoided, and not the tag behind it.
EXACT: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}
RESULT_STOPS = (f"\n{RESPONSE_END}", RESPONSE_END)


@dataclass(frozen=True)
class Feed:
    """Tokens to evaluate; answered with the row of the logits after the last one.

    Attributes:
        tokens: Token ids.
        is_prompt: They are a whole prompt, of which a prefix may be in the cache already; else they
            continue what was evaluated last.
        shared: Leading tokens of a prompt that other prompts share: system turn and list of tools.
        continues: The prompt goes on with the conversation that this sequence holds.
    """

    tokens: Sequence[int]
    is_prompt: bool = False
    shared: int = 0
    continues: bool = False


Steps = Generator[Feed | str, Any, T]


@dataclass
class Turn:
    """What the model did: answered in ``text``, or wrote a ``call``.

    Attributes:
        text: The answer, or the call as it was written.
        call: A whole call; its arguments are not validated yet.
        error: Why a call is none: it was cut off, or is no JSON. Such a call is never run.
        answer: Counts, timings and the finish reason.
    """

    text: str = ""
    call: ToolCall | None = None
    error: str | None = None
    answer: Answer = field(default_factory=Answer)


class ChatBackend(Protocol):
    """What ``integration.agent`` and ``integration.chat_model`` need of a model."""

    name: str
    lock: RLock

    @property
    def n_ctx(self) -> int | None:
        """Context in tokens, if known."""

    def warm_up(self) -> None:
        """Do now what the first answer would wait for.

        Raises:
            CommandError: Exit 3; the model cannot chat, as without a chat template.
        """

    def remember(self) -> None:
        """Keep on disk what spares another process to evaluate this conversation again."""

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int | None:
        """Count the tokens of the prompt for these messages, if that can be known."""

    def turn(
        self,
        messages: Sequence[Message],
        settings: Settings,
        tools: Sequence[Tool] = (),
        tool_choice: str = AUTO,
        deadline: float = math.inf,
    ) -> Steps[Turn]:
        """Let the model answer, or call a tool.

        Args:
            messages: Turns with ``role`` (system, user, assistant) and ``content``; the last one is
                the user's. Calls and results of earlier rounds are turns in ``tools.protocol``'s form.
            settings: How to decode; a call is decoded greedily.
            tools: What may be called; the list goes into the system turn.
            tool_choice: ``auto``, ``none`` (the tools stay listed, so that the cached prefix fits),
                ``required``, or a tool's name.
            deadline: ``time.monotonic()`` at which to stop; the finish reason is then ``timeout``.

        Yields:
            Text of the answer as it becomes certain (never a call), and tokens to evaluate.

        Returns:
            The turn.

        Raises:
            CommandError: Exit 4; the prompt does not fit into the context.
        """

    def stream(self, steps: Steps[T]) -> Generator[str, None, T]:
        """Drive steps to their end, evaluating what they ask for; yields their text."""

    def json_turn(
        self, messages: Sequence[Message], settings: Settings, schema: dict[str, Any]
    ) -> Steps[Turn]:
        """Answer in JSON of a schema; ``text`` of the turn is the JSON."""


def run(backend: ChatBackend, steps: Steps[T]) -> T:
    """Drive steps to their end, without their text."""
    stream = backend.stream(steps)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value
