"""Token groups that two tokenizers share: stretches of text at whose ends both of them end a token.

Attention maps of differently tokenised text are comparable only after summing probabilities over the keys of a group
and averaging over its query rows. Then rows stay distributions, and splitting a token moves no mass.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, takewhile

Offsets = Sequence[tuple[int, int]]

UNGROUPED = -1


def token_groups(
    text: str, teacher: Offsets, student: Offsets, *, teacher_start: int = 0, student_start: int = 0
) -> tuple[list[int], list[int]]:
    """The group of every teacher token and of every student token of one text; equal numbers are compared.

    teacher, student: character spans of the real tokens, no padding, as a fast tokenizer gives them; special tokens
    have empty spans. *_start: where `text` begins in what was tokenised (behind a prompt). Groups number from 0:
    special tokens before the text, those after it, then stretches of text. A token without counterpart has -1: one of a
    prompt, pure white space, an unmatched special token, or behind the point where either model cut the text.
    """
    # Positions count non-space characters only: tokenizers disagree about which token owns a space.
    position = [0, *accumulate(not character.isspace() for character in text)]
    spans = [_spans(teacher, teacher_start, position), _spans(student, student_start, position)]
    edges = [{edge for span in side if span for edge in span} for side in spans]
    common = sorted(edges[0] & edges[1])
    before = [_specials(teacher), _specials(student)]
    after = [_specials(reversed(side[skip:])) for side, skip in zip((teacher, student), before, strict=True)]

    groups: list[list[int]] = []
    for side in spans:
        found = [UNGROUPED] * len(side)
        for index in range(min(before)):
            found[index] = index
        for index in range(min(after)):
            found[len(side) - 1 - index] = min(before) + index
        for index, span in enumerate(side):
            if span and common and common[0] <= span[0] and span[1] <= common[-1]:
                found[index] = min(before) + min(after) + bisect_right(common, span[0]) - 1
        groups.append(found)
    # A character that one tokenizer drops leaves it a stretch without tokens: nothing to compare there.
    shared = sorted((set(groups[0]) & set(groups[1])) - {UNGROUPED})
    number = {group: index for index, group in enumerate(shared)}
    return [number.get(group, UNGROUPED) for group in groups[0]], [number.get(group, UNGROUPED) for group in groups[1]]


def _specials(offsets: Iterable[tuple[int, int]]) -> int:
    """How many tokens with empty spans come first."""
    return sum(1 for _ in takewhile(lambda span: span[0] == span[1], offsets))


def _spans(offsets: Offsets, start: int, position: list[int]) -> list[tuple[int, int] | None]:
    """Each token's span in non-space characters of the text; None outside the text and for nothing but space."""
    spans: list[tuple[int, int] | None] = []
    for first, last in offsets:
        if first < start or last - start >= len(position):
            spans.append(None)
            continue
        begin, end = position[first - start], position[last - start]
        spans.append((begin, end) if begin < end else None)
    return spans
