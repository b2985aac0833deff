"""template_generator: every template, filling in one safe pass, and what a wrong call answers."""

import re
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import ToolMessage
from langchain_core.tools import ToolException

from tools.template_generator import (
    TemplateType,
    fill_template,
    list_fields,
    template_generator,
)

TYPES: tuple[TemplateType, ...] = get_args(TemplateType)


def call(**args: Any) -> ToolMessage:
    message = template_generator.invoke(
        {"type": "tool_call", "name": "template_generator", "id": "1", "args": args}
    )
    assert isinstance(message, ToolMessage)
    return message


def test_the_choices_are_the_contract() -> None:
    assert TYPES[:6] == ("prompt", "email", "report", "bug_report", "meeting_notes", "readme")
    assert TYPES[6:] == ("cover_letter", "release_notes", "user_story")


def test_prompt_is_the_classic_layout() -> None:
    text = fill_template("prompt", {"instruction": "Add.", "input": "1 2"})
    assert text == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"


@pytest.mark.parametrize("template_type", TYPES)
def test_empty_template_lists_every_field(template_type: TemplateType) -> None:
    names = list_fields(template_type)
    text = fill_template(template_type)
    body, last = text.rsplit("\n", 1)
    assert last == f"Still to fill in: {', '.join(names)}"
    assert re.findall(r"\{(\w+)\}", body) == names
    assert fill_template(template_type, {}) == text


@pytest.mark.parametrize("template_type", TYPES)
def test_every_template_can_be_filled_in_one_call(template_type: TemplateType) -> None:
    message = call(
        template_type=template_type, fields=dict.fromkeys(list_fields(template_type), "x")
    )
    assert message.status == "success"
    assert "Still to fill in" not in str(message.content)


@pytest.mark.parametrize("template_type", TYPES)
def test_full_template_has_nothing_left(template_type: TemplateType) -> None:
    names = list_fields(template_type)
    text = fill_template(template_type, {name: f"<{name}>" for name in names})
    assert "Still to fill in" not in text
    assert "{" not in text
    assert [name for name in names if f"<{name}>" not in text] == []


def test_partly_filled_template_lists_the_rest_in_order() -> None:
    text = fill_template("email", {"sender": "Ann", "subject": "Lunch", "next_step": ""})
    assert text.startswith("Subject: Lunch\n\nDear {recipient},\n\n{body}\n\n")
    assert text.endswith("Ann\n\nStill to fill in: recipient, body")


@pytest.mark.parametrize(
    "value",
    ["{body}", "{0.__class__}", "{{sender}}", "%s", r"\1 \g<0> \n", "}{", "{", "{subject}"],
)
def test_values_stay_text(value: str) -> None:
    """Case 11: attribute access through a placeholder."""
    text = fill_template("email", {"subject": value, "body": "SECRET"})
    assert text.startswith(f"Subject: {value}\n")
    assert text.count("SECRET") == 1
    assert text.endswith("Still to fill in: recipient, next_step, sender")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("subjct", "(nearest: subject)"),
        ("Subject", "(nearest: subject)"),
        ("{subject}", "(nearest: subject)"),
        ("{0.__class__}", None),
        ("__class__", None),
        ("", None),
        ("a\nb", None),
        ("字" * 5000, None),
    ],
)
def test_unknown_field_is_named_with_the_valid_ones(name: str, nearest: str | None) -> None:
    with pytest.raises(ToolException) as caught:
        fill_template("email", {"subject": "fine", name: "x"})
    text = str(caught.value)
    assert text.startswith(f"fields: got {name!r}" if len(name) < 50 else "fields: got '字")
    assert "expected one of subject, recipient, body, next_step, sender" in text
    assert ("nearest" in text) is (nearest is not None)
    assert (nearest or "") in text
    assert "\n" not in text
    assert len(text) < 300
    message = call(template_type="email", fields={name: "x"})
    assert message.status == "error"
    assert str(message.content).startswith("error: fields: got ")


