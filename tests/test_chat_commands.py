"""Messages and slash commands, with a stub for the model."""

import io
import json
import stat
import subprocess
import sys

import pytest

from integration._cli import MODEL, CommandError
from integration.chat import talk
from integration.chat_answers import Chat
from integration.chat_commands import COMMANDS, Commands, help_text
from integration.chat_input import complete, history_path, open_history
from integration.chat_screen import Screen
from tests.chat_stubs import StubModel, StubRouter, stub_respond, stub_session
from tools import TOOLS


class Desk:
    """A chat with its commands and what it has shown."""

    def __init__(self, is_interactive: bool = True, respond=stub_respond, **changes) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        screen = Screen(self.out, self.err)
        self.chat = Chat(stub_session(**changes), screen, respond, is_interactive)
        self.commands = Commands(self.chat)

    def type(self, *lines: str) -> str:
        """Give what the last line put on stdout."""
        for line in lines:
            self.out.truncate(self.out.seek(0))
            if self.commands.matches(line):
                assert self.commands.run(line)
            else:
                self.chat.answer(line)
        return self.out.getvalue()

    def error(self, line: str) -> str:
        """Give the one line that a command put on stderr."""
        self.err.truncate(self.err.seek(0))
        self.type(line)
        assert self.err.getvalue().count("\n") == 1
        return self.err.getvalue().rstrip("\n")

    @property
    def roles(self) -> str:
        return " ".join(message["role"][0] for message in self.chat.conversation.prompt())


def test_history_holds_calls_and_results():
    desk = Desk(tools=TOOLS)
    assert desk.type("wrap aa bb cc dd") == (
        '[text_formatter(text="aa bb cc dd", width=10)]\naa bb cc\ndd\n\nDone.\n'
    )
    assert desk.roles == "u a u a"
    assert "5 messages" in desk.type("hello")


def test_refused_call_is_an_error():
    desk = Desk(tools=TOOLS, approve=True, is_interactive=False)
    assert "error: the user refused this call" in desk.type("wrap aa bb")
    assert "text_formatter was not run: --approve has no terminal" in desk.err.getvalue()


def test_interrupt_keeps_text_and_calls():
    def stopped(model, messages, settings, tools, on_text, on_call, approve):
        stub_respond(model, messages, settings, tools, on_text, on_call, approve)
        raise KeyboardInterrupt

    desk = Desk(respond=stopped, tools=TOOLS)
    assert desk.type("wrap aa").endswith("Done. [stopped]\n")
    assert "last answer" not in desk.type("/stats")
    assert desk.roles == "u a u a"
    assert desk.chat.conversation.exchanges[0][-1]["content"] == "Done."


def test_interrupt_before_the_first_word_keeps_nothing_but_the_question():
    desk = Desk()
    assert desk.type("silence please") == " [stopped]\n"
    assert desk.roles == ""
    assert desk.type("/retry") == " [stopped]\n"


def test_interrupt_without_a_keyboard_ends_the_chat():
    with pytest.raises(KeyboardInterrupt):
        Desk(is_interactive=False).type("silence")


def test_failing_model_ends_a_script_but_not_a_chat():
    desk = Desk()
    assert desk.error("fail") == "error: the server is gone"
    assert desk.roles == ""
    with pytest.raises(CommandError, match="the server is gone"):
        Desk(is_interactive=False).type("fail")


def test_reply_that_ends_with_a_failed_call_still_ends_with_an_answer():
    def failing(*arguments, on_call, **options):
        reply = stub_respond(*arguments, on_call=on_call, **options)
        reply.text, reply.finish_reason = "", "length"
        reply.turns = reply.turns[:2]
        return reply

    desk = Desk(respond=failing, tools=TOOLS)
    desk.type("wrap aa")
    assert desk.roles == "u a u a"
    assert "the answer was cut off" in desk.err.getvalue()


def test_model_that_cannot_chat_is_refused_at_once():
    class NoTemplate(StubModel):
        def warm_up(self):
            raise CommandError("the model has no chat template", MODEL)

    with pytest.raises(CommandError, match="no chat template"):
        talk(stub_session(model=NoTemplate()), stub_respond)


