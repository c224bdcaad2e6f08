"""`python -m tests.formats [WORDS]`: measure every format (whose name has WORDS) and write docs/formats.md (only if all)."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from tests.formats.formats import FORMATS
from tests.formats.measure import READERS, TOLERANCE, equal, measured

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
HEAD = """# Formats that are read

Directories of {count} formats with tiny random weights, each read by this program and by its reference: the installed
sentence-transformers, or the code on the model's card. `python -m tests.formats` writes this page.

The numbers are the largest difference of 17 texts, relative to the largest value (or to 1 where that is smaller), in float32.
Among the texts are empty ones, several lines, other scripts, and texts longer than every limit. Up to {tolerance} is equal.
`refused`: one line says why, and the command ends with status 2. `-`: a model of that kind is not read there.

| format | written by | teacher | student | encode | evaluate |
|---|---|---|---|---|---|
"""


def main(words: str) -> int:
    """Measure, print, and write the page; 1 where a format is read otherwise than by its reference."""
    disable_progress_bar()
    set_verbosity_error()
    rows, wrong = [], 0
    for name, form in FORMATS.items():
        if words not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = measured(form, Path(folder) / "m")
            except Exception:
                found = dict.fromkeys(READERS, "FAILED")
                print(traceback.format_exc().strip().splitlines()[-1])
        wrong += not all(equal(value) for value in found.values()) or "FAILED" in found.values()
        cells = [value if isinstance(value, str) else f"{value:.1e}" for value in (found[reader] for reader in READERS)]
        rows.append(f"| {name} | {form.source} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    if not words and not wrong:
        PAGE.write_text(HEAD.format(count=len(rows), tolerance=TOLERANCE) + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} formats, {wrong} not equal")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
