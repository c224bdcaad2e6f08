"""All formats."""

from tests.formats import pairs, published, vectors
from tests.formats.format import FORMATS

__all__ = ["FORMATS", "pairs", "published", "vectors"]
