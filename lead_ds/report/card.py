"""The model card of a distilled student: what it is, how to use it, and the run's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from lead_ds.config import Config


def model_card(config: Config, run: Path) -> str:
    """README.md of a student directory, from the run's folder (run.json, metrics.jsonl as far as they are there)."""
    student, teacher = config.student, config.teacher
    header = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "dense-retrieval", "knowledge-distillation", "lead-ds"],
    }
    similarity = "cosine" if student.normalize else "dot product, or as config_sentence_transformers.json says"
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# A dense-retrieval student of `{Path(student.path).name}`",
        "",
    ]
    if teacher is not None and config.losses.needs_teacher:
        path, kind = teacher.path, teacher.kind
        if kind == "cached":  # the run knows whose relevance that is
            found = json.loads((run / "run.json").read_text("utf-8"))["teacher"]
            path, kind = found["path"], found["kind"]
        lines += [f"Distilled by lead-ds from `{Path(path).name}` ({kind.replace('_', ' ')}), layer by layer.", ""]
    lines += [
        "```python",
        "from sentence_transformers import SentenceTransformer",
        'model = SentenceTransformer("this directory")',
        'queries = model.encode_query(["what is late interaction?"])',
        'passages = model.encode_document(["ColBERT compares every query token with every passage token."])',
        "print(model.similarity(queries, passages))",
        "```",
        "",
        f"Similarity: {similarity}. Trained with queries of up to {student.query_length} and passages of up to "
        f"{student.passage_length} tokens.",
        "",
    ]
    evaluations = [row for row in _rows(run / "metrics.jsonl") if "evaluation" in row]
    if evaluations:
        names = list(evaluations[-1]["evaluation"])
        lines += [f"## Evaluation on the {config.evaluation.split} split", ""]
        lines += ["| step | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for row in evaluations:
            values = " | ".join(f"{row['evaluation'].get(name, float('nan')):.4f}" for name in names)
            lines.append(f"| {row['step']} | {values} |")
        lines.append("")
    lines += ["## Training", ""]
    losses = [row for row in _rows(run / "metrics.jsonl") if "loss" in row]
    if losses:
        parts = ", ".join(f"{name} {value:.4f}" for name, value in losses[-1]["parts"].items())
        lines += [f"Last step {losses[-1]['step']}: loss {losses[-1]['loss']:.4f} ({parts}).", ""]
    settings = {"losses": config.losses.model_dump(), "train": config.train.model_dump(), "seed": config.seed}
    lines += ["```yaml", yaml.safe_dump(settings, sort_keys=False).strip(), "```", ""]
    facts = run / "run.json"
    if facts.exists():
        versions = json.loads(facts.read_text("utf-8"))["versions"]
        lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    return "\n".join(lines)


def _rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a kill cut it short
    return rows
