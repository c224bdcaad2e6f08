"""`teach` of a served teacher: every answer that training may need is asked for before it begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lead_ds.data.groups.open import open_groups
from lead_ds.engine.distributed.agreement import agreed, check_agreement
from lead_ds.engine.distributed.ranks import Ranks, closed_to_others
from lead_ds.engine.distributed.watchdog import waiting_ranks
from lead_ds.io.progress import progress
from lead_ds.settings.run import Run
from lead_ds.teachers.cached import epochs_of
from lead_ds.teachers.reading import GroupTexts
from lead_ds.teachers.served import ServedLookup, ServedTeacher
from lead_ds.teachers.teacher import Lesson

_AT_ONCE = 64  # groups


def ask_ahead(config: Run, epochs: int | None = None, quiet: bool = False) -> tuple[int, Path]:
    """Have every text of the training groups answered; how many answers are kept, and where. Every process calls this.

    epochs: whose random negatives are asked for, where groups list too few. Raises InputError and RunError as
    `lead_ds.teachers.served_client.Client.ask`; what was answered until then is kept.
    """
    with waiting_ranks() as ranks, closed_to_others():
        check_agreement(config, False, ranks)
        return agreed(ranks, lambda: _ask(config, epochs, quiet, ranks))


def _ask(config: Run, epochs: int | None, quiet: bool, ranks: Ranks) -> tuple[int, Path]:
    groups = open_groups(config.data)
    lookup = ServedTeacher.reads(Lesson.of(config), groups, ranks).lookup
    assert isinstance(lookup, ServedLookup)
    draws = {"seed": config.seed, "epochs": epochs or epochs_of(config.train, groups, config.seed, ranks)}
    rows = range(len(groups))[ranks.rank :: ranks.world]
    with progress("asking", len(rows), "groups", shown=ranks.main and not quiet) as meter:
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            if groups.alone:
                lookup.read(np.array(some), [groups.draw(row, config.seed, 0) for row in some])
                meter.advance(len(some))
                continue
            texts = GroupTexts.read(groups, some, config.data.negatives, draws)
            owners = texts.owners.tolist()
            pairs = [(texts.queries[owner], text) for owner, text in zip(owners, texts.passages, strict=True)]
            lookup.asked(lookup.questions(texts.queries, pairs))
            meter.advance(len(some))
    return len(lookup.answers), lookup.answers.folder
