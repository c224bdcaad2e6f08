"""What is fitted in closed form before the first step, on a sample of both models' vectors, and kept beside the checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lead_ds.config import Config
from lead_ds.config.facts import fed
from lead_ds.data.batches import Batches, Window
from lead_ds.engine.distributed.agreement import agreed
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.training.objective import final_of, said
from lead_ds.errors import InputError
from lead_ds.io.files import atomic
from lead_ds.losses.embedding import begin_map
from lead_ds.losses.loss import ModelFacts
from lead_ds.losses.mixture import concatenated
from lead_ds.losses.objective import Objective, Taught, Term, terms_of
from lead_ds.losses.vectors import Moments
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.scorer import Scorer
from lead_ds.relevance import Features, VectorFeatures
from lead_ds.teachers.teacher import Teacher

FITTED = "fitted.safetensors"

Reads = Callable[[Window], Features]
"""What a term's teacher gives for a window's texts."""


def read_by(term: Term, taught: Sequence[Teacher | Scorer], ranks: Ranks) -> Reads:
    """The final features that a term compares the student's with: of a teacher, trained or not, or of several as one."""

    def of(place: int, window: Window) -> Features:
        return final_of(taught[place], window.teachers[place], ranks.device)

    if term.how == "alone":
        return lambda window: of(term.teachers[0], window)
    return lambda window: concatenated([of(place, window) for place in term.teachers], term.shares)


def keep_map(config: Config, student: Kind, taught: Sequence[Teacher | Scorer], batches: Batches, ranks: Ranks) -> None:
    """Give the student a linear map as its last layer, where a loss keeps one. Every rank calls this.

    It leads into the teacher's space, or onto the main directions of the teacher's vectors.

    Raises InputError where there are no vectors to map, and for several teachers whose vectors are not concatenated.
    """
    section = config.losses.kept
    if section is None or not taught:
        return
    facts = [
        Taught(ModelFacts(one.kind, 0), fed(config, one), getattr(one, "weight", 1.0)) for one in config.taught.values()
    ]
    terms = terms_of(config.losses, facts, config.mix.relevance, config.mix.vectors)
    term, *others = (term for term in terms if term.loss == "embedding")
    if others:
        what, remedy = (
            "keeps one map, and several teachers feed the loss",
            "set mix.vectors: concatenate, or keep: false",
        )
        raise InputError("losses.embedding.keep", what, remedy)
    reads = read_by(term, taught, ranks)
    window = batches.window(0)
    widths = said(student, window.student[0].to(ranks.device)).width, reads(window).width
    if widths[0] is None or widths[1] is None:
        who = "student" if widths[0] is None else "teacher"
        raise InputError("losses.embedding.keep", f"maps vectors, and the {who} gives scores", "set it to false")
    torch.manual_seed(config.seed + 2)
    weight_TS = begin_map(widths[0], widths[1])
    if section.into == "pca":
        sums = moments(student, reads, batches, ranks, section.sample)
        turned_ST = sums.directions(widths[0]).T
        if section.start == "orthogonal" and widths[0] != widths[1]:
            what = f"orthogonal: the student's vectors have {widths[0]} dimensions, the teacher's {widths[1]}"
            raise InputError("losses.embedding.start", what, "set it to ridge")
        weight_TS = turned_ST if section.start == "orthogonal" else turned_ST @ sums.ridge()
    elif section.start == "ridge":
        weight_TS = moments(student, reads, batches, ranks, section.sample).ridge()
    agreed(ranks, lambda: student.project(weight_TS))


