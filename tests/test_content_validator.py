"""content_validator: a table of passing and failing texts a rule, the summary, wrong calls."""

import re
import time
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool, ToolException

from tools import TOOLS
from tools._language import LANGUAGES
from tools.content_validator import Rule, RuleResult, check_content, content_validator

NAMES: tuple[str, ...] = get_args(Rule)
FAMILIES = ("min_words", "max_words", "language")
RULES = (*NAMES, "min_words:99999", "max_words:1", "language:en")
LABEL = "a" * 63


def call(**args: Any) -> ToolMessage:
    message = content_validator.invoke(
        {"type": "tool_call", "name": "content_validator", "id": "1", "args": args}
    )
    assert isinstance(message, ToolMessage)
    return message


PASSING: list[tuple[str, str, str]] = [
    ("not_empty", "one", "1 word"),
    ("not_empty", " one\n two ", "2 words"),
    ("has_headings", "text\n\n## Title\n", "line 3: '## Title'"),
    ("has_headings", "   # T", "line 1: '# T'"),
    ("has_headings", "Title\n===", "line 1: 'Title'"),
    ("has_headings", "\r\nTitle\r\n---\r\n", "line 2: 'Title'"),
    ("has_headings", "```\n# no\n```\n# yes", "line 4: '# yes'"),
    ("is_email", "me@example.com", "an address at example.com"),
    ("is_email", " first.last+tag@sub.example.co.uk\n", "sub.example.co.uk"),
    ("is_email", "o'brien!x@a-b.io", "a-b.io"),
    ("is_email", "a" * 64 + "@" + LABEL + ".com", "an address at"),
    ("is_json", '{"a": 1}', "an object with 1 key"),
    ("is_json", " [1, 2] ", "a list of 2 items"),
    ("is_json", '"text"', "a single value"),
    ("is_json", "9" * 5000, "a single value"),
    ("is_url", "https://example.com/a?b=c#d", "https, host 'example.com'"),
    ("is_url", " http://localhost:8080 ", "host 'localhost'"),
    ("is_url", "ftp://user@[::1]/file", "host '::1'"),
    ("has_code_block", "a\n```py\nx\n```", "1 block, the first in lines 2 to 4"),
    ("has_code_block", "~~~\n```\n~~~\n\n````\n```\n````", "2 blocks"),
    ("no_placeholders", "Dear Ann, {} { x } ${HOME} \\frac{a}{b}", "none found"),
    ("no_placeholders", "[Add a tool](add.md), todo <b>", "none found"),
    ("no_placeholders", f"[Your {'long ' * 12}aside]", "none found"),
    ("balanced_brackets", "f(a[0], {b: (1)})", "4 pairs"),
    ("balanced_brackets", "", "0 pairs"),
    ("min_words:3", "one, two -\nthree", "4 words"),
    ("max_words:3", "a b\tc", "3 words"),
    ("max_words:99999", "", "0 words"),
    # Each Chinese or Japanese character is a word, their punctuation is none.
    ("min_words:4", "你好ab。世", "4 words"),
    ("max_words:5", "「テスト」です", "5 words"),
    ("language:en", "A short text in English.", "reads as English"),
    ("language:de", "```\nfor line in lines: print(line)\n```\nDas ist neu.", "reads as German"),
]

