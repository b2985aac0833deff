"""An answer as a text model streams it: sorted into a call or text, and read at its end."""

import json
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import BaseMessage

from integration.backend import Turn
from integration.decoding import Answer, StopScanner
from tools.protocol import CALL_END, CALL_START, ToolCall, parse_tool_call

_FENCE = "```"


@dataclass
class Reading:
    """One answer as it comes in: a call, or text that is shown as it becomes certain."""

    scanner: StopScanner
    may_call: bool
    answer: Answer = field(default_factory=Answer)
    ended: bool = False
    _held: str = ""
    _call: str | None = None
    _failure: str | None = None
    _pieces: int = 0

    def take(self, chunk: BaseMessage, elapsed_s: float) -> str:
        """Take a chunk that came after so many seconds; give what may be shown."""
        answer = self.answer
        usage = getattr(chunk, "usage_metadata", None)
        if usage:
            answer.prompt_tokens += usage["input_tokens"]
            answer.completion_tokens += usage["output_tokens"]
        reason = chunk.response_metadata.get("finish_reason")
        if reason:
            answer.finish_reason = "length" if reason == "length" else "stop"
        text = str(chunk.text)
        if not text:
            return ""
        self._pieces += 1
        if self._pieces == 1:
            answer.first_token_s = elapsed_s
        answer.decode_s = elapsed_s - answer.first_token_s
        return self._sort(text)

    def _sort(self, text: str) -> str:
        if self._call is not None:
            self._grow_call(text)
            return ""
        if self.may_call:
            self._held += text
            start = self._held.lstrip()
            if CALL_START.startswith(start):
                return ""
            if start.startswith(CALL_START):
                self._call = self._held = ""
                self._grow_call(start)
                return ""
            text, self._held, self.may_call = self._held, "", False
        return self._show(text)

    def _show(self, text: str) -> str:
        shown, self.ended = self.scanner.push(text)
        if self.ended:
            self.answer.finish_reason = "stop"
        self.answer.text += shown
        return shown

    def _grow_call(self, text: str) -> None:
        """Add to the call, and end the answer where the call ends: what follows is not wanted."""
        assert self._call is not None
        # The end may have begun in the text before.
        search_from = max(0, len(self._call) - len(CALL_END))
        self._call += text
        while (at := self._call.find(CALL_END, search_from)) >= 0:
            search_from = at + len(CALL_END)
            call, failure = read_call(self._call[:search_from])
            # Within a string the end is text of an argument.
            if call is None and failure and "Unterminated string" in failure:
                continue
            self._call, self.ended = self._call[:search_from], True
            self.answer.finish_reason = "stop"
            return

    def finish(self) -> str:
        """Take the end of the answer; give what was held back."""
        rest, self._held = self._held, ""
        shown = self._show(rest) if rest else ""
        if not self.ended and self._call is None:
            shown += self.scanner.pending
            self.answer.text += self.scanner.pending
        if not self.answer.completion_tokens:
            # Servers send counts last, if at all; most send a token a piece.
            self.answer.completion_tokens = self._pieces
        return shown

    def turn(self) -> Turn:
        """Give the whole turn."""
        if self._call is None:
            return Turn(self.answer.text, answer=self.answer)
        self.answer.text = self._call
        call, failure = read_call(self._call)
        error = f"{failure}{met_limit(self.answer)}" if failure else None
        return Turn(self._call, call, error, self.answer)


def read_call(text: str) -> tuple[ToolCall | None, str | None]:
    """Read a call; give it, or why it is none."""
    try:
        return parse_tool_call(text), None
    except ValueError as error:
        return None, str(error)


def met_limit(answer: Answer) -> str:
    """Say which limit ended an answer, if one did."""
    reasons = {"length": "the token limit", "timeout": "the time limit"}
    reason = reasons.get(answer.finish_reason)
    return f" ({reason} was met after {answer.completion_tokens} tokens)" if reason else ""


def json_text(text: str) -> str:
    """Take JSON out of an answer, fenced or not.

    Raises:
        ValueError: It is none.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON value")

    body = text.strip()
    if body.startswith(_FENCE) and "\n" in body:
        body = body.partition("\n")[2].rstrip().removesuffix(_FENCE).strip()
    try:
        json.loads(body, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return body