def fit(
    objective: Objective,
    student: Kind,
    taught: Sequence[Teacher | Scorer],
    batches: Batches,
    ranks: Ranks,
    resumed: Path | None,
) -> dict[str, str]:
    """Fit the losses that begin from a sample; what they keep, by name, with its checksum. Every rank calls this.

    resumed: the folder of a run that goes on, whose own fit is read. Raises InputError where that is damaged.
    """
    wanted = {term.key: loss.sample for term, loss in objective.losses() if loss.sample}
    if not wanted or not taught:
        return {}
    if resumed is not None and ranks.from_main((resumed / FITTED).exists()):
        agreed(ranks, lambda: load_fitted(objective, resumed / FITTED))
    else:
        known: dict[tuple[int, ...], Moments] = {}  # by the teachers that a term reads
        for term, loss in objective.losses():
            if term.key in wanted:
                of = tuple(term.teachers)
                if of not in known:
                    reads = read_by(term, taught, ranks)
                    known[of] = moments(student, reads, batches, ranks, max(wanted.values()))
                loss.fit(known[of])
    return {f"fitted: {name}": _checksum(x) for name, x in fitted(objective).items()}


def fitted(objective: Objective) -> dict[str, Tensor]:
    """What the losses keep of a fit, by name: buffers that are in no checkpoint."""
    kept = objective.state_dict().keys()
    return {name: x.detach().cpu().contiguous() for name, x in objective.named_buffers() if name not in kept}


def save_fitted(objective: Objective | None, folder: Path) -> None:
    """Write what the losses keep of a fit to a run's folder, with its checksum; nothing where they keep none."""
    tensors = fitted(objective) if objective is not None else {}
    if not tensors:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / FITTED) as temporary:
        save_file(tensors, str(temporary), metadata={name: _checksum(x) for name, x in tensors.items()})


def load_fitted(objective: Objective, path: Path) -> None:
    """Put what `save_fitted` wrote into the losses. Raises InputError for a file that is damaged, or of other losses."""
    from safetensors import SafetensorError, safe_open

    remedy = "bring it back, or set output= to another folder for a new run"
    try:
        tensors = load_file(str(path))
        with safe_open(str(path), "pt") as file:
            sums = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(path, f"cannot be read: {error}", remedy) from None
    buffers = {name: x for name, x in objective.named_buffers() if name in fitted(objective)}
    for name, buffer in buffers.items():
        found = tensors.get(name)
        if found is None or found.shape != buffer.shape or sums.get(name) != _checksum(found):
            raise InputError(path, f"does not hold {name} as it was written", remedy)
        buffer.copy_(found)


def first_windows(batches: Batches, ranks: Ranks, texts: int) -> Iterator[Window]:
    """The run's first windows, with at least `texts` texts over all processes, or one epoch's."""
    step = ranks.world * batches.batch_size * batches.accumulation * (1 + batches.group_size)
    return map(batches.window, range(min(-(-texts // step), batches.steps_per_epoch)))


def moments(student: Kind, reads: Reads, batches: Batches, ranks: Ranks, texts: int) -> Moments:
    """Of the vectors that both models give for at least `texts` texts of the run's first windows, or one epoch's.

    Equal on every process, and but for rounding whatever their number: all of them read the same windows' shares.
    """
    total: Moments | None = None
    for window in first_windows(batches, ranks, texts):
        own = final_of(student, window.student, ranks.device)
        student_BD, teacher_BD = _texts(own, "student"), _texts(reads(window), "teacher")
        # A student may read queries alone, which come first.
        part = Moments.of(student_BD, teacher_BD[: len(student_BD)])
        total = part if total is None else total + part
    assert total is not None
    parts = ranks.all((total.tt.numpy(), total.ts.numpy(), total.ss.numpy()))
    return Moments(*(torch.from_numpy(sum(arrays)) for arrays in zip(*parts, strict=True)))  # type: ignore[call-overload]


def _texts(features: Features, who: str) -> Tensor:
    """[B, D]: vectors of queries, then of passages."""
    if not isinstance(features, VectorFeatures):
        what = f"compares vectors of texts, and the {who} gives none"
        raise InputError("losses.embedding", what, "set its weight to 0, or name a model of vectors")
    return torch.cat([features.q_KQD[-1], features.p_KPD[-1]])


def _checksum(x: Tensor) -> str:
    return hashlib.blake2b(x.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
