"""A GGUF as a chat backend: renders a conversation, decodes one turn of it, freely or as a call."""

import codecs
import math
import re
import time
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from integration._cli import CommandError
from integration.backend import (
    AUTO,
    EXACT,
    NONE,
    REQUIRED,
    Feed,
    Steps,
    T,
    Tool,
    Turn,
)
from integration.constraint import Constraint, call_grammar, json_grammar
from integration.decoding import Answer, Settings, StopScanner, answer_room
from integration.engine import Engine
from integration.prompt import ChatTemplate, Message
from integration.sampler import Sampler
from integration.template_check import check_template
from integration.text_answer import read_call
from tools.protocol import (
    CALL_START,
    RESPONSE_END,
    RESPONSE_START,
    parse_tool_call,
    with_tool_list,
)

_CALL_OVERHEAD_TOKENS = 256
_MAX_PIECES = 256
_RESULT = re.compile(f"{RESPONSE_START}\n.*?\n{RESPONSE_END}", re.DOTALL)
# What follows a system turn; tokens that all of these leave alone, every prompt with it shares.
_PROBES = ("a", "\n\nb", " 1")


class LocalModel:
    """One loaded GGUF that answers conversations.

    Args:
        engine: The loaded file.
        template: Source of a chat template in place of the file's own; it writes a BOS only where the
            file wants one.
    """

    def __init__(self, engine: Engine, template: str | None = None) -> None:
        self.engine = engine
        self.name = engine.header.path.name
        self.lock = engine.lock
        self._source, self._is_own = template or engine.header.chat_template, template is None
        self._template: ChatTemplate | None = None
        self._shared: dict[str, list[int]] = {}
        self._pieces: OrderedDict[str, list[int]] = OrderedDict()

    @property
    def n_ctx(self) -> int:
        """Context in tokens."""
        return self.engine.n_ctx

    @property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            CommandError: Exit 3; there is none, or it is not usable.
        """
        if self._template is None:
            control, bos, eos = control_tokens(self.engine.vocab)
            if not (self._is_own or adds_bos(self.engine.vocab)):
                bos = ""
            template = ChatTemplate(self._source, control, bos, eos)
            check_template(self._source or "")
            self._template = template
        return self._template

    def warm_up(self) -> None:
        """Do now what the first answer would wait for: read the weights, compile the template.

        Raises:
            CommandError: Exit 3; there is no chat template, or it is not usable.
        """
        self.engine.warm_up()
        self.encode([{"role": "user", "content": "a"}])

    def remember(self) -> None:
        """Keep the evaluated conversation on disk: whoever goes on with it reads only what is new."""
        with self.lock:
            self.engine.cache.remember()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Give the prompt's token ids for a conversation, up to the assistant's turn."""
        return self.template.encode(messages, self._tokenize)

    def _tokenize(self, text: str) -> list[int]:
        """Tokenize a piece between control tokens; a conversation brings the same ones again."""
        if text not in self._pieces:
            self._pieces[text] = self.engine.tokenize(text)
            if len(self._pieces) > _MAX_PIECES:
                self._pieces.popitem(last=False)
        return self._pieces[text]

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int:
        """Count the tokens of the prompt for these messages."""
        return len(self.encode(with_tool_list(messages, tools)))

    def _shared_tokens(self, messages: Sequence[Message], ids: list[int]) -> int:
        """Count the tokens that every conversation with this system turn begins with."""
        if messages[0]["role"] != "system":
            return 0
        system = messages[0]["content"]
        if system not in self._shared:
            probes = [
                self.encode([messages[0], {"role": "user", "content": text}]) for text in _PROBES
            ]
            same = zip(*probes, strict=False)
            size = next((at for at, tokens in enumerate(same) if len(set(tokens)) > 1), 0)
            self._shared[system] = probes[0][:size]
        shared = self._shared[system]
        return len(shared) if ids[: len(shared)] == shared else 0

    def stream(self, steps: Steps[T]) -> Generator[str, None, T]:
        """Drive steps to their end, evaluating what they ask for; yields their text.

        The engine's lock is held from the first step to the last, or until the generator is closed.
        """
        with self.lock:
            number = self.engine.take_sequence()
            reply = None
            try:
                while True:
                    event = steps.send(reply)
                    reply = None
                    if isinstance(event, str):
                        yield event
                    else:
                        (reply,) = self.engine.evaluate([(number, event)])
            except StopIteration as end:
                return end.value
            finally:
                steps.close()
                self.engine.release_sequence(number)

    def turn(
        self,
        messages: Sequence[Message],
        settings: Settings,
        tools: Sequence[Tool] = (),
        tool_choice: str = AUTO,
        deadline: float = math.inf,
    ) -> Steps[Turn]:
        """Let the model answer, or call a tool; see ``ChatBackend.turn``."""
        feed = self._prompt(with_tool_list(messages, tools))
        limit = answer_room(len(feed.tokens), settings.max_tokens, self.n_ctx)
        started = time.monotonic()
        row = yield feed
        if not tools:
            return (yield from self._answer(feed, row, settings, limit, started, deadline))
        first, calls = self._choose(row, tool_choice)
        if not calls:
            return (yield from self._answer(feed, row, settings, limit, started, deadline, first))
        named = [tool for tool in tools if tool_choice in (AUTO, REQUIRED, tool.name)]
        request = user_texts(messages)
        # A call may have to copy the whole request.
        wanted = max(
            settings.max_tokens, len(self.engine.tokenize(request)) + _CALL_OVERHEAD_TOKENS
        )
        limit = answer_room(len(feed.tokens), wanted, self.n_ctx)
        if settings.free_calls:
            exact = replace(settings, **EXACT, stop=())
            free = self._answer(feed, row, exact, limit, started, deadline, first)
            turn = yield from _without_text(free)
            turn.call, turn.error = read_call(turn.text)
            if turn.call is None and turn.error is None:
                yield turn.text
            return turn
        constraint = Constraint(self.engine, call_grammar(named, request))
        turn = yield from self._constrained(feed, row, constraint, limit, started, deadline)
        if turn.error is None:
            turn.call = parse_tool_call(turn.text)
        return turn

    def json_turn(
        self, messages: Sequence[Message], settings: Settings, schema: dict[str, Any]
    ) -> Steps[Turn]:
        """Answer in JSON of a schema; see ``ChatBackend.json_turn``."""
        feed = self._prompt(messages)
        limit = answer_room(len(feed.tokens), settings.max_tokens, self.n_ctx)
        constraint = Constraint(self.engine, json_grammar(schema))
        started = time.monotonic()
        row = yield feed
        seed = settings.chosen_seed()
        # With the repeat penalty: a small model fills a string with one phrase for ever.
        with Sampler(self.engine.n_vocab, settings, seed) as sampler:
            turn = yield from self._constrained(
                feed, row, constraint, limit, started, settings.deadline(), sampler
            )
        turn.answer.seed = seed
        return turn

    def complete(self, prompt: str, settings: Settings) -> Steps[Turn]:
        """Continue raw text, as LangChain's string interface means it: BOS where the model wants it."""
        ids = self.engine.tokenize(prompt, special=True, add_bos=True)
        if not ids:
            raise CommandError("the prompt is empty; expected some text")
        limit = answer_room(len(ids), settings.max_tokens, self.n_ctx)
        feed, started = Feed(ids, is_prompt=True, continues=True), time.monotonic()
        row = yield feed
        return (yield from self._answer(feed, row, settings, limit, started, settings.deadline()))

    def _prompt(self, messages: Sequence[Message]) -> Feed:
        ids = self.encode(messages)
        goes_on = any(message["role"] == "assistant" for message in messages)
        return Feed(ids, True, self._shared_tokens(messages, ids), goes_on)

    def _choose(self, row: int, tool_choice: str) -> tuple[int, bool]:
        """Let the model choose, greedily, how its answer begins: first token, and is it a call?"""
        logits = self.engine.logits(row).copy()
        token = int(np.argmax(logits))
        if tool_choice not in (AUTO, NONE):
            return token, True
        while tool_choice == NONE and self.begins_call(token):
            logits[token] = -np.inf
            token = int(np.argmax(logits))
        return token, self.begins_call(token)

    def begins_call(self, token: int) -> bool:
        """Whether an answer that begins with this token is a tool call."""
        piece = self.engine.piece(token)
        return bool(piece) and CALL_START.encode().startswith(piece)

    def _answer(
        self,
        feed: Feed,
        row: int,
        settings: Settings,
        limit: int,
        started: float,
        deadline: float,
        token: int | None = None,
    ) -> Steps[Turn]:
        """Decode an answer freely; ``token`` is its first one where that is decided already."""
        turn = Turn(answer=Answer(prompt_tokens=len(feed.tokens)))
        answer = turn.answer
        answer.seed = settings.chosen_seed()
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        scanner = StopScanner(settings.stop)
        answer.first_token_s = time.monotonic() - started
        first, stopped = time.monotonic(), False
        with Sampler(self.engine.n_vocab, settings, answer.seed) as sampler:
            while True:
                if token is None:
                    token = sampler.sample(self.engine.context, row)
                answer.decode_s = time.monotonic() - first
                if self.engine.is_end(token):
                    break
                answer.completion_tokens += 1
                shown, stopped = scanner.push(decoder.decode(self.engine.piece(token)))
                if shown:
                    turn.text += shown
                    yield shown
                if stopped:
                    break
                if met := _met_limit(answer, limit, deadline):
                    answer.finish_reason = met
                    break
                row = yield Feed((token,))
                token = None
        if not stopped:
            rest, hit = scanner.push(decoder.decode(b"", final=True))
            rest += "" if hit else scanner.pending
            if rest:
                turn.text += rest
                yield rest
        answer.text = turn.text
        return turn

    def _constrained(
        self,
        feed: Feed,
        row: int,
        constraint: Constraint,
        limit: int,
        started: float,
        deadline: float,
        sampler: Sampler | None = None,
    ) -> Steps[Turn]:
        """Decode under a constraint, greedily by default; cut off, a turn has an ``error``."""
        turn = Turn(answer=Answer(prompt_tokens=len(feed.tokens)))
        answer, data = turn.answer, b""
        answer.first_token_s, first = time.monotonic() - started, time.monotonic()

        def pick(logits: np.ndarray) -> int:
            if sampler is None:
                return int(np.argmax(logits))
            return sampler.sample(self.engine.context, row)

        while True:
            tokens = constraint.next_tokens(self.engine.logits(row), pick)
            answer.completion_tokens += len(tokens)
            data += b"".join(map(self.engine.piece, tokens))
            if constraint.finished:
                break
            if met := _met_limit(answer, limit, deadline):
                answer.finish_reason = met
                break
            row = yield Feed(tokens)
        answer.decode_s = time.monotonic() - first
        answer.text = turn.text = data.decode("utf-8", errors="replace")
        if answer.finish_reason != "stop":
            turn.error = f"cut off after {answer.completion_tokens} tokens"
        return turn


