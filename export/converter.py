"""Where llama.cpp's converters are: scripts/setup.sh takes them from llama-cpp-python's archive."""

import os
import sys
from pathlib import Path

from export._cli import FAILED, CommandError


def find_converter(script: str = "convert_hf_to_gguf.py") -> Path:
    """Locate one of llama.cpp's converters: `LLAMA_CPP_DIR`, else what scripts/setup.sh installed.

    Raises:
        CommandError: Exit 1: it is in neither place.
    """
    named = os.environ.get("LLAMA_CPP_DIR")
    folder = Path(named) if named else Path(sys.prefix) / "share/llama.cpp"
    if not (folder / script).is_file():
        raise CommandError(
            f"llama.cpp's {script} is not in '{folder}'"
            + (" (LLAMA_CPP_DIR)" if named else "; install it: scripts/setup.sh"),
            FAILED,
        )
    return folder / script