def test_help_needs_no_editor_and_no_model():
    code = "import sys, integration.chat; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "integration.chat_input" in loaded
    assert not loaded & {"prompt_toolkit", "llama_cpp", "torch", "langchain_core", "numpy"}


def test_full_context_is_said_and_a_long_message_refused():
    desk = Desk(model=StubModel(n_ctx=100))
    for number in range(12):
        desk.type(f"message {number}")
    notes = desk.err.getvalue().splitlines()
    assert notes[0] == "the context is full: oldest exchanges dropped: 3, kept: 3"
    assert "oldest exchanges" in desk.type("/stats")
    assert "error: the prompt has 202 tokens" in desk.error("w " * 200)


def test_retry_replaces_the_answer_and_draws_a_seed():
    desk = Desk()
    desk.type("hello", "again")
    assert "seed 7, 3 messages: 'again'" in desk.out.getvalue()
    retried = desk.type("/retry")
    assert "3 messages: 'again'" in retried
    assert "seed 7," not in retried
    assert desk.roles == "u a u a"
    assert "seed 7, 5 messages" in desk.type("more")


def test_retry_that_is_stopped_keeps_the_old_answer():
    desk = Desk()
    desk.type("hello")
    old = desk.chat.conversation.prompt()
    desk.chat._respond = lambda *_, **__: stub_respond(StubModel(), [{"content": "silence"}], None)
    with pytest.raises(AttributeError):  # any failure will do
        desk.type("/retry")
    assert desk.chat.conversation.prompt() == old


def test_retry_needs_a_message():
    desk = Desk()
    assert desk.error("/retry") == "error: /retry: nothing was asked yet"
    desk.type("hello", "/reset")
    assert desk.error("/retry") == "error: /retry: nothing was asked yet"


def test_stats_before_and_after_an_answer():
    desk = Desk()
    assert desk.type("/stats").splitlines()[0] == "context      [....................] 0/1000 0 %"
    assert desk.type("hello there", "/stats").splitlines() == [
        "last answer  4 prompt + 1 completion tokens",
        "speed        40.0 tok/s, first token after 0.25 s",
        "context      [#...................] 12/1000 1 %",
        "seed         7",
        "threads      2",
        "adapter      base",
        "adapters     json 9.8 MB",
        "cached       json 321 tokens 7.4 MB (aside)",
        "session      answers: 1, tool calls: 0, 4 prompt + 1 completion tokens",
    ]


def test_stats_of_a_server_leave_out_what_it_does_not_tell():
    desk = Desk(model=StubModel(n_ctx=None, engine=None), adapters=None)
    stats = desk.type("hello", "/stats")
    assert "context      ?" in stats
    assert "adapter      none" in stats
    assert "threads" not in stats


def test_save_load_and_go_on(tmp_path):
    path = tmp_path / "my talk.json"
    desk = Desk(system="Be brief.")
    assert desk.error(f"/save {path}") == "error: /save: there is no conversation yet"
    assert desk.type("hello", f"/save {path}") == f"saved {path}\n"
    assert json.loads(path.read_text())["adapter"] == "base"
    assert desk.chat.session.model.remembered
    assert "File exists; choose another name" in desk.error(f"/save {path}")
    assert desk.error("/save") == "error: /save needs a file name"

    other = Desk()
    shown = other.type(f"/load {path}")
    assert shown.startswith("loaded exchanges: 1; the last one:\n> hello\nseed 7, 2 messages")
    assert other.chat.conversation.system == "Be brief."
    assert "4 messages: 'more'" in other.type("more")


def test_load_of_something_else_changes_nothing(tmp_path):
    path = tmp_path / "no.json"
    path.write_text('{"messages": 3}')
    desk = Desk()
    desk.type("hello")
    assert "it has no list of messages" in desk.error(f"/load {path}")
    assert desk.roles == "u a"


def test_system_prompt_is_shown_set_and_removed(tmp_path):
    desk = Desk()
    assert desk.type("/system") == "(the model's own)\n"
    assert desk.type("/system Be\nbrief.") == "Be\nbrief.\n"
    assert desk.chat.conversation.prompt("x")[0] == {"role": "system", "content": "Be\nbrief."}
    assert "did you mean 'cognitive_designer'" in desk.error("/system cognitiv_designer")
    (tmp_path / "bad").write_bytes(b"\xff")
    assert "can't decode" in desk.error(f"/system @{tmp_path / 'bad'}")
    assert desk.type("/system off") == "(the model's own)\n"
    assert desk.chat.conversation.system is None


