"""The model card of a trained model: what it is, how to use it, and the run's own numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from lead_ds.config import Config, StudentConfig


@dataclass(frozen=True)
class Use:
    """How models of a kind are named, found and used."""

    name: str
    library: str
    task: str
    tags: tuple[str, ...]
    example: str


USES = {
    "dual_encoder": Use(
        "dual encoder",
        "sentence-transformers",
        "sentence-similarity",
        ("sentence-transformers", "feature-extraction", "dense-retrieval"),
        """from sentence_transformers import SentenceTransformer
model = SentenceTransformer("this directory")
queries = model.encode_query(["what is late interaction?"])
passages = model.encode_document(["ColBERT compares every query token with every passage token."])
print(model.similarity(queries, passages))""",
    ),
    "colbert": Use(
        "ColBERT (late interaction)",
        "lead-ds",
        "text-ranking",
        ("ColBERT", "late-interaction", "reranker"),
        """from lead_ds.retrieval.rerank import Reranker
model = Reranker.open("this directory")  # PyLate's layout
print(model.scores("what is late interaction?", ["ColBERT compares every query token with every passage token."]))""",
    ),
    "cross_encoder": Use(
        "cross-encoder",
        "sentence-transformers",
        "text-ranking",
        ("sentence-transformers", "cross-encoder", "reranker"),
        """from sentence_transformers import CrossEncoder
model = CrossEncoder("this directory")
query, passage = "what is late interaction?", "ColBERT compares every query token with every passage token."
print(model.predict([(query, passage)]))  # a logit: no sigmoid""",
    ),
}


def front_matter(kind: str, *more: str) -> list[str]:
    """The card's YAML header, with tags of the kind and `more`."""
    use = USES[kind]
    header = {"library_name": use.library, "pipeline_tag": use.task, "tags": [*use.tags, *more, "lead-ds"]}
    return ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", ""]


def model_card(config: Config, run: Path) -> str:
    """README.md of a model's directory, from the run's folder (run.json, metrics.jsonl as far as they are there)."""
    student, teacher = config.student, config.teacher
    distilled = teacher is not None and config.losses.needs_teacher
    use, base = USES[student.kind], Path(student.path).name
    title = f"A dense-retrieval student of `{base}`" if student.kind == "dual_encoder" else f"`{base}` as a {use.name}"
    if not distilled:
        title = f"`{base}`, a {use.name} trained on labels"
    lines = [*front_matter(student.kind, *(["knowledge-distillation"] if distilled else [])), f"# {title}", ""]
    if teacher is not None and distilled:
        path, kind = teacher.path, teacher.kind
        if kind in ("cached", "scores"):  # the run knows whose relevance that is
            found = json.loads((run / "run.json").read_text("utf-8"))["teacher"]
            path, kind = found["path"], found["kind"]
        how = ", layer by layer" if config.losses.needs & {"layers", "attention"} else ""
        lines += [f"Distilled by lead-ds from `{Path(path).name}` ({kind.replace('_', ' ')}){how}.", ""]
    else:
        over = "its own passages" if in_group(config) else "every passage of the batch"
        temperature = config.losses.contrastive.temperature
        lines += [
            f"Trained by lead-ds on labels alone: the positive's likelihood among {over}, at temperature {temperature:g}"
            f"{'' if temperature == 1 else f' (as a teacher: teacher_temperature: {temperature:g})'}.",
            "",
        ]
    lines += ["```python", use.example, "```", "", reads(student), ""]
    evaluations = [row for row in _rows(run / "metrics.jsonl") if "evaluation" in row]
    if evaluations:
        names = list(evaluations[-1]["evaluation"])
        lines += [f"## Evaluation on the {config.evaluation.split} split", ""]
        if student.kind != "dual_encoder":
            source = Path(config.evaluation.run).name if config.evaluation.run else "BM25"
            lines += [f"Of the {config.evaluation.depth} best passages of `{source}`, ranked again.", ""]
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


def in_group(config: Config) -> bool:
    """Whether the contrastive loss compares a query's own passages only."""
    return config.student.kind == "cross_encoder" or config.losses.contrastive.scope == "group"


def reads(model: StudentConfig) -> str:
    """How the model reads texts and compares them, in a sentence or two."""
    if model.kind == "cross_encoder":
        return f"Reads a query with a passage, in up to {model.max_length} tokens; longer ones are cut."
    lengths = f"queries of up to {model.query_length} and passages of up to {model.passage_length} tokens"
    if model.kind == "colbert":
        return f"Similarity: MaxSim of token vectors. Trained with {lengths}."
    similarity = "cosine" if model.normalize else "dot product, or as config_sentence_transformers.json says"
    return f"Similarity: {similarity}. Trained with {lengths}."


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
