"""Write a document from a template: its type and the known fields in, text out.

Call it as `template_generator.invoke({"template_type": "email", "fields": {"subject": "Hi"}})`,
or `fill_template` from code. What is not given stays as `{name}` and is listed in the last line.
"""

import re
from typing import Annotated, Literal, get_args

from langchain_core.tools import ToolException, tool
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from tools._errors import answer_errors, unknown_name

__all__ = ["TemplateType", "fill_template", "list_fields", "template_generator"]

TemplateType = Literal[
    "prompt",
    "email",
    "report",
    "bug_report",
    "meeting_notes",
    "readme",
    "cover_letter",
    "release_notes",
    "user_story",
]

# Identifiers only, and never str.format: "{0.__class__}" is text like any other.
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")

_TEMPLATES: dict[TemplateType, str] = {
    "prompt": """\
### Instruction:
{instruction}

### Input:
{input}

### Response:
""",
    "email": """\
Subject: {subject}

Dear {recipient},

{body}

{next_step}

Best regards,
{sender}
""",
    "report": """\
# {title}

Author: {author}
Date: {date}

## Summary

{summary}

## Background

{background}

## Findings

{findings}

## Recommendations

{recommendations}
""",
    "bug_report": """\
# {title}

## Environment

{environment}

## Steps to reproduce

{steps}

## Expected behaviour

{expected}

## Actual behaviour

{actual}

## Logs

```
{logs}
```
""",
    "meeting_notes": """\
# {title}

Date: {date}
Attendees: {attendees}

## Agenda

{agenda}

## Decisions

{decisions}

## Action items

{action_items}

Next meeting: {next_meeting}
""",
    "readme": """\
# {project_name}

{description}

## Installation

```sh
{install_command}
```

## Usage

```sh
{usage_example}
```

## Contributing

{contributing}

## License

{license}
""",
    "cover_letter": """\
{date}

Dear {recipient},

I am applying for the position of {position} at {company}.

{experience}

{motivation}

I look forward to hearing from you.

Sincerely,
{sender}
""",
    "release_notes": """\
# {project_name} {version}

Released: {date}

{summary}

## Added

{added}

## Changed

{changed}

## Fixed

{fixed}

## Upgrading

{upgrade_steps}
""",
    "user_story": """\
# {title}

As {role}, I want {goal}, so that {benefit}.

## Acceptance criteria

{acceptance_criteria}

## Notes

{notes}
""",
}


def list_fields(template_type: TemplateType) -> list[str]:
    """List the fields of a template, in the order in which it shows them."""
    if template_type not in _TEMPLATES:
        raise ToolException(unknown_name("template_type", template_type, _TEMPLATES))
    return list(dict.fromkeys(_PLACEHOLDER.findall(_TEMPLATES[template_type])))


def fill_template(template_type: TemplateType, fields: dict[str, str] | None = None) -> str:
    """Fill the fields of a template in one pass: braces in a value stay text.

    Args:
        template_type: One of `TemplateType`.
        fields: Values by field name; an empty value removes the placeholder.

    Returns:
        The text; when fields are left, with a last line `Still to fill in: a, b`.

    Raises:
        ToolException: A type or field name is unknown; every unknown field is named.
    """
    names, values = list_fields(template_type), fields or {}
    if unknown := [name for name in values if name not in names]:
        problems = "; ".join(unknown_name("fields", name, names) for name in unknown[:3])
        more = f"; and {len(unknown) - 3} more unknown names" if len(unknown) > 3 else ""
        again = f"; call template_generator again with corrected fields for {template_type}"
        raise ToolException(problems + more + again)
    text = _PLACEHOLDER.sub(
        lambda found: values.get(found[1], found[0]), _TEMPLATES[template_type]
    ).rstrip("\n")
    missing = [name for name in names if name not in values]
    return f"{text}\n\nStill to fill in: {', '.join(missing)}" if missing else text


_FIELD_NAMES: list[JsonValue] = [
    *sorted({name for kind in _TEMPLATES for name in list_fields(kind)})
]
_FieldValue = Annotated[str, Field(max_length=10_000, json_schema_extra={"verbatim": True})]


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, title="template_generator")

    template_type: TemplateType = Field(description="The kind of document.")
    fields: dict[str, _FieldValue] | None = Field(
        None,
        max_length=20,
        description="Values to fill in, by field name.",
        # For a grammar only: a wrong name gets an error that knows the type's own fields.
        json_schema_extra={"propertyNames": {"enum": _FIELD_NAMES}},
    )


@tool(args_schema=_Arguments)
def template_generator(template_type: TemplateType, fields: dict[str, str] | None = None) -> str:
    """Get a document template. Use it when a template is wanted. Example: template_type="email"."""
    return fill_template(template_type, fields)


answer_errors(template_generator, _Arguments)
assert list(_TEMPLATES) == list(get_args(TemplateType))