FAILING: list[tuple[str, str, str]] = [
    ("not_empty", "", "no text"),
    ("not_empty", " \n\t\u3000", "only white space"),
    ("has_headings", "", "no line like"),
    ("has_headings", "#hashtag\n####### seven\n#\n    # code", "no line like"),
    ("has_headings", "```\n# in code\nTitle\n===\n```", "no line like"),
    ("has_headings", "- item\n---\n> quote\n---\n\n---\n***\n---", "no line like"),
    ("has_headings", "Title\n\n===", "no line like"),
    ("is_email", "", "no text"),
    ("is_email", "nobody", "no @ in the text"),
    ("is_email", "@example.com", "nothing before the @"),
    ("is_email", "me@", "nothing after the @"),
    ("is_email", "me@@example.com", "more than one @"),
    ("is_email", "write to me@example.com", "white space"),
    ("is_email", "me@example.com\nyou@example.com", "more than one @"),
    ("is_email", ".me@example.com", "a dot at the edge"),
    ("is_email", "me.@example.com", "a dot at the edge"),
    ("is_email", "a..b@example.com", "two dots in a row"),
    ("is_email", "a(b@example.com", "'(' before the @"),
    ("is_email", "é@example.com", "'é' before the @"),
    ("is_email", "me@localhost", "no dot in the domain"),
    ("is_email", "me@-a.com", "a hyphen at the edge of '-a'"),
    ("is_email", "me@a..com", "an empty part"),
    ("is_email", "me@example.com.", "an empty part"),
    ("is_email", "me@exa_mple.com", "cannot have in 'exa_mple'"),
    ("is_email", "me@1.2.3.4", "ends in a number"),
    ("is_email", "a" * 65 + "@example.com", "65 characters before the @"),
    ("is_email", "me@" + "a" * 64 + ".com", "64 characters in"),
    ("is_email", "me@" + f"{LABEL}." * 4 + "com", "262 characters, at most 254"),
    ("is_json", "", "line 1, column 1"),
    ("is_json", "{'a': 1}", "line 1, column 2"),
    ("is_json", '[1,\n2', "line 2, column 2"),
    ("is_json", "[NaN]", "NaN is not JSON"),
    ("is_json", "[" * 50_000, "nested too deeply"),
    ("is_url", "", "no text"),
    ("is_url", "example.com", "does not start with http://"),
    ("is_url", "javascript:alert(1)", "does not start with http://"),
    ("is_url", "http://", "no host"),
    ("is_url", "http:///path", "no host"),
    ("is_url", "see http://example.com", "white space"),
    ("is_url", "http://exa\u200bmple.com", "control character"),
    ("is_url", "http://a..b", "an empty part"),
    ("is_url", "http://[::1", "Invalid IPv6"),
    ("is_url", "http://example.com:99999", "ort"),
    ("has_code_block", "", "no line that starts with ```"),
    ("has_code_block", "`x` and ```y```", "no line that starts with ```"),
    ("has_code_block", "a\n```\nx", "the block that starts in line 2 is not closed"),
    ("no_placeholders", "Dear {name},\n{body}", "'{name}' in line 1, column 6, 2 in all"),
    ("no_placeholders", "a\nb {{name}}", "'{name}' in line 2, column 4, 1 in all"),
    ("no_placeholders", "[Your Name] <your-email>", "'[Your Name]' in line 1, column 1, 2 in all"),
    ("no_placeholders", "TODO: Lorem ipsum", "'TODO' in line 1, column 1, 2 in all"),
    ("balanced_brackets", "(", "( in line 1, column 1 is not closed"),
    ("balanced_brackets", "a\r\nb\rc ]", "] in line 3, column 3 closes nothing"),
    ("balanced_brackets", "([\n)]", ") in line 2, column 1 does not match [ in line 1, column 2"),
    ("min_words:4", "one two three", "3 words, 1 short"),
    ("min_words:1", " \n", "0 words, 1 short"),
    ("max_words:2", "a b\r\n  c d", "4 words, 2 too many, the first in line 2, column 3"),
    ("max_words:1", "字字", "2 words, 1 too many, the first in line 1, column 2"),
    ("language:en", "Das ist ein kurzer Text.", "reads as German"),
    ("language:de", "Dit is een korte tekst.", "reads as Dutch"),
    ("language:en", "", "no words outside"),
    ("language:en", "1 + 1\r\n= 2 😀", "no words outside"),
    ("language:en", "```\nA text in English.\n```", "no words outside code blocks"),
    ("language:en", "ok", "not clear"),
    ("language:es", "x = f(y)", "not clear"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "text", "reason"), PASSING)
def test_rule_passes(rule: str, text: str, reason: str) -> None:
    (result,) = check_content(text, [rule])
    assert result.passed, result.reason
    assert reason in result.reason


