"""What a pipeline found: every evaluation in one table, as JSON, Markdown and one HTML page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from lead_ds.io.files import atomic, read_json, write_json
from lead_ds.report.page import html_page, html_table
from lead_ds.report.summary import Table, aligned
from lead_ds.retrieval.metrics import Scores

if TYPE_CHECKING:
    from collections.abc import Collection

    from lead_ds.pipeline.recipe import Recipe

MAIN = "distilled"
SAMPLES = 10_000  # sign flips of a significance test


def collect(recipe: Recipe, done: Collection[str]) -> dict[str, Any]:
    """The results of the evaluations that are `done`, and what distillation changed where another model was measured too.

    {"student", "results": [{model, data, split, relevance_level, queries, measures}], "differences": [{model, data, split,
    measure, model_value, distilled, difference, low, high, p_value, test}]}

    low and high are of a 95% bootstrap interval, p_value of a paired randomisation test.
    """
    results: list[dict[str, Any]] = []
    scores: dict[tuple[str, str, str], Scores] = {}
    for evaluation in recipe.evaluations:
        stage = recipe.stages[evaluation.stage]
        if evaluation.stage not in done:
            continue
        tree = read_json(stage.folder / "scores.json", "run the pipeline again")
        queries = len(next(iter(tree["per_query"].values())))
        data, split = evaluation.data, evaluation.item.split
        scores[evaluation.model, data, split] = Scores(tree["mean"], tree["per_query"])
        row: dict[str, Any] = {"model": evaluation.model, "data": data, "split": split}
        row |= {"relevance_level": evaluation.item.relevance_level, "queries": queries, "measures": tree["mean"]}
        results.append(row)
    student = str(recipe.stages["distill"].folder / "run" / "student") if "distill" in done else None
    return {"student": student, "results": results, "differences": differences(scores)}


def differences(scores: dict[tuple[str, str, str], Scores]) -> list[dict[str, Any]]:
    """The distilled student against every other model on the same queries."""
    from lead_ds.retrieval.evaluate import compare

    rows = []
    for (model, data, split), other in scores.items():
        distilled = scores.get((MAIN, data, split))
        if model == MAIN or distilled is None:
            continue
        for measure in other.mean:
            found = compare(other, distilled, measure, samples=SAMPLES)
            row = {"model": model, "data": data, "split": split, "measure": measure, "model_value": found.a}
            row |= {"distilled": found.b, "difference": found.difference, "low": found.low, "high": found.high}
            row |= {"p_value": found.p_value, "test": found.test}
            rows.append(row)
    return rows


def result_table(results: list[dict[str, Any]]) -> Table:
    """A row for every model and split, a column for every measure."""
    names = list(dict.fromkeys(name for row in results for name in row["measures"]))
    table: Table = [["model", "data", "split", "queries", "relevant from", *names]]
    for row in results:
        values = [f"{row['measures'][name]:.4f}" if name in row["measures"] else "" for name in names]
        facts = [row["model"], row["data"], row["split"], str(row["queries"]), str(row["relevance_level"])]
        table.append([*facts, *values])
    return table


def difference_table(rows: list[dict[str, Any]]) -> Table:
    """The distilled student against other models."""
    table: Table = [
        ["distilled against", "data", "split", "measure", "it has", "distilled", "difference", "95% interval", "p"]
    ]
    for row in rows:
        values = [f"{row['model_value']:.4f}", f"{row['distilled']:.4f}", f"{row['difference']:+.4f}"]
        values.append(f"[{row['low']:+.4f}, {row['high']:+.4f}]")
        table.append([row["model"], row["data"], row["split"], row["measure"], *values, f"{row['p_value']:.4f}"])
    return table


def stage_table(stages: list[dict[str, Any]]) -> Table:
    """Stages with their time and folder."""
    rows = [[one["stage"], one["state"], f"{one.get('seconds') or 0:.0f}", one["folder"]] for one in stages]
    return [["stage", "state", "seconds", "folder"], *rows]


def write_results(recipe: Recipe, tree: dict[str, Any]) -> str:
    """Write results.json, results.md and results.html into the output folder; the tables as plain text."""
    tables = {"Results": result_table(tree["results"])} if tree["results"] else {}
    if tree["differences"]:
        tables["What distillation changed"] = difference_table(tree["differences"])
    shown = "\n\n".join(aligned(table) for table in tables.values())
    tables["Stages"] = stage_table(tree["stages"])
    title = f"Pipeline {recipe.output.resolve().name}"
    lines, body = [f"# {title}", ""], []
    for heading, table in tables.items():
        lines += [f"## {heading}", "", *markdown(table), ""]
        body += [f"<h2>{heading}</h2>", html_table(table)]
    commands = "\n".join(command for one in tree["stages"] for command in one["commands"])
    recipe_text = recipe.path.read_text("utf-8")
    for heading, text in (("Commands", commands), (f"Recipe {recipe.path}", recipe_text)):
        lines += [f"## {heading}", "", "```", text.rstrip(), "```", ""]
        body += [f"<h2>{escape(heading)}</h2>", f"<pre>{escape(text)}</pre>"]
    write_json(recipe.output / "results.json", tree)
    for name, text in (("results.md", "\n".join(lines)), ("results.html", html_page(title, body))):
        with atomic(recipe.output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return shown


def markdown(table: Table) -> list[str]:
    """A table as Markdown's lines."""
    head, *rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return [head, "|---" * len(table[0]) + "|", *rows]