def test_tools_go_on_and_off():
    desk = Desk()
    assert desk.type("/tools").startswith("tools are off\n- text_formatter(")
    assert desk.type("/tools on").startswith("tools are on\n")
    assert list(desk.chat.tools) == list(TOOLS)
    desk.type("/tools off")
    assert not desk.chat.tools
    assert desk.error("/tools maybe") == "error: /tools: got 'maybe', expected on or off"


def test_adapters_are_listed_and_switched():
    desk = Desk()
    assert desk.type("/adapter") == "* base\n  json\n"
    assert desk.type("/adapter json") == "  base\n* json\n"
    assert desk.error("/adapter jsn") == "error: no adapter is called 'jsn'"
    assert "no adapters to choose from" in Desk(adapters=None).error("/adapter")
    assert "no router is loaded" in desk.error("/adapter auto")


def test_adapters_are_loaded_and_unloaded():
    desk = Desk()
    assert desk.type("/adapter load mine=x.gguf") == (
        "loaded mine: rank 8, 2.5 MB\n* base\n  json\n  mine\n"
    )
    assert desk.type("/adapter unload mine") == "* base\n  json\n"
    assert "expected NAME=FILE" in desk.error("/adapter load mine")


def test_router_chooses_until_someone_else_does():
    router = StubRouter()
    desk = Desk(router=router)
    desk.type("hello", "give me json")
    assert desk.chat.session.adapters.active == "json"
    assert router.asked == [["hello"], ["hello", "give me json"]]
    assert desk.err.getvalue().count("adapter: json (2 texts)") == 1
    assert desk.commands.choices("/adapter") == ["base", "json", "auto"]
    desk.type("/adapter base", "more json")
    assert desk.chat.session.adapters.active == "base"
    assert len(router.asked) == 2
    assert desk.type("/adapter auto").startswith("the router chooses\n")
    desk.type("json again")
    assert desk.chat.session.adapters.active == "json"
    assert "adapter      json (routed)\n" in desk.type("/stats")


def test_stats_tell_what_adapters_take():
    stats = Desk().type("/stats")
    assert "adapters     json 9.8 MB\n" in stats
    assert "cached       json 321 tokens 7.4 MB (aside)\n" in stats


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/svae x", "error: no command '/svae', did you mean '/save'? /help lists them"),
        ("/nope", "error: no command '/nope'; /help lists them"),
        ("/", "error: no command '/'; /help lists them"),
        ("/reset now", "error: /reset takes nothing, got 'now'"),
    ],
)
def test_wrong_command_is_one_line(line, error):
    assert Desk().error(line) == error


def test_path_at_the_start_is_a_message():
    assert "'/etc/hosts is a file'" in Desk().type("/etc/hosts is a file")


def test_help_names_every_command():
    assert Desk().type("/help") == help_text() + "\n"
    assert all(f"\n{name}" in f"\n{help_text()}" for name in COMMANDS)
    assert not Desk().commands.run("/exit")


def test_completion_of_commands_and_names():
    choices = Desk().commands.choices
    assert [word for word, _, _ in complete("/re", choices)] == ["/retry", "/reset"]
    assert list(complete("/adapter j", choices)) == [("json", 1, "")]
    assert [word for word, _, _ in complete("/system cognitive_designer_", choices)] == [
        "cognitive_designer_ru"
    ]
    assert [word for word, _, _ in complete("/tools ", choices)] == ["on", "off"]
    assert list(complete("/stats x", choices)) == []
    assert Desk(adapters=None).commands.choices("/adapter") == []


def test_history_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    open_history().store_string("two\nlines")
    path = tmp_path / "state/tomeforge/chat_history"
    assert history_path() == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert list(open_history().load_history_strings()) == ["two\nlines"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_history_without_a_writable_home_lasts_a_session(tmp_path, monkeypatch):
    (tmp_path / "state").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    open_history().store_string("kept in memory")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history_path().parts[-4:-2] == (".local", "state")
