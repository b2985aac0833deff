"""Any LangChain chat model that streams text as a chat backend: the tool list goes into the prompt.

Nothing holds such a model to a grammar, so what it writes is checked: an answer that begins like a
call is shown to nobody, and is a call only when it is whole.
"""

import json
import math
import queue
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage

from integration._cli import CommandError
from integration.backend import AUTO, NONE, REQUIRED, Steps, T, Tool, Turn
from integration.decoding import Answer, Settings, StopScanner
from integration.prompt import Message
from integration.text_answer import Reading, json_text, met_limit
from tools.protocol import with_tool_list


class TextModel:
    """A chat backend over a LangChain chat model; made by ``load_huggingface`` and ``connect_server``.

    What a subclass knows better than LangChain's common interface it overrides: ``parameters``,
    ``chunks``, ``explain`` and ``count_tokens``.

    Args:
        chat: The chat model.
        name: What to call it.
        n_ctx: Context in tokens, if known.
    """

    # Whether a stream that is left early is waited for: what decodes in this process must have ended.
    waits_for_end = False

    def __init__(self, chat: BaseChatModel, name: str, n_ctx: int | None = None) -> None:
        self.chat, self.name, self._n_ctx = chat, name, n_ctx
        self.lock = threading.RLock()

    @property
    def n_ctx(self) -> int | None:
        """Context in tokens, if known."""
        return self._n_ctx

    def warm_up(self) -> None:
        """Render a prompt, where this process does that: so a missing template is noticed."""
        self.count_tokens([{"role": "user", "content": "a"}])

    def remember(self) -> None:
        """There is nothing to keep: what is evaluated belongs to the other library, or the server."""

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int | None:
        """Count the tokens of the prompt for these messages, if that can be known."""
        return None

    def parameters(
        self, settings: Settings, timeout_s: float, schema: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Give the chat model's parameters for one call.

        Args:
            settings: How to decode; the seed is set, and stop strings only where no call can come.
            timeout_s: Seconds left, perhaps infinite.
            schema: JSON schema of the answer, for models that can be held to one.
        """
        return {
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
            "stop": list(settings.stop) or None,
        }

    def chunks(
        self, messages: Sequence[Message], parameters: dict[str, Any]
    ) -> Generator[BaseMessage, None, None]:
        """Stream one answer of the chat model."""
        yield from self.chat.stream(list(messages), **parameters)

    def explain(self, error: Exception) -> CommandError | None:
        """Give one line for an error of the chat model; None for a defect."""
        return None

    def stream(self, steps: Steps[T]) -> Generator[str, None, T]:
        """Pass the text of steps on: they never ask for tokens to be evaluated."""
        return (yield from cast("Generator[str, Any, T]", steps))

    def turn(
        self,
        messages: Sequence[Message],
        settings: Settings,
        tools: Sequence[Tool] = (),
        tool_choice: str = AUTO,
        deadline: float = math.inf,
    ) -> Steps[Turn]:
        """Let the model answer, or call a tool; see ``ChatBackend.turn``.

        ``required`` and a tool's name are asked for, not enforced: a turn without that call has an
        ``error``. With ``none``, what looks like a call is text.
        """
        must_call = bool(tools) and tool_choice not in (AUTO, NONE)
        if must_call:
            settings = replace(settings, temperature=0.0)
        may_call = bool(tools) and tool_choice != NONE
        reading = Reading(StopScanner(settings.stop), may_call)
        messages = with_tools(messages, tools, tool_choice)
        with closing(self._read(reading, messages, settings, deadline)) as pieces:
            for piece in pieces:
                if not must_call:
                    yield piece
        turn = reading.turn()
        if must_call and turn.error is None:
            name = turn.call.name if turn.call else None
            if name is None or tool_choice not in (REQUIRED, name):
                wanted = "a tool" if tool_choice == REQUIRED else f"'{tool_choice}'"
                made = f"called '{name}'" if name else "answered in plain text"
                turn.call, turn.error = None, f"the model was to call {wanted} and {made}"
        return turn

    def json_turn(
        self, messages: Sequence[Message], settings: Settings, schema: dict[str, Any]
    ) -> Steps[Turn]:
        """Answer in JSON of a schema, decoded greedily; see ``ChatBackend.json_turn``.

        That it is JSON is checked here, that it fits the schema is not.
        """
        reading = Reading(StopScanner(()), may_call=False)
        order = (
            "Answer only with JSON that fits this JSON schema, without any other text:\n"
            f"{json.dumps(schema, ensure_ascii=False)}"
        )
        messages = _with_system(messages, order)
        settings = replace(settings, temperature=0.0)
        for _ in self._read(reading, messages, settings, math.inf, schema):
            pass
        turn = reading.turn()
        try:
            turn.text = json_text(turn.text)
        except ValueError as error:
            turn.error = f"the answer is no JSON: {error}{met_limit(turn.answer)}"
        else:
            yield turn.text
        return turn

    def _read(
        self,
        reading: Reading,
        messages: Sequence[Message],
        settings: Settings,
        deadline: float,
        schema: dict[str, Any] | None = None,
    ) -> Generator[str, None, None]:
        """Stream one answer through a reading, until it has all it wants or the time is up."""
        started = time.monotonic()
        if settings.timeout_s:
            deadline = min(deadline, started + settings.timeout_s)
        seed = settings.chosen_seed()
        answer = reading.answer = Answer(seed=seed)
        # Within a call a stop string is text of an argument, so the chat model must not stop there.
        stop = () if reading.may_call else settings.stop
        settings = replace(settings, seed=seed, stop=stop)
        parameters = self.parameters(settings, deadline - started, schema)
        source = self.chunks(messages, parameters)
        try:
            with closing(_in_thread(source, deadline, self.waits_for_end)) as chunks:
                for chunk in chunks:
                    shown = reading.take(chunk, time.monotonic() - started)
                    if shown:
                        yield shown
                    if reading.ended:
                        break
        except TimeoutError:
            answer.finish_reason = "timeout"
        except Exception as error:
            line = self.explain(error)
            if line is None:
                raise
            raise line from error
        rest = reading.finish()
        if rest:
            yield rest


def _with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """Put text at the end of the system turn."""
    has_system = bool(messages) and messages[0]["role"] == "system"
    own = messages[0]["content"] if has_system else ""
    content = "\n\n".join(filter(None, [own, text]))
    return [{"role": "system", "content": content}, *messages[1 if has_system else 0 :]]


def with_tools(
    messages: Sequence[Message], tools: Sequence[Tool], tool_choice: str = AUTO
) -> list[Message]:
    """Put the list of tools, if any, into the system turn, and behind it what is asked for now."""
    if not tools:
        return list(messages)
    turns = with_tool_list(messages, tools)
    if tool_choice == AUTO:
        return turns
    if tool_choice == NONE:
        return _with_system(turns, "Now answer in plain text and call no tool.")
    wanted = "one of the tools" if tool_choice == REQUIRED else f"the tool {tool_choice}"
    return _with_system(turns, f"Now call {wanted}: answer only with the call.")


_END = object()


def _in_thread(
    source: Generator[Any, None, None], deadline: float, wait: bool
) -> Generator[Any, None, None]:
    """Yield what a source yields, read in a thread of its own: a wait for it can then be ended.

    A fresh thread also has a fresh LangChain context, so that callbacks of an agent around this model
    do not see its raw text as well.

    Args:
        source: Closed in its thread, at the latest after its next item.
        deadline: ``time.monotonic()`` at which to stop waiting.
        wait: Let the source end before this does.

    Raises:
        TimeoutError: The deadline has passed.
    """
    items: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    left = threading.Event()

    def read() -> None:
        try:
            with closing(source):
                for item in source:
                    items.put((item, None))
                    if left.is_set():
                        return
        except BaseException as error:
            items.put((_END, error))
        else:
            items.put((_END, None))

    thread = threading.Thread(target=read, name="answer", daemon=True)
    thread.start()
    try:
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            try:
                item, error = items.get(timeout=None if math.isinf(remaining) else remaining)
            except queue.Empty:
                raise TimeoutError from None
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        left.set()
        if wait:
            thread.join()
