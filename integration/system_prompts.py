"""System prompts by name (`integration/prompts/NAME.md`), as text, or from a file."""

import difflib
import re
from pathlib import Path

from integration._cli import CommandError

PROMPTS_DIR = Path(__file__).parent / "prompts"


def list_prompts() -> list[str]:
    """Give the names that ``--system`` knows."""
    return sorted(path.stem for path in PROMPTS_DIR.glob("*.md"))


def load_system_prompt(value: str | None) -> str | None:
    """Resolve ``NAME``, ``@FILE`` or plain text; None stays None. Braces are text.

    Raises:
        CommandError: Exit 2; the file does not exist, or one word is close to a name but is none.
    """
    if value is None:
        return None
    if value.startswith("@"):
        path = Path(value[1:])
        if not path.is_file():
            raise CommandError(f"--system: file '{path}' does not exist; expected a text file")
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(
                f"--system: file '{path}' cannot be read ({error}); expected UTF-8 text"
            ) from error
    if value in list_prompts():
        return (PROMPTS_DIR / f"{value}.md").read_text(encoding="utf-8").strip()
    near = difflib.get_close_matches(value, list_prompts(), n=1, cutoff=0.7)
    if near and re.fullmatch(r"[\w-]+", value):
        raise CommandError(f"--system: no prompt is called '{value}', did you mean '{near[0]}'?")
    return value