@pytest.mark.parametrize(("rule", "text", "reason"), FAILING)
def test_rule_fails_with_a_reason(rule: str, text: str, reason: str) -> None:
    (result,) = check_content(text, [rule])
    assert not result.passed, result.reason
    assert reason in result.reason
    assert len(result.reason) < 120


def test_every_rule_has_a_passing_and_a_failing_text() -> None:
    for table in (PASSING, FAILING):
        assert {rule.partition(":")[0] for rule, _, _ in table} == {*NAMES, *FAMILIES}


SENTENCES = {
    "ar": "من فضلك أرسل التقرير قبل يوم الجمعة.",
    "cs": "Pošlete prosím zprávu do pátku večer.",
    "da": "Vil du ikke nok sende mig rapporten inden på fredag?",
    "de": "Bitte schicken Sie den Bericht bis Freitag.",
    "el": "Παρακαλώ στείλτε την αναφορά έως την Παρασκευή.",
    "en": "Please send the report by Friday.",
    "es": "Por favor, envíe el informe antes del viernes.",
    "fi": "Lähetä raportti viimeistään perjantaina, kiitos.",
    "fr": "Veuillez envoyer le rapport avant vendredi.",
    "he": "אנא שלחו את הדוח עד יום שישי.",
    "hi": "कृपया शुक्रवार तक रिपोर्ट भेज दें।",
    "hu": "Kérem, küldje el a jelentést péntekig.",
    "id": "Tolong kirim laporannya sebelum hari Jumat.",
    "it": "Per favore, invia la relazione entro venerdì.",
    "ja": "金曜日までに報告書を送ってください。",
    "ko": "금요일까지 보고서를 보내 주세요.",
    "nl": "Stuur het verslag alstublieft voor vrijdag.",
    "no": "Jeg vet ikke hva de gjør etter at møtet er over.",
    "pl": "Proszę przesłać raport do piątku.",
    "pt": "Por favor, envie o relatório até sexta-feira.",
    "ro": "Vă rog să trimiteți raportul până vineri.",
    "ru": "Пожалуйста, отправьте отчёт до пятницы.",
    "sv": "Var snäll och skicka rapporten före fredag.",
    "th": "กรุณาส่งรายงานภายในวันศุกร์",
    "tr": "Lütfen raporu cuma gününe kadar gönderin.",
    "uk": "Будь ласка, надішліть звіт до п'ятниці.",
    "vi": "Vui lòng gửi báo cáo trước thứ Sáu.",
    "zh": "请在星期五之前把报告发给我。",
}


def test_every_language_has_a_sentence() -> None:
    assert list(SENTENCES) == list(LANGUAGES)


@pytest.mark.parametrize("code", LANGUAGES)
def test_language_is_told_from_all_others(code: str) -> None:
    results = check_content(SENTENCES[code], [f"language:{other}" for other in LANGUAGES])
    assert [result.rule for result in results if result.passed] == [f"language:{code}"]
    assert {result.reason for result in results} == {f"reads as {LANGUAGES[code]}"}


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        ("min_words", ["expected one of not_empty", "(nearest: min_words:N, max_words:N)"]),
        ("min_words:0", ["got 'min_words:0', expected min_words:N with N from 1 to 99999"]),
        ("max_words:100000", ["max_words:N with N from 1 to 99999"]),
        ("max_words:-1", ["max_words:N with N"]),
        ("max_words:1.5", ["max_words:N with N"]),
        ("max_words:٣", ["max_words:N with N"]),  # a digit, but none of ASCII
        ("max_words:3\n", ["got 'max_words:3\\n', expected max_words:N with N"]),
        ("max_words:" + "9" * 5000, ["max_words:N with N"]),
        ("max_word:5", ["(nearest: max_words:N"]),
        ("language:", ["expected language:CODE, CODE one of ar, cs"]),
        ("language:xx", ["expected language:CODE, CODE one of ar, cs"]),
        ("language:EN", ["(nearest: language:en)"]),
        ("language:German", ["(nearest: language:de)"]),
        ("is_email:5", ["expected one of not_empty", "nearest: is_email"]),
        ("", ["got '', expected one of not_empty"]),
    ],
)
def test_wrong_rule_is_named_with_what_is_right(rule: str, parts: list[str]) -> None:
    with pytest.raises(ToolException) as caught:
        check_content("x", ["not_empty", rule])
    message = call(text="x", rules=["not_empty", rule])
    assert message.status == "error"
    for text in (f"error: {caught.value}".replace("rules:", "rules[1]:"), str(message.content)):
        assert text.startswith("error: rules[1]: got ")
        assert [part for part in parts if part not in text] == []
        assert "\n" not in text
        assert len(text) < 400


