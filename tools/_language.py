"""Which language a text is in: py3langid's model, cut down to the languages on offer."""

from functools import cache
from typing import Any

# ISO 639-1 codes. Fewer languages than the model knows: a short text is told apart from 27 others
# far better than from 138, most of which no user writes.
LANGUAGES = {
    "ar": "Arabic",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
# Below it, an answer for two short words is wrong about as often as right.
_MIN_CONFIDENCE = 0.25
# Enough for certainty; putting combining marks in order takes quadratic time in the longest run.
_MAX_CHARACTERS = 5_000


def detect_language(text: str) -> str | None:
    """Give the most likely code of `LANGUAGES`; None for too little text, numbers or code."""
    code, confidence = _load_identifier().classify(text[:_MAX_CHARACTERS])
    return code if code in LANGUAGES and confidence >= _MIN_CONFIDENCE else None


@cache
def _load_identifier() -> Any:
    """Load the model on first use: it takes half a second and 60 MB."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    known = LanguageIdentifier.from_model_file(MODEL_FILE)
    known.set_languages([*LANGUAGES, "zxx"])  # zxx: no language, such as numbers and markup
    # A second one without the weights of all other languages, which the first keeps.
    return LanguageIdentifier(
        known.nb_ptc,
        known.nb_pc,
        known.nb_classes,
        known.tk_nextmove,
        known.tk_output,
        norm_probs=True,
        tk_row=known.tk_row,
    )
