"""The model card of a trained model: what it is, how to use it, and the run's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lead_ds.config import Config
from lead_ds.engine.training.averaging import RECORD as AVERAGE
from lead_ds.io.json_text import parse_json
from lead_ds.models.card import front_matter
from lead_ds.models.kinds.kind import KINDS
from lead_ds.settings.train import EvaluationConfig


def model_card(config: Config, run: Path) -> str:
    """README.md of a model's directory, from the run's folder (run.json, metrics.jsonl as far as they are there)."""
    student, teachers = config.student, list(config.taught.values())
    distilled = bool(teachers) and config.losses.needs_teacher
    kind, base = KINDS[student.kind], Path(student.path).name
    use = kind.use
    title = (
        f"A {'sparse' if kind.sparse else 'dense'}-retrieval student of `{base}`"
        if kind.gives_vectors
        else f"`{base}` as a {use.name}"
    )
    if not distilled:
        title = f"`{base}`, a {use.name} trained on labels"
    lines = [*front_matter(use, *(["knowledge-distillation"] if distilled else [])), f"# {title}", ""]
    if distilled:
        how = ", layer by layer" if config.losses.needs & {"layers", "attention"} else ""
        sources = [read_as(teacher, place, run) for place, teacher in enumerate(teachers)]
        lines += [f"Distilled by lead-ds from {' and '.join(sources)}{how}.", ""]
    else:
        in_group = KINDS[student.kind].reads_pairs or config.losses.contrastive.scope == "group"
        over = "its own passages" if in_group else "every passage of the batch"
        temperature = config.losses.contrastive.temperature
        lines += [
            f"Trained by lead-ds on labels alone: the positive's likelihood among {over}, at temperature {temperature:g}"
            f"{'' if temperature == 1 else f' (as a teacher: teacher_temperature: {temperature:g})'}.",
            "",
        ]
    lines += ["```python", use.example, "```", "", kind.reads(student), ""]
    evaluations = [row for row in _rows(run / "metrics.jsonl") if "evaluation" in row]
    if evaluations:
        names = list(evaluations[-1]["evaluation"])
        lines += [f"## Evaluation on the {config.evaluation.split} split", ""]
        if not kind.gives_vectors:
            source = Path(config.evaluation.run).name if config.evaluation.run else "BM25"
            lines += [f"Of the {config.evaluation.depth} best passages of `{source}`, ranked again.", ""]
        lines += ["| step | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for row in evaluations:
            values = " | ".join(f"{row['evaluation'].get(name, float('nan')):.4f}" for name in names)
            lines.append(f"| {row['step']} | {values} |")
        lines.append("")
    if dims := student.dims:
        lines += widths(dims, config.evaluation, evaluations)
    lines += ["## Training", ""]
    if (run / AVERAGE).exists():
        lines += [averaged(parse_json((run / AVERAGE).read_text("utf-8")), config.evaluation), ""]
    losses = [row for row in _rows(run / "metrics.jsonl") if "loss" in row]
    if losses:
        parts = ", ".join(f"{name} {value:.4f}" for name, value in losses[-1]["parts"].items())
        lines += [f"Last step {losses[-1]['step']}: loss {losses[-1]['loss']:.4f} ({parts}).", ""]
    settings = {"losses": config.losses.model_dump(), "train": config.train.model_dump(), "seed": config.seed}
    lines += ["```yaml", yaml.safe_dump(settings, sort_keys=False).strip(), "```", ""]
    facts = run / "run.json"
    if facts.exists():
        versions = parse_json(facts.read_text("utf-8"))["versions"]
        lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    return "\n".join(lines)


def widths(trained: list[int], evaluation: EvaluationConfig, evaluations: list[dict]) -> list[str]:
    """Lines on the widths that a student was trained at, with a table of what the best evaluation measured at each."""
    dims = ", ".join(map(str, trained))
    lines = ["## Widths", "", f"Its first dimensions alone serve as vectors, too: trained at {dims}.", ""]
    use = f'SentenceTransformer("this directory", truncate_dim={trained[0]})'
    lines += [f"`{use}` reads it so, and `lead-ds encode --dim {trained[0]}`.", ""]
    measured = [row for row in evaluations if row.get("widths")]
    if not measured:
        return lines
    best = max(measured, key=lambda row: row["evaluation"].get(evaluation.metric) or float("-inf"))
    names = list(best["evaluation"])
    lines += [f"On the {evaluation.split} split, at step {best['step']}:", ""]
    lines += ["| dimensions | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for dim, found in best["widths"].items():
        values = " | ".join(f"{found.get(name, float('nan')):.4f}" for name in names)
        lines.append(f"| {dim} | {values} |")
    return [*lines, ""]


def read_as(teacher: Any, place: int, run: Path) -> str:
    """What a model was distilled from: the name of a teacher, and how it was read."""
    path, kind = getattr(teacher, "path", ""), teacher.kind
    if kind not in KINDS:  # the run knows whose relevance that is
        facts = parse_json((run / "run.json").read_text("utf-8"))
        found = facts["teacher"] if "teacher" in facts else facts["teachers"][place]
        path, kind = found.get("path", ""), found.get("kind", kind)
    return f"`{Path(path).name or kind}` ({kind.replace('_', ' ')})"


def averaged(found: dict, evaluation: EvaluationConfig) -> str:
    """A line on the checkpoints that the weights are the mean of."""
    counted = zip(found["checkpoints"], found["counts"], strict=True)
    names = ", ".join(f"{name} ({count}x)" if count > 1 else name for name, count in counted if count)
    value, metric = found["value"], evaluation.metric
    score = "" if value is None else f" On the {evaluation.split} split: {metric} {value:.4f}."
    return f"Weights: the mean of {names}.{score}"


def _rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(parse_json(line))
        except ValueError:
            continue  # a kill cut it short
    return rows