def _without_text(steps: Steps[Turn]) -> Steps[Turn]:
    """Drive steps whose text is shown to nobody."""
    reply = None
    try:
        while True:
            event = steps.send(reply)
            reply = None if isinstance(event, str) else (yield event)
    except StopIteration as end:
        turn: Turn = end.value
        return turn


def user_texts(messages: Sequence[Message]) -> str:
    """Join what the user wrote, results of tools left out."""
    texts = [message["content"] for message in messages if message["role"] == "user"]
    return "\n".join(filter(None, (_RESULT.sub("", text).lstrip("\n") for text in texts)))


def control_tokens(vocab: Any) -> tuple[dict[str, int], str, str]:
    """Read a vocabulary's control tokens: ids by text, and the texts of BOS and EOS."""
    import llama_cpp

    control = {}
    for token in range(llama_cpp.llama_vocab_n_tokens(vocab)):
        if llama_cpp.llama_vocab_get_attr(vocab, token) & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL:
            control[llama_cpp.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")] = token
    names = {token: text for text, token in control.items()}
    bos = names.get(llama_cpp.llama_vocab_bos(vocab), "")
    return control, bos, names.get(llama_cpp.llama_vocab_eos(vocab), "")


def adds_bos(vocab: Any) -> bool:
    """Whether a vocabulary wants a BOS before a text."""
    import llama_cpp

    return bool(llama_cpp.llama_vocab_get_add_bos(vocab))


def _met_limit(answer: Answer, limit: int, deadline: float) -> str | None:
    """Give the finish reason of an answer that has met a limit."""
    if time.monotonic() > deadline:
        return "timeout"
    return "length" if answer.completion_tokens >= limit else None