def test_answer_is_a_summary_and_one_line_a_rule_in_the_order_asked() -> None:
    answer = content_validator.invoke({"text": "a b c", "rules": ["not_empty", "is_email"]})
    assert answer == (
        "1 of 2 rules passed\n"
        "not_empty: passed (3 words)\n"
        "is_email: failed (no @ in the text)"
    )  # fmt: skip
    swapped = content_validator.invoke({"text": "a b c", "rules": ["is_email", "not_empty"]})
    assert swapped.split("\n")[1:] == answer.split("\n")[:0:-1]


def test_duplicates_are_checked_once() -> None:
    results = check_content("x", ["not_empty", "is_email", "not_empty"])
    assert [result.rule for result in results] == ["not_empty", "is_email"]
    message = call(text="x", rules=["not_empty"] * 20)
    assert message.content == "1 of 1 rule passed\nnot_empty: passed (1 word)"
    assert message.status == "success"


def test_result_is_frozen() -> None:
    result = RuleResult("not_empty", True, "1 word")
    with pytest.raises(AttributeError):
        result.passed = False  # type: ignore[misc]


def test_empty_text_is_a_verdict_and_no_error() -> None:
    message = call(text="", rules=["not_empty"])
    assert message.status == "success"
    assert message.content == "0 of 1 rule passed\nnot_empty: failed (no text)"


def test_unknown_rule_in_code_is_refused() -> None:
    with pytest.raises(ToolException, match=r"rules: got 'is_mail'.*nearest: is_email"):
        check_content("x", ["is_mail"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ({"text": "a", "rules": []}, ["rules: got 0 items", "1 to 20", "corrected rules"]),
        ({"text": "a", "rules": ["not_empty"] * 21}, ["rules: got 21 items", "1 to 20"]),
        (
            {"text": "a", "rules": ["not_empty", "is_emial"]},
            ["rules[1]: got 'is_emial'", ", ".join(NAMES), "(nearest: is_email)"],
        ),
        ({"text": "a", "rules": "is_email"}, ["rules: got 'is_email'", "a list of 1 to 20"]),
        ({"text": "a", "rules": [None]}, ["rules[0]: got None", "one of not_empty"]),
        ({"text": "a", "rules": [{"a": [1]}]}, ["rules[0]: got {'a': [1]}"]),
        ({"text": "a"}, ["rules: got nothing", "again with rules"]),
        ({"rules": ["not_empty"]}, ["text: got nothing", "again with text"]),
        ({"text": None, "rules": ["not_empty"]}, ["text: got None", "a string"]),
        ({"text": "a" * 100_001, "rules": ["not_empty"]}, ["text: got 100001 characters"]),
        ({"text": "a", "rules": ["not_empty"], "rule": 1}, ["rule: unknown argument", "no rule"]),
    ],
)
def test_wrong_calls_name_the_argument(args: dict[str, Any], parts: list[str]) -> None:
    message = call(**args)
    assert message.status == "error"
    content = str(message.content)
    assert content.startswith("error: ")
    assert "call content_validator again with" in content
    assert "\n" not in content
    assert len(content) < 500
    assert [part for part in parts if part not in content] == []


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.text(), st.text(st.sampled_from('@.[](){}-=#`\n\\"http:/ a1_<>~'), max_size=80)),
    st.lists(st.sampled_from(RULES), min_size=1, max_size=20),
)
def test_any_valid_input_gets_one_verdict_a_rule(text: str, rules: list[str]) -> None:
    results = check_content(text, rules)
    assert [result.rule for result in results] == list(dict.fromkeys(rules))
    assert all(result.reason and "\n" not in result.reason for result in results)
    lines = content_validator.invoke({"text": text, "rules": rules}).split("\n")
    assert len(lines) == len(results) + 1
    assert lines[0].startswith(f"{sum(' passed (' in line for line in lines[1:])} of ")


