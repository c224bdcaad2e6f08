"""All formats."""

from tests.formats import pairs, vectors
from tests.formats.format import FORMATS

__all__ = ["FORMATS", "pairs", "vectors"]
