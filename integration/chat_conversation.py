"""The chat's memory: exchanges, and which of them still fit into the context."""

import bisect
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from integration._cli import CONTEXT, CommandError
from integration.decoding import MIN_ANSWER_TOKENS

if TYPE_CHECKING:
    from integration.backend import ChatBackend
    from integration.prompt import Message


class Conversation:
    """Exchanges: a user's message and all turns that answered it, tool calls included.

    Attributes:
        system: The system prompt, or None for the model's own.
        exchanges: The whole conversation.
        dropped: How many of the oldest exchanges the model does not see any more.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system, self.dropped = system, 0
        self.exchanges: list[list[Message]] = []

    def prompt(self, text: str | None = None, dropped: int | None = None) -> "list[Message]":
        """Give what the model sees: the system turn, the exchanges, and a new message."""
        first = self.dropped if dropped is None else dropped
        head = [{"role": "system", "content": self.system}] if self.system else []
        body = [message for exchange in self.exchanges[first:] for message in exchange]
        tail = [] if text is None else [{"role": "user", "content": text}]
        return head + body + tail

    def replace(self, system: str | None, exchanges: "list[list[Message]]") -> None:
        """Go on with another conversation."""
        self.system, self.exchanges, self.dropped = system, exchanges, 0

    def make_room(
        self, model: "ChatBackend", text: str, tools: Sequence[Any], max_tokens: int
    ) -> int:
        """Drop the oldest exchanges, if need be, so that an answer to ``text`` fits.

        More is dropped than this answer needs: every drop changes the start of the prompt, which the
        model then reads anew, and that is not to happen at every turn.

        Returns:
            How many exchanges were dropped.

        Raises:
            CommandError: Exit 4; the message is too long even on its own.
        """
        n_ctx, known = model.n_ctx, len(self.exchanges)
        used = model.count_tokens(self.prompt(text), tools)
        if n_ctx is None or used is None:
            return 0
        wanted = min(max_tokens, n_ctx // 4)
        if tools:
            # A call may copy the message, and its result bring it back.
            message = [{"role": "user", "content": text}]
            wanted = min(wanted + 2 * (model.count_tokens(message) or 0), n_ctx // 2)
        if used + wanted <= n_ctx:
            return 0
        alone = model.count_tokens(self.prompt(text, known), tools) or 0
        if alone + MIN_ANSWER_TOKENS > n_ctx:
            raise CommandError(
                f"the prompt has {alone} tokens without earlier turns, the context {n_ctx}, and an "
                f"answer needs {MIN_ANSWER_TOKENS}; shorten it, or start with a larger --n-ctx",
                CONTEXT,
            )
        before, choices = self.dropped, range(self.dropped, known + 1)

        def fits(dropped: int, limit: int) -> bool:
            return (model.count_tokens(self.prompt(text, dropped), tools) or 0) + wanted <= limit

        for limit in (n_ctx * 3 // 4, n_ctx):
            index = bisect.bisect_left(choices, True, key=partial(fits, limit=limit))
            self.dropped = min(before + index, known)
            if self.dropped < known:
                break
        return self.dropped - before
