"""What a continued run starts from: the newest checkpoint, if what the run computes is what it computed before."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lead_ds.config import Config
from lead_ds.data.batches import Batches
from lead_ds.data.groups.group import Groups
from lead_ds.data.tokens.tokenizer import tokenizer_checksum
from lead_ds.engine.distributed.agreement import agreed, summary
from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.records.checkpoint import Checkpoints
from lead_ds.engine.training.evaluation import Evaluator, Evaluators
from lead_ds.errors import InputError
from lead_ds.io.facts import differing, flat
from lead_ds.io.files import model_files
from lead_ds.models.own import OwnText
from lead_ds.settings.meaning import keys_of
from lead_ds.settings.train import TrainConfig
from lead_ds.teachers.identity import input_facts
from lead_ds.teachers.open import teacher_class
from lead_ds.teachers.teacher import Teacher

DECIDING = ("optimizer", "fp16", "bf16", "data_types", "prescale_gradients", "gradient_predivide_factor")
LATER = (
    ("tokenizer: ", "deepspeed: "),
    ("student: ",),
    ("evaluation: ",),
    ("address: ",),
)  # facts that older checkpoints do not have, those that came at once


Found = tuple[Path, dict[str, Any]]
"""A checkpoint and its state."""


def newest(checkpoints: Checkpoints) -> Found | None:
    """The newest good checkpoint; None where the run was ended before its first."""
    return checkpoints.newest(tell=lambda text: print(text, file=sys.stderr, flush=True))


def load_state(
    config: Config, checkpoints: Checkpoints, found: Found | None, engine: Any, ranks: Ranks
) -> dict[str, Any]:
    """Load the checkpoint that was found; its state, or {} where there is none."""
    if found is None:
        return {}
    path, state = found
    old, processes = Config.model_validate(state["config"]), state["processes"]
    changed = changed_keys(old, config)
    before, now = groups_per_step(old.train, processes), groups_per_step(config.train, ranks.world)
    if before == now:
        changed = [key for key in changed if key not in ("train.batch_size", "train.accumulation")]
    if changed:
        raise InputError(
            path,
            f"was written with another configuration: {', '.join(changed)} changed",
            "resume with the configuration that is in the run's folder, config.yaml",
        )
    if before != now:
        raise InputError(
            path,
            f"was written by {processes} processes, this run has {ranks.world}, and a step would take {now} groups instead "
            f"of {before}",
            "set train.batch_size or train.accumulation so that their product with the processes stays the same",
        )
    together = processes * old.train.batch_size, ranks.world * config.train.batch_size
    if config.data.batches == "apart" and together[0] != together[1]:
        what = f"was written by micro-batches of {together[0]} groups of one set, over all processes; now they have {together[1]}"
        raise InputError(path, what, "set train.batch_size so that its product with the processes stays the same")
    if ranks.main and compared(old.train, processes) != compared(config.train, ranks.world):
        print(f"{path.name}: a query is now compared with other in-batch passages than before", file=sys.stderr)
    checkpoints.load(engine, path)
    return state


def reading_facts(batches: Batches) -> dict[str, str]:
    """What the tokenizers do that make tokens of the texts; the weights of a teacher that is a module from Python."""
    models = {"student": batches.student, **batches.teachers}
    encoders = {name: model.encoder for name, model in models.items()}
    found: dict[str, str] = {}
    for name, encoder in encoders.items():
        if isinstance(encoder, OwnText):
            found |= {} if encoder.weights is None else {f"{name}: weights": encoder.weights}
        elif encoder is not None:
            found[f"tokenizer: {name}"] = tokenizer_checksum(encoder.tokenizer)
    return found


def deepspeed_facts(file: str | dict[str, Any]) -> dict[str, str]:
    """What the student's DeepSpeed file decides of the result, such as its optimizer, wherever it lies; how it shards
    is free."""
    tree = read_deepspeed_config(file)
    return {f"deepspeed: {name}": json.dumps(part, sort_keys=True) for name, part in tree.items() if name in DECIDING}


def student_facts(path: str) -> dict[str, str]:
    """The files that the student began with: how it pools and reads, and what LoRA's updates belong to."""
    folder = Path(path)
    if not folder.is_dir():
        return {}
    found = {f"student: {name}": summary(file) for name, file in model_files(folder).items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def evaluation_facts(evaluator: Evaluator | Evaluators | None, groups: Groups) -> dict[str, str]:
    """The files that decide which step is the best, and when to stop early, without those that are trained on, too."""
    files, known = {} if evaluator is None else evaluator.files, {*groups.sources.values()}
    found = {f"evaluation: {name}": summary(path) for name, path in files.items() if path not in known}
    return {name: digest for name, digest in found.items() if digest is not None} or {"evaluation: qrels": "none"}


def groups_per_step(train: TrainConfig, processes: int) -> int:
    """Groups that an optimizer step takes, over all processes."""
    return processes * train.batch_size * train.accumulation


def compared(train: TrainConfig, processes: int) -> int:
    """Queries whose passages are compared with each other: the micro-batches of all processes, or of one."""
    return train.batch_size * (processes if train.in_batch == "global" else 1)


def changed_keys(old: Config, new: Config) -> list[str]:
    """The dotted keys in which two configurations differ, of those that decide what a run computes, bit for bit.

    What may differ is where things are, whose content is compared (`check_inputs`), and how fast the same is computed.
    """
    free = keys_of(old, "place", "pace") | keys_of(new, "place", "pace")
    one, other = (dict(flat(config.model_dump(mode="json"), free=free)) for config in (old, new))
    return [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]


def lens_facts(teachers: Mapping[str, Teacher]) -> dict[str, str]:
    """The checksum of each teacher's tuned lens; none where its layers are read through its own head."""
    tuned = {key: teacher.lens_facts for key, teacher in teachers.items()}
    return {f"{key}: lens": str(facts["checksum"]) for key, facts in tuned.items() if facts is not None}


def check_inputs(
    config: Config,
    state: dict[str, Any],
    batches: Batches,
    ranks: Ranks,
    fits: dict[str, str] | None = None,
    accepted: Sequence[str] = (),
) -> None:
    """Refuse to go on with other files than a checkpoint was trained on: texts, models, tokenizers, DeepSpeed's settings.

    fits: what was fitted before the first step, tuned lenses, and what is evaluated on, by checksum. `state` keeps what they
    are; one of before some of them were kept does not have those. accepted: names of what may have changed, as they are
    refused, or a part of one between its colons; `state` keeps what each was and is. Raises InputError for a name of what
    has not changed, too.
    """
    taught = config.taught if config.losses.needs_teacher else {}
    files = {
        f"{key}: {name}": path
        for key, settings in taught.items()
        for name, path in teacher_class(settings.kind).files(settings).items()
    }

    asked = {f"address: {key}": teacher_class(settings.kind).address(settings) for key, settings in taught.items()}
    addresses = {name: address for name, address in asked.items() if address is not None}

    def facts() -> dict[str, str]:
        known = input_facts(batches.groups, files) | addresses | reading_facts(batches) | (fits or {})
        return known | deepspeed_facts(config.deepspeed.student) | student_facts(config.student.path)

    now = agreed(ranks, lambda: facts() if ranks.main else {})
    before = state.get("inputs") or now
    lenses = state.get("lens") or []  # as an earlier version kept them; before that, of one teacher
    for key, lens in zip(taught, lenses if isinstance(lenses, list) else [lenses], strict=False):
        before = before if lens is None else {**before, f"{key}: lens": lens}
    for later in LATER:
        if not any(name.startswith(later) for name in before):
            before = before | {name: fact for name, fact in now.items() if name.startswith(later)}
    changed = agreed(ranks, lambda: differing(before, now) if ranks.main else [])
    changed = ranks.from_main(changed)
    for name in accepted:
        if not any(name in parts_of(fact) for fact in changed):
            what = f"{name} has not changed since the last checkpoint"
            raise InputError(
                "--accept-changed", what, f"name one of: {', '.join(changed)}" if changed else "take it out"
            )
    if refused := [fact for fact in changed if not parts_of(fact) & {*accepted}]:
        raise InputError(
            config.output,
            f"was trained on files that have changed: {', '.join(refused[:5])}",
            "bring them back, go on with them as they are (--accept-changed NAME), or set output= to another folder",
        )
    state["inputs"] = {**before, **now} if changed else before
    noted = [
        {"name": fact, "was": before.get(fact), "is": now.get(fact), "step": state.get("step", 0)} for fact in changed
    ]
    state["accepted"] = [*state.get("accepted", []), *noted]


def parts_of(fact: str) -> set[str]:
    """The names that an input goes by: `data: train` is that, data and train; a file of its folder is its folder's."""
    return {fact, *(part for name in fact.split(": ") for part in (name, name.rpartition("/")[2]))}
