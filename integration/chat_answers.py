"""One message to one answer on the screen, and the figures of the session."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from integration._cli import CONTEXT, CommandError
from integration.ask_format import BASE
from integration.chat_conversation import Conversation
from integration.chat_screen import Screen, context_share, format_call, meter
from integration.decoding import draw_seed

if TYPE_CHECKING:
    from integration.agent import CallRecord, Reply
    from integration.options import Session
    from integration.prompt import Message
    from tools.protocol import ToolCall

_ENDINGS = {
    "length": "the answer was cut off: --max-tokens or the context is used up",
    "timeout": "the answer was cut off by --timeout",
}


@dataclass
class Totals:
    """Sums over the answers of a session."""

    answers: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, reply: "Reply") -> None:
        """Count a reply."""
        self.answers += 1
        self.calls += len(reply.tool_calls)
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens


@dataclass
class _Progress:
    """What an answer came to so far, for the case that it is stopped."""

    screen: Screen
    text: str = ""
    calls: "list[CallRecord]" = field(default_factory=list)

    def add_text(self, piece: str) -> None:
        self.text += piece
        self.screen.piece(piece)

    def add_call(self, record: "CallRecord") -> None:
        self.calls.append(record)
        self.screen.call(record)

    def turns(self) -> "list[Message]":
        from integration.agent import call_turns

        turns = [turn for record in self.calls if record.name for turn in call_turns(record)]
        return [*turns, {"role": "assistant", "content": self.text}]


class Chat:
    """A conversation with a model.

    Args:
        session: The model and everything the options name.
        screen: Where answers go.
        respond: ``integration.agent.respond``.
        is_interactive: Someone sits at the keyboard: Ctrl-C stops an answer, not the program, and
            only then can a call be approved.
    """

    def __init__(
        self,
        session: "Session",
        screen: Screen,
        respond: "Callable[..., Reply]",
        is_interactive: bool,
    ) -> None:
        self.session, self.screen = session, screen
        self.is_interactive = is_interactive
        self.tools = session.tools
        self.is_routed = session.router is not None
        self.conversation = Conversation(session.system)
        self.last: Reply | None = None
        self.totals = Totals()
        self._respond = respond
        self._unanswered: str | None = None

    def answer(self, text: str, seed: int | None = None) -> None:
        """Answer one message, streaming; Ctrl-C keeps what came so far.

        Raises:
            CommandError: The model failed and nobody is there to read about it.
            KeyboardInterrupt: Likewise for Ctrl-C.
        """
        self._unanswered = text
        progress = _Progress(self.screen)
        try:
            reply = self._ask_model(text, seed, progress)
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
            self.last = None
            if progress.text or progress.calls:
                self._keep(text, progress.turns())
            self.screen.line(" [stopped]")
            self._show_status(None)
            return
        except CommandError as error:
            if error.exit_code != CONTEXT and not self.is_interactive:
                raise
            self.screen.error(error)
            return
        self.screen.line()
        self.last = reply
        self.totals.add(reply)
        if reply.error and reply.error not in [record.error for record in reply.tool_calls]:
            self.screen.error(reply.error)
        if reply.finish_reason in _ENDINGS:
            self.screen.note(_ENDINGS[reply.finish_reason])
        if reply.text or reply.tool_calls:
            whole = reply.turns and reply.turns[-1]["role"] == "assistant"
            self._keep(text, reply.turns if whole else progress.turns())
        self._show_status(reply)

    def retry(self) -> None:
        """Answer the last message again, with another seed.

        The old answer is gone only when there is a new one.

        Raises:
            CommandError: There is no message yet.
        """
        old = None
        text = self._unanswered
        if text is None:
            if not self.conversation.exchanges:
                raise CommandError("/retry: nothing was asked yet")
            old = self.conversation.exchanges.pop()
            text = old[0]["content"]
        if not self.session.settings.temperature:
            self.screen.note("the temperature is 0: another seed changes nothing")
        try:
            self.answer(text, draw_seed())
        finally:
            if old is not None and self._unanswered is not None:
                self.conversation.exchanges.append(old)
                self._unanswered = None

    def forget(self) -> None:
        """Start anew, under the same system prompt."""
        self.conversation.replace(self.conversation.system, [])
        self._unanswered = None

    def go_on_with(self, system: str | None, exchanges: "list[list[Message]]") -> None:
        """Take over a conversation that was saved."""
        self.conversation.replace(system, exchanges)
        self._unanswered = None

    def used_context(self) -> int | None:
        """Count the tokens that the conversation takes, if the model can tell."""
        if not self.conversation.exchanges:
            return 0
        try:
            return self.session.model.count_tokens(self.conversation.prompt(), self.tools)
        except CommandError:  # a template may refuse a prompt that ends with an answer
            return None

    def stats(self) -> list[str]:
        """Describe the last answer and the session, a fact a line."""
        session, last, sums = self.session, self.last, self.totals
        facts: dict[str, Any] = {}
        if last:
            wait = "?" if last.first_token_s is None else f"{last.first_token_s:.2f} s"
            facts["last answer"] = (
                f"{last.prompt_tokens} prompt + {last.completion_tokens} completion tokens"
            )
            facts["speed"] = f"{last.tokens_per_second:.1f} tok/s, first token after {wait}"
        facts["context"] = meter(self.used_context(), session.model.n_ctx)
        if self.conversation.dropped:
            facts["dropped"] = f"oldest exchanges: {self.conversation.dropped}"
        facts["seed"] = last.seed if last else session.seed
        engine = getattr(session.model, "engine", None)  # a server keeps its threads to itself
        if engine:
            facts["threads"] = engine.n_threads
        facts |= self._adapter_facts()
        facts["session"] = (
            f"answers: {sums.answers}, tool calls: {sums.calls}, "
            f"{sums.prompt_tokens} prompt + {sums.completion_tokens} completion tokens"
        )
        return [f"{name:<12} {value}" for name, value in facts.items()]

    def _adapter_facts(self) -> dict[str, str]:
        if self.session.adapters is None:
            return {"adapter": "none"}
        used = self.session.adapters.memory()
        facts = {"adapter": self.session.adapters.active + (" (routed)" if self.is_routed else "")}
        if used.adapters:
            sizes = [f"{name} {size / 1e6:.1f} MB" for name, size in used.adapters.items()]
            facts["adapters"] = ", ".join(sizes)
            facts["cached"] = ", ".join(
                f"{label} {one.tokens} tokens {one.num_bytes / 1e6:.1f} MB"
                + (" (aside)" if one.is_parked else "")
                for label, one in used.conversations
            )
        return facts

    def _ask_model(self, text: str, seed: int | None, progress: _Progress) -> "Reply":
        session = self.session
        if self.is_routed:
            self._route(text)
        settings = session.settings_for(session.adapters.active if session.adapters else None)
        if seed is not None:
            settings = replace(settings, seed=seed)
        dropped = self.conversation.make_room(session.model, text, self.tools, settings.max_tokens)
        if dropped:
            kept = len(self.conversation.exchanges) - self.conversation.dropped
            self.screen.note(
                f"the context is full: oldest exchanges dropped: {dropped}, kept: {kept}"
            )
        self.screen.wait()
        return self._respond(
            session.model,
            self.conversation.prompt(text),
            settings,
            self.tools,
            on_text=progress.add_text,
            on_call=progress.add_call,
            approve=self._approve if session.approve else None,
        )

    def _route(self, text: str) -> None:
        """Let the router choose the adapter; it keeps to the one of the conversation if in doubt."""
        assert self.session.router is not None
        assert self.session.adapters is not None
        adapters = self.session.adapters
        texts = [exchange[0]["content"] for exchange in self.conversation.exchanges]
        route = self.session.router.route([*texts, text], adapters.names)
        chosen, before = route.adapter or BASE, adapters.active
        adapters.use(chosen)
        if chosen != before:
            self.screen.note(f"adapter: {chosen} ({route.reason})")

    def _approve(self, call: "ToolCall") -> bool:
        if not self.is_interactive:
            self.screen.note(f"{call.name} was not run: --approve has no terminal to ask on")
            return False
        return self.screen.confirm(f"run {format_call(call.name, call.arguments)}?")

    def _keep(self, text: str, turns: "list[Message]") -> None:
        self.conversation.exchanges.append([{"role": "user", "content": text}, *turns])
        self._unanswered = None

    def _show_status(self, reply: "Reply | None") -> None:
        if not self.screen.err_is_terminal:
            return
        parts = [f"ctx {context_share(self.used_context(), self.session.model.n_ctx)}"]
        if reply:
            parts.append(f"{reply.tokens_per_second:.0f} tok/s")
            parts += [] if reply.seed is None else [f"seed {reply.seed}"]
        self.screen.status(" · ".join(parts))
