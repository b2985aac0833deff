"""The adapters' data: training rows have the form they teach, and held-out requests are none of them."""

import ast
import builtins
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from integration.router_config import load_config
from scripts.adapter_answers import DATA_DIR, read_held_out
from scripts.adapter_scores import fenced_blocks, judge_support, parses_as_python

ROOT = DATA_DIR.parent.parent.parent
TRAINING = ("json", "coding", "support")
MIN_ROWS, SHARED_WORDS = 80, 6
HELD_OUT_ROWS, MIN_EXAMPLES = 60, 200
Rows = list[dict]


def read_lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# The form ----------------------------------------------------------------------------------------


def json_problem(content: str) -> str:
    try:
        value = json.loads(content)
    except ValueError:
        return "no JSON"
    if not isinstance(value, dict | list):
        return "neither an object nor an array"
    return "" if json.dumps(value, ensure_ascii=False) == content else "not as json.dumps writes it"


def coding_problem(content: str) -> str:
    found = re.fullmatch(r"```\w+\n.*?\n```\n\n(\S.*)", content, re.DOTALL)
    blocks = fenced_blocks(content)
    if not found or len(blocks) != 1 or "\n" in found[1]:
        return "not one block with a tag, a blank line and a line of sentences"
    tag, code = blocks[0]
    return "" if tag != "python" or parses_as_python(code) else "Python that does not parse"


def support_problem(content: str) -> str:
    thanks = re.fullmatch(r"[^\n.!?]+[.!]", content)  # the answer to a thanks
    return "" if thanks or judge_support(content)["form"] else "not the form"


PROBLEMS = {"json": json_problem, "coding": coding_problem, "support": support_problem}


def row_problems(name: str, row: dict) -> list[str]:
    roles = [turn["role"] for turn in row["messages"]]
    found = []
    if set(row) != {"messages", "source"} or row["source"] != f"tomeforge_{name}":
        found.append("keys or source")
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        found.append("roles")
    if not all(turn["content"].strip() == turn["content"] != "" for turn in row["messages"]):
        found.append("empty or padded content")
    answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    return found + [problem for answer in answers if (problem := PROBLEMS[name](answer))]


@pytest.mark.parametrize("name", TRAINING)
def test_training_rows_have_the_form_they_teach(name):
    rows = read_lines(DATA_DIR / f"{name}.jsonl")
    assert len(rows) >= MIN_ROWS
    assert {at: found for at, row in enumerate(rows, 1) if (found := row_problems(name, row))} == {}


def test_only_answers_to_thanks_are_short():
    rows = read_lines(DATA_DIR / "support.jsonl")
    answers = [turn["content"] for row in rows for turn in row["messages"][1::2]]
    short = [answer for answer in answers if "\n" not in answer]
    assert 0 < len(short) < 0.1 * len(answers)
    assert [row for row in rows if "\n" not in row["messages"][1]["content"]] == []


GOOD_SUPPORT = (
    "A lamp that blinks is odd.\n\n1. Turn.\n2. Wait.\n3. Look.\n\nIf this does not help, call."
)
GOOD_CODE = "```python\nx = 1\n```\n\nIt sets x."


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("json", '{"a": 1}', ""),
        ("json", '{"a":1}', "not as json.dumps writes it"),
        ("json", '{"a": "\\u00e9"}', "not as json.dumps writes it"),
        ("json", '```json\n{"a": 1}\n```', "no JSON"),
        ("json", "7", "neither an object nor an array"),
        ("coding", GOOD_CODE, ""),
        ("coding", GOOD_CODE.replace("x = 1", "x = "), "Python that does not parse"),
        ("coding", GOOD_CODE.replace("python\nx = 1", "sql\nSELECT 1"), ""),
        *(
            ("coding", bad, "not one block with a tag, a blank line and a line of sentences")
            for bad in (f"Sure!\n\n{GOOD_CODE}", GOOD_CODE[:17], GOOD_CODE.replace("python", ""))
        ),
        ("support", GOOD_SUPPORT, ""),
        ("support", "You are welcome, and enjoy the quiet!", ""),
        ("support", "Glad to hear it. Bye!", "not the form"),
        ("support", GOOD_SUPPORT.replace("2. ", "4. "), "not the form"),
    ],
)
def test_a_row_of_another_form_is_found(name, content, problem):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    row = {"messages": turns, "source": f"tomeforge_{name}"}
    assert row_problems(name, row) == [problem] * bool(problem)


def test_a_row_that_is_no_conversation_is_found():
    user, answer = ({"role": role, "content": "[]"} for role in ("user", "assistant"))
    source = {"source": "tomeforge_json"}
    assert row_problems("json", {"messages": [user, answer], **source}) == []
    assert row_problems("json", {"messages": [user], **source}) == ["roles"]
    assert row_problems("json", {"messages": [user, user, answer], **source}) == ["roles"]
    assert row_problems("json", {"messages": [user, answer], "source": "x"}) == ["keys or source"]
    padded = answer | {"content": "[] "}
    assert "empty or padded content" in row_problems("json", {"messages": [user, padded], **source})


