"""Numbers and texts as a report shows them: one rounding for each kind, and nothing invisible."""

import math
from collections.abc import Sequence
from typing import Any

from scripts.report_blocks import UNKNOWN, Cell

_SPACE = "\N{NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# What cannot be written as UTF-8 or is no character is replaced; what is invisible but acts
# (control characters, marks that turn the direction of writing) is shown by a picture or its number.
_CLEAN: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], _REPLACEMENT),
    **{
        code: f"⟨U+{code:04X}⟩"
        for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    },
}


def clean(value: Any) -> Any:
    """Make every text of a JSON value safe to write and to look at."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").translate(_CLEAN)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value


def decimal(value: float | None, digits: int) -> str:
    """Write a number, such as ``2.51``."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞"
    return f"{value:,.{digits}f}".replace("-", _MINUS)


def signed(value: float, digits: int) -> str:
    """Write a change, such as ``+0.22``."""
    return ("+" if value > 0 else "") + decimal(value, digits)


def significant(value: float | None) -> str:
    """Write a number that may be tiny: three significant digits, or a power of ten."""
    if value is None or not math.isfinite(value):
        return decimal(value, 0)
    if value == 0 or abs(value) >= 1e-4:
        digits = 2 - math.floor(math.log10(abs(value))) if value else 0
        return decimal(value, max(0, min(digits, 6)))
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(_SUPERSCRIPTS)
    return f"{mantissa}{_SPACE}×{_SPACE}10{power}".replace("-", _MINUS)


def interval(ends: Sequence[float] | None, digits: int) -> str:
    """Write an interval, such as ``2.60–2.86``, or with ``to`` where a minus is in it."""
    if ends is None:
        return ""
    low, high = (decimal(end, digits) for end in ends)
    return f"{low} to {high}" if _MINUS in low + high else f"{low}–{high}"


def count(value: int | None) -> str:
    """Write a whole number, such as ``71,524``."""
    return UNKNOWN if value is None else f"{value:,}".replace("-", _MINUS)


def plural(value: int, noun: str) -> str:
    """Write a number of things, such as ``1 row``."""
    return f"{count(value)}{_SPACE}{noun}{'' if value == 1 else 's'}"


def size(value: float | None) -> str:
    """Write bytes, such as ``144.8 MB``, in powers of ten."""
    if value is None:
        return UNKNOWN
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # 999,950 kB would be shown as 1000.0 kB.
        if value >= 0.99995 * scale:
            return f"{value / scale:.{2 if unit == 'GB' else 1}f}{_SPACE}{unit}"
    return f"{value:.0f}{_SPACE}B"


def duration(seconds: float | None) -> str:
    """Write a time, such as ``12 min 25 s``."""
    if seconds is None:
        return UNKNOWN
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}{_SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{_SPACE}min {whole % 60:02}{_SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,}{_SPACE}h {minutes % 60:02}{_SPACE}min"


def p_value(value: float | None) -> str:
    """Write a p-value with its sign, such as ``= 0.39`` or ``< 0.001``."""
    if value is None:
        return f"= {UNKNOWN}"
    if value < 0.001:
        return "< 0.001"
    return f"= {value:.3f}" if value < 0.1 else f"= {value:.2f}"


def percent(value: float | None) -> str:
    """Write a share, such as ``93.3 %``."""
    return UNKNOWN if value is None else f"{100 * value:.1f}{_SPACE}%"


def share_cell(share: dict[str, Any] | None, loosely: dict[str, Any] | None = None) -> Cell:
    """Show a share with its 95 % interval, and how much it is when judged loosely."""
    if share is None or share["share"] is None:
        return Cell(UNKNOWN)
    low, high = share["interval_95"]
    text = percent(share["share"])
    if loosely is not None and loosely["share"] is not None:
        text += f" ({100 * loosely['share']:.1f})"
    return Cell(text, f"{100 * low:.1f}–{100 * high:.1f}")