def test_known_field_is_no_error() -> None:
    message = call(template_type="email", fields={"subject": "Hi"})
    assert message.status == "success"
    assert str(message.content).startswith("Subject: Hi\n")


def test_many_unknown_fields_are_counted() -> None:
    with pytest.raises(ToolException, match="and 17 more unknown names"):
        fill_template("report", {f"x{n}": "" for n in range(20)})


def test_unknown_type_in_code_names_the_choices() -> None:
    with pytest.raises(ToolException, match=r"got 'emial'.*prompt, email.*nearest: email"):
        fill_template("emial")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ({"template_type": "letter"}, ["template_type: got 'letter'", ", ".join(TYPES)]),
        ({"template_type": "Email"}, ["template_type: got 'Email'", "(nearest: email)"]),
        ({"template_type": ["email"]}, ["template_type: got ['email']", "one of prompt"]),
        ({}, ["template_type: got nothing", "again with template_type"]),
        ({"template_type": "email", "fields": "x"}, ["fields: got 'x'", "an object"]),
        ({"template_type": "email", "fields": {"body": 5}}, ["fields.body: got 5", "a string"]),
        (
            {"template_type": "email", "fields": {"body": "x" * 10_001}},
            ["fields.body: got 10001 characters", "at most 10000", "corrected fields"],
        ),
        (
            {"template_type": "email", "fields": {str(n): "" for n in range(21)}},
            ["fields: got 21 items", "at most 20 strings"],
        ),
        ({"template_type": "email", "body": "x"}, ["body: unknown argument", "no body"]),
        ({"template_type": "email", "x" * 900: "x"}, ["unknown argument"]),
        ({"template_type": "email", "fields": {"y" * 900: 1}}, ["fields.'yyy", "got 1"]),
    ],
)
def test_wrong_calls_name_the_argument(args: dict[str, Any], parts: list[str]) -> None:
    message = call(**args)
    assert message.status == "error"
    content = str(message.content)
    assert content.startswith("error: ")
    assert "call template_generator again with" in content
    assert "\n" not in content
    assert len(content) < 400
    assert [part for part in parts if part not in content] == []


def test_fields_may_be_left_out_or_null() -> None:
    expected = fill_template("report")
    assert template_generator.invoke({"template_type": "report"}) == expected
    assert template_generator.invoke({"template_type": "report", "fields": None}) == expected
    assert template_generator.invoke("report") == expected


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TYPES), st.dictionaries(st.text(max_size=20), st.text(), max_size=20))
def test_any_valid_input_is_answered_or_refused(
    template_type: TemplateType, fields: dict[str, str]
) -> None:
    if set(fields) <= set(list_fields(template_type)):
        assert fill_template(template_type, fields)
    else:
        with pytest.raises(ToolException, match="fields: got"):
            fill_template(template_type, fields)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_values_appear_unchanged_in_order(data: st.DataObject) -> None:
    template_type = data.draw(st.sampled_from(TYPES))
    names = list_fields(template_type)
    values = data.draw(st.fixed_dictionaries({}, optional={name: st.text() for name in names}))
    # Built by splitting at the literal placeholders, with no pattern and no replacement.
    expected = fill_template(template_type).rsplit("\n\n", 1)[0]
    pieces, rest = [], expected
    for name in names:
        before, rest = rest.split("{" + name + "}", 1)
        pieces += [before, values.get(name, "{" + name + "}")]
    expected = "".join([*pieces, rest])
    left = [name for name in names if name not in values]
    text = fill_template(template_type, values)
    if left:
        assert text == f"{expected.rstrip(chr(10))}\n\nStill to fill in: {', '.join(left)}"
    else:
        assert text == expected.rstrip("\n")


def test_schema_has_no_definitions() -> None:
    schema = template_generator.args_schema.model_json_schema()
    assert "$defs" not in schema
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["template_type"]
    assert schema["properties"]["template_type"]["enum"] == list(TYPES)