@pytest.mark.parametrize(
    "text",
    [
        *(piece * (50_000 // len(piece)) for piece in
          ("[your", "<your ", "{a", "a.", "a@", "# ", "=", "- ", "`", "```\n", "(", "()", ")(",
           "a\n-", "lorem ", "[", "http://", "\\", "1", " ", "\n", '"', "a-")),
        "me@" + "a." * 25_000,
        "http://" + "a." * 25_000,
        "http://[" + ":" * 50_000,
        "#" + " " * 50_000,
        "x\n" + "-" * 50_000 + "x",
        '{"a":' * 10_000,
        "字" * 50_000,
        "a" + "\u0301\u0323" * 25_000,
    ],
    ids=lambda text: ascii(text[:8]),
)  # fmt: skip
def test_50_kb_take_well_under_a_second(text: str) -> None:
    """Case 10: patterns that take exponential time, and very long texts."""
    check_content("Load the language model.", ["language:en"])
    start = time.process_time()  # of this process alone, whatever else the machine does
    check_content(text, RULES)
    assert time.process_time() - start < 1


def test_schema_has_no_definitions_and_marks_the_verbatim_text() -> None:
    schema = content_validator.args_schema.model_json_schema()
    assert "$defs" not in schema
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["text", "rules"]
    names, *families = schema["properties"]["rules"]["items"]["anyOf"]
    assert names["enum"] == list(NAMES)
    assert [family["shown_as"].partition(":")[0] for family in families] == list(FAMILIES)
    assert [name for name, p in schema["properties"].items() if p.get("verbatim")] == ["text"]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_the_schema_allows_the_tool_accepts(data: st.DataObject) -> None:
    schema = content_validator.args_schema.model_json_schema()
    variant = data.draw(st.sampled_from(schema["properties"]["rules"]["items"]["anyOf"]))
    if "enum" in variant:
        rule = data.draw(st.sampled_from(variant["enum"]))
    else:
        pattern = variant["pattern"].replace("$", r"\Z")  # in JSON Schema, $ is the very end
        rule = data.draw(st.from_regex(pattern))
    assert call(text="one two", rules=[rule]).status == "success"


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        "{}:{}".format, st.sampled_from(["min_words", "max_words"]), st.integers() | st.text()
    )
)
def test_what_the_schema_forbids_the_tool_refuses(rule: str) -> None:
    allowed = re.fullmatch("(min_words|max_words):[1-9][0-9]{0,4}", rule) is not None
    assert (call(text="one two", rules=[rule]).status == "success") is allowed


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["word", "字", "x1", "..."])), st.integers(1, 12))
def test_word_rules_agree_with_each_other(words: list[str], limit: int) -> None:
    rules = [f"min_words:{limit}", f"max_words:{limit}"]
    least, most = check_content("  ".join(words), rules)
    assert (least.passed, most.passed) == (len(words) >= limit, len(words) <= limit)


def test_tools_come_in_a_fixed_order() -> None:
    names = [tool.name for tool in TOOLS]
    assert names == ["text_formatter", "template_generator", "content_validator"]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_descriptions_are_short_prompts(tool: BaseTool) -> None:
    assert "Use it" in tool.description
    assert len(tool.description) <= 100
    assert "\n" not in tool.description
    schema = tool.args_schema.model_json_schema()
    assert schema["title"] == tool.name
    assert all(len(p["description"]) <= 40 for p in schema["properties"].values())