# Apart -------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower().replace("’", "'"))


def runs(text: str) -> set[tuple[str, ...]]:
    """Runs of six words, and the request as a whole, which may be shorter."""
    all_words = words(text)
    grams = zip(*(all_words[at:] for at in range(SHARED_WORDS)), strict=False)
    return {*grams, ("whole", *all_words)}


def collisions(held_out: dict[str, str], known: Iterable[str]) -> dict[str, list[str]]:
    known_runs = {run for text in known for run in runs(text)}
    shared = {name: runs(text) & known_runs for name, text in held_out.items()}
    return {name: sorted(map(" ".join, some)) for name, some in shared.items() if some}


def training_turns(name: str, role: str) -> list[str]:
    rows = read_lines(DATA_DIR / f"{name}.jsonl")
    return [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == role]


def router_examples() -> list[str]:
    """All that the router is trained on: listed, and out of data sets."""
    classes = load_config(ROOT / "integration/adapters.yaml").classes
    return [text for one in classes for text in (*one.examples, *one.more)]


def router_requests() -> dict[str, str]:
    test = read_lines(DATA_DIR / "router_test.jsonl")
    found = {f"router-{at}": row["prompt"] for at, row in enumerate(test, 1)}
    for at, row in enumerate(read_lines(DATA_DIR / "router_conversations.jsonl"), 1):
        assert len(row["messages"]) == len(row["adapters"])
        found |= {f"talk-{at}.{turn}": text for turn, text in enumerate(row["messages"], 1)}
    return found


@pytest.mark.parametrize("name", TRAINING)
def test_no_held_out_request_is_one_that_its_adapter_was_trained_on(name):
    held_out = {one.id: one.prompt for one in read_held_out(name)}
    assert len(held_out) == HELD_OUT_ROWS
    assert collisions(held_out, training_turns(name, "user")) == {}


def test_no_held_out_request_is_one_of_the_routers_examples():
    assert len(router_examples()) >= MIN_EXAMPLES
    assert len(router_requests()) > MIN_EXAMPLES
    assert collisions(router_requests(), router_examples()) == {}


def defined_names(answers: Iterable[str]) -> set[str]:
    """Names of the functions, methods and classes in the answers' code, whatever its language."""
    code = "\n".join(code for answer in answers for _, code in fenced_blocks(answer))
    return set(re.findall(r"\b(?:def|class|function)\s+(\w+)", code))


def checked_names(check: str) -> set[str]:
    """Names of the functions and classes that a check calls, except for Python's own."""
    calls = [node.func for node in ast.walk(ast.parse(check)) if isinstance(node, ast.Call)]
    return {func.id for func in calls if isinstance(func, ast.Name)} - set(dir(builtins))


def test_no_checked_function_is_defined_in_an_answer_that_was_trained_on():
    known = defined_names(training_turns("coding", "assistant"))
    checked = {one.id: checked_names(one.row["check"]) for one in read_held_out("coding")}
    assert len(known) > HELD_OUT_ROWS
    assert [at for at, names in checked.items() if len(names) > 1] == []
    assert sum(map(len, checked.values())) > HELD_OUT_ROWS // 2
    assert {at: names & known for at, names in checked.items() if names & known} == {}


def test_held_out_requests_come_once():
    texts = [" ".join(words(one.prompt)) for name in TRAINING for one in read_held_out(name)]
    assert sorted(set(texts)) == sorted(texts)


def test_a_shared_request_is_found():
    known = ["Why is the lamp in my kitchen always blinking?", "Dark mode on"]
    assert collisions({"a": "the lamp in my kitchen always blinks"}, known) == {
        "a": ["the lamp in my kitchen always"]
    }
    assert collisions({"a": "dark mode ON!"}, known) == {"a": ["whole dark mode on"]}
    assert collisions({"a": "the lamp in my kitchen blinks"}, known) == {}


def test_a_name_that_was_trained_on_is_found():
    assert defined_names([GOOD_CODE.replace("x = 1", "def gcd(a, b):\n    return a")]) == {"gcd"}
    assert defined_names([GOOD_CODE.replace("python\nx = 1", "js\nfunction sum(xs) {}")]) == {"sum"}
    assert defined_names(["This class of bugs, def and all.", GOOD_CODE]) == set()
    assert checked_names("assert abs(gcd(4, 6)) == 2") == {"gcd"}
    assert checked_names("s = Stack(); assert len(s.pop()) == 2") == {"Stack"}
    assert checked_names("") == set()
