"""Which label of a classifier means that a passage is relevant.

Dimensions: K selected layers, B pairs.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lead_ds.errors import InputError

# Names that datasets and models give their labels, in letters and digits alone.
_FOR = {
    *("relevant", "isrelevant", "relevance", "highlyrelevant", "perfectlyrelevant", "related", "similar", "equivalent"),
    *("match", "positive", "entailment", "entails", "yes", "true", "1", "duplicate", "isduplicate", "paraphrase"),
}
_AGAINST = {
    *(
        "irrelevant",
        "notrelevant",
        "nonrelevant",
        "unrelated",
        "notrelated",
        "dissimilar",
        "notequivalent",
        "different",
    ),
    *("nomatch", "notmatch", "unmatched", "mismatch", "negative", "contradiction", "neutral", "notentailment"),
    *("noentailment", "no", "false", "0", "notduplicate", "notparaphrase"),
}


def relevant_label(shape: Any, given: int | str | None, path: str) -> int:
    """The number of the label that means relevant: the one that is set, else the one that id2label names so.

    Of two labels without a name (LABEL_0, LABEL_1) it is the last. Raises InputError where that is not clear.
    """
    count = int(shape.num_labels)
    names = [str(shape.id2label.get(i, f"LABEL_{i}")) for i in range(count)]
    listed = ", ".join(f"{i}: {name}" for i, name in enumerate(names))
    if given is not None:
        found = [i for i, name in enumerate(names) if given in (i, str(i), name)]
        named = [i for i in found if names[i] == given] or found
        if len(named) != 1:
            raise InputError("relevant_label", f"{given!r} is no label of {path}", f"its labels are {listed}")
        return named[0]
    plain = [_plain(name) for name in names]
    meant = [i for i, name in enumerate(plain) if name in _FOR]
    left = [i for i, name in enumerate(plain) if name not in _AGAINST]
    if count == 1 and left:
        return 0
    if count == 2 and plain == ["label0", "label1"]:
        return 1
    if len(meant) != 1 and count == 2 and len(left) == 1:
        meant = left
    if len(meant) == 1:
        return meant[0]
    raise InputError(
        path, f"which of its labels means relevant is not clear: {listed}", "set relevant_label to one of them"
    )


def relevance_logit(logits: Tensor, relevant: int) -> Tensor:
    """[..., labels] -> [...]: the logit of one label; of several, the log-odds of the relevant one."""
    if logits.shape[-1] == 1:
        return logits[..., 0]
    others = [i for i in range(logits.shape[-1]) if i != relevant]
    return logits[..., relevant] - torch.logsumexp(logits[..., others], -1)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
