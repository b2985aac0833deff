"""System prompts by name, as text, or from a file.

A name is a file's: one of `integration/prompts/NAME.md`, or the user's own `NAME.md` or `NAME.txt` in
``$TOMEFORGE_PROMPTS`` (default: ``~/.config/tomeforge/prompts``).
"""

import difflib
import os
import re
from pathlib import Path

from integration._cli import CommandError, log

PROMPTS_DIR = Path(__file__).parent / "prompts"
MAX_BYTES = 100_000
_noted: set[Path] = set()


def user_prompts_dir() -> Path:
    """Give the folder of the user's own prompts, which need not be there."""
    if named := os.environ.get("TOMEFORGE_PROMPTS"):
        return Path(named)
    config = os.environ.get("XDG_CONFIG_HOME", "")
    # A relative path is to be ignored, says the specification. An unknown home is a missing folder.
    base = config if Path(config).is_absolute() else os.path.expanduser("~/.config")
    return Path(base, "tomeforge", "prompts")


def _find_prompts() -> dict[str, list[Path]]:
    """Find the files of every name; the first one counts: the user's before ours, .md before .txt."""
    found: dict[str, list[Path]] = {}
    user = user_prompts_dir()
    for folder, pattern in ((user, "*.md"), (user, "*.txt"), (PROMPTS_DIR, "*.md")):
        for path in sorted(folder.glob(pattern)):
            # What begins with a dot is an editor's or a system's.
            if path.is_file() and not path.name.startswith("."):
                found.setdefault(path.stem, []).append(path)
    return found


def list_prompts() -> list[str]:
    """Give the names that ``--system`` knows."""
    return sorted(_find_prompts())


def load_system_prompt(value: str | None) -> str | None:
    """Resolve ``NAME``, ``@FILE`` or plain text; None stays None. Braces are text.

    Raises:
        CommandError: Exit 2; the file does not exist or is no prompt, or one word is close to a name
            but is none.
    """
    if value is None:
        return None
    if value.startswith("@"):
        path = Path(value[1:])
        if not path.is_file():
            raise CommandError(f"--system: file '{path}' does not exist; expected a text file")
        return _read(path)
    prompts = _find_prompts()
    if value in prompts:
        return _load_named(*prompts[value])
    near = difflib.get_close_matches(value, prompts, n=1, cutoff=0.7)
    if near and re.fullmatch(r"[\w-]+", value):
        raise CommandError(f"--system: no prompt is called '{value}', did you mean '{near[0]}'?")
    return value


def _load_named(path: Path, *others: Path) -> str:
    if others and path not in _noted:
        _noted.add(path)
        log(f"note: --system {path.stem} is '{path}', not {', '.join(map(str, others))}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise CommandError(
            f"--system: file '{path}' has {size} bytes; expected a prompt of at most {MAX_BYTES}"
        )
    text = _read(path)
    if not text:
        raise CommandError(f"--system: file '{path}' is empty; write the prompt into it")
    return text


def _read(path: Path) -> str:
    try:
        # An editor may have written a byte order mark, which is no part of the prompt.
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(
            f"--system: file '{path}' cannot be read ({error}); expected UTF-8 text"
        ) from error
