"""What a JSON schema leaves to choose from, in the few words that a prompt or an error has for it."""

from typing import Any


def list_choices(schema: Any) -> list[str]:
    """List the values that a schema accepts, or nothing when they cannot be counted out.

    A whole family of values, such as every `max_words:N`, is one choice: its schema says how to
    write it in our own keyword `shown_as`. An array has the choices of its items, and an
    alternative of null none.
    """
    if not isinstance(schema, dict):
        return []
    if isinstance(schema.get("shown_as"), str):
        return [schema["shown_as"]]
    if isinstance(schema.get("enum"), list):
        return [str(choice) for choice in schema["enum"]]
    variants = schema.get("anyOf")
    if not isinstance(variants, list):
        return list_choices(schema.get("items"))
    found = [list_choices(variant) for variant in variants if variant != {"type": "null"}]
    # One open alternative is enough: the others alone would say that nothing else is allowed.
    return [choice for choices in found for choice in choices] if all(found) else []
