"""Commands that measure: evaluate, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from lead_ds.cli import options
from lead_ds.errors import InputError

MEASURES = typer.Option("RR@10 nDCG@10 AP@1000 R@100 R@1000", "--measures", help="Names of ir-measures.")
LEVEL = typer.Option(1, "--relevance-level", min=1, help="Judgements from here on count; nDCG is graded.")


def evaluate(
    settings: list[str] | None = options.SETTINGS,
    model: str | None = typer.Option(
        None, "--model", help="A model's directory: a dual encoder searches the corpus, exactly; others rerank."
    ),
    query_model: Path | None = options.QUERY_MODEL,
    document_model: Path | None = options.DOCUMENT_MODEL,
    kind: str | None = typer.Option(
        None,
        "--kind",
        help="A kind of model; default: what the model's files name. served: --model is the address of a server.",
    ),
    data: Path | None = typer.Option(None, "--data", help="With --model: the dataset's folder."),
    split: str | None = typer.Option(None, "--split", help="With --model: which qrels/SPLIT.tsv.", show_default="test"),
    run: Path | None = typer.Option(
        None, "--run", help="A TREC run: evaluated with --qrels, reranked with --model (default there: BM25's)."
    ),
    depth: int | None = typer.Option(
        None, "--depth", min=1, help="Passages of each query that are reranked; default: 100."
    ),
    index: Path | None = typer.Option(
        None,
        "--index",
        help="With --model, a dual encoder: what `lead-ds index` wrote, searched instead of the corpus.",
    ),
    dim: int | None = options.DIM,
    precision: str | None = typer.Option(
        None,
        "--precision",
        help="Hold the corpus' vectors so, each in turn, and report bytes beside quality: float32,int8,binary.",
    ),
    rescored: int | None = options.RESCORED,
    gpus: int = options.GPUS,
    layout: str | None = options.LAYOUT,
    nprobe: int | None = options.NPROBE,
    ef_search: int | None = options.EF_SEARCH,
    out: Path | None = typer.Option(None, "--out", help="With --model: write what it ranked, as a TREC run."),
    qrels: Path | None = typer.Option(None, "--qrels", help="With --run alone: the judgements."),
    measures: str = MEASURES,
    relevance_level: int = LEVEL,
    keep_identical: bool = options.KEEP_IDENTICAL,
    per_query: bool = typer.Option(False, "--per-query", help="Also each query's values (with --json)."),
    json_file: Path | None = typer.Option(None, "--json", help="Write the values here; - for standard output."),
    batch_size: int | None = options.BATCH,
) -> None:
    """Metrics of a model on a dataset, of an index, or of a TREC run.

    Under a launcher, every rank encodes its share; an index is searched by one of them.

    lead-ds evaluate --model runs/x/student --data data/scifact --split test

    lead-ds evaluate --model runs/x/student --data data/scifact --index index --nprobe 32

    lead-ds evaluate --model runs/teacher/model --data data/scifact --run bm25.trec --depth 100 --out reranked.trec

    lead-ds evaluate --model qwen3-reranker --kind llm_reranker --data data/scifact max_length=512 yes_token=yes no_token=no

    lead-ds evaluate --model http://localhost:8080/rerank --kind served --data data/scifact api=tei

    lead-ds evaluate --model runs/x/student --data data/scifact --precision float32,int8,binary

    lead-ds evaluate --query-model runs/x/student --document-model models/teacher --data data/scifact

    lead-ds evaluate --run run.trec --qrels qrels.dl19-passage.txt --relevance-level 2

    A ColBERT, a cross-encoder and a decoder reranker order the passages of --run, or BM25's best. A dual encoder does
    so where --run or --depth is given, and searches the whole corpus otherwise.
    """
    documents: str | None = None
    if model is not None or query_model is not None or document_model is not None:
        found_model, documents = options.two_models(model, query_model, document_model)
        model = found_model
    if documents is not None and (kind or depth or run):
        what = "two models search the corpus: --kind, --run and --depth are for reranking"
        raise InputError("--document-model", what, "give one or the other")
    if model is None and run is None:
        raise InputError("evaluate", "give --model with --data, or --run with --qrels", "see lead-ds evaluate --help")
    if model is not None and data is None:
        raise InputError("--data", "is needed with --model", "name the dataset's folder")
    if model is not None and qrels is not None:
        raise InputError("--qrels", "goes with --run alone", "a model is judged by --data and --split")
    if model is None and qrels is None:
        raise InputError("--qrels", "is needed with --run", "name the file of judgements")
    if model is None and (settings or kind or depth or out or index or dim):
        what = "settings, --kind, --depth, --index, --dim and --out are of a model"
        raise InputError("evaluate", what, "add --model and --data")
    if model is None:
        ignored = {"--data": data, "--split": split, "--batch-size": batch_size}
        options.unused(ignored, "goes with --model", "take it out: a run alone is judged by --qrels")
    if json_file is None:
        options.unused({"--per-query": per_query}, "is reported as JSON alone", "add --json FILE, or --json -")
    split = split or "test"
    if index is not None and (kind or depth or run):
        what = "is searched by a dual encoder: --kind, --run and --depth are for reranking"
        raise InputError("--index", what, "give one or the other")
    if index is None and (gpus or nprobe or ef_search or rescored is not None):
        raise InputError("evaluate", "--gpus, --nprobe, --ef-search and --rescored are of an index", "add --index")
    precisions = (precision or "").replace(",", " ").split()
    if precisions and documents is not None:
        raise InputError(
            "--precision", "is of one model that searches the corpus, and two are given", "give --model alone"
        )
    if precisions and (model is None or index or documents or kind or depth or run or out or per_query):
        what = "is of a dual encoder that searches the corpus: --index, --kind, --depth, --run, --out and --per-query are not"
        raise InputError("--precision", what, "give --model and --data alone")
    for held in precisions:
        options.choice("--precision", held, "float32", "int8", "binary", "ubinary")
    layout = options.layout_of(layout, gpus)
    if kind is not None:
        from lead_ds.models.kinds.kind import KINDS

        options.choice("--kind", kind, *KINDS, "served")
    from lead_ds.data.collections.dataset import Dataset
    from lead_ds.engine.distributed.agreement import agreed
    from lead_ds.engine.distributed.watchdog import waiting_ranks
    from lead_ds.retrieval.evaluate import Task, evaluate_model, evaluate_run, open_encoder

    names = measures.replace(",", " ").split()
    if model is None:
        assert run is not None
        assert qrels is not None
        tell(evaluate_run(run, qrels, names, relevance_level, keep_identical=keep_identical), json_file, per_query)
        return
    assert data is not None
    if index is not None:
        from lead_ds.retrieval.search import evaluate_index

        search: dict[str, Any] = {
            "document_model": documents,
            "gpus": gpus,
            "layout": layout,
            "rescored": rescored,
            "nprobe": nprobe,
            "ef_search": ef_search,
        }
        with waiting_ranks() as here:
            if here.main:
                of_queries, of_documents = options.settings_of_two(settings, documents)
                options.refuse_settings_of_index(of_documents)
                searched = open_encoder(str(model), here.device, dim, of_queries)
                options.tell_reading(searched, Dataset.open(data))
                task = Task(Dataset.open(data), split, names, relevance_level, keep_identical=keep_identical)
                size = options.batch_of(batch_size, here.device)
                scores = evaluate_index(searched, index, task, batch_size=size, out=out, **search)
                tell(scores, json_file, per_query)
        return
    if documents is not None:
        from lead_ds.retrieval.two_models import evaluate_two

        both = list(zip((model, documents), options.settings_of_two(settings, documents), strict=True))
        with waiting_ranks() as here:
            task = Task(Dataset.open(data), split, names, relevance_level, keep_identical=keep_identical)
            query, document = agreed(here, lambda: [open_encoder(path, here.device, dim, own) for path, own in both])
            for one in (query, document):
                agreed(here, lambda: options.tell_reading(one, task.dataset, here))  # noqa: B023 - called at once
            size = options.batch_of(batch_size, here.device)
            scores = evaluate_two(query, document, task, batch_size=size, peers=here, out=out)
            if here.main:
                tell(scores, json_file, per_query)
        return
    from lead_ds.retrieval.rerank import DEPTH, Reranker, evaluate_ordered, evaluate_reranked, find_candidates

    if kind == "served":
        from lead_ds.teachers.served_order import open_served, order

        if batch_size or dim or precisions:
            what = "--batch-size, --dim and --precision are of a model that runs here"
            raise InputError(
                "--kind", what, "take them out: a served one has settings of a served teacher, such as api=tei"
            )
        with waiting_ranks() as here:
            if here.main:
                dataset, lookup = Dataset.open(data), open_served(model, settings or [])
                listed = find_candidates(
                    dataset, dataset.qrels(split), depth or DEPTH, run, keep_identical=keep_identical
                )
                task = Task(dataset, split, names, relevance_level, keep_identical=keep_identical)
                scores = evaluate_ordered(lambda wanted: order(lookup, dataset, wanted), task, listed, out=out)
                tell(scores, json_file, per_query)
        return
    with waiting_ranks() as here:
        dataset = Dataset.open(data)
        judged = dataset.qrels(split)
        task = Task(dataset, split, names, relevance_level, keep_identical=keep_identical)
        given = options.check_settings([*(settings or []), *([] if dim is None else [f"dim={dim}"])])
        opened = agreed(here, lambda: Reranker.open(model, kind, given, here.device))
        agreed(here, lambda: options.tell_reading((opened.scorer, opened.encoder), dataset, here))
        if precisions:
            from lead_ds.retrieval.evaluate_small import evaluate_small

            size = options.batch_of(batch_size, here.device)
            rows = evaluate_small(opened.scorer, opened.encoder, task, precisions, batch_size=size, peers=here)
            if here.main:
                tell_rows(rows, len(dataset.corpus), json_file)
            return
        how: dict[str, Any] = {"batch_size": options.batch_of(batch_size, here.device), "peers": here, "out": out}
        if opened.scorer.gives_vectors and run is None and depth is None:
            scores = evaluate_model(opened.scorer, opened.encoder, task, **how)
        else:
            kept: dict[str, Any] = {"keep_identical": keep_identical}
            found = agreed(
                here, lambda: find_candidates(dataset, judged, depth or DEPTH, run, **kept) if here.main else {}
            )
            found = here.from_main(found)
            scores = evaluate_reranked(opened.scorer, opened.encoder, task, found, **how)
        if here.main:
            tell(scores, json_file, per_query)


def compare(
    run_a: Path = typer.Argument(..., metavar="A", help="A TREC run."),
    run_b: Path = typer.Argument(..., metavar="B", help="Another one, over the same queries."),
    qrels: Path = typer.Option(..., "--qrels", help="The judgements, of BEIR's or TREC's form."),
    measures: str = MEASURES,
    relevance_level: int = LEVEL,
    keep_identical: bool = options.KEEP_IDENTICAL,
    json_file: Path | None = typer.Option(None, "--json", help="Write the values here; - for standard output."),
) -> None:
    """Compare two TREC runs: is the difference more than chance?

    The p value is that of the two-sided paired randomisation test over queries, the interval the 95% bootstrap interval of
    the difference B - A. Runs come from `lead-ds search --out`.

    lead-ds compare before.trec after.trec --qrels data/scifact/qrels/test.tsv --measures "nDCG@10 R@100"
    """
    from dataclasses import asdict

    from lead_ds.retrieval.evaluate import compare_runs

    rows = compare_runs(
        run_a, run_b, qrels, measures.replace(",", " ").split(), relevance_level, keep_identical=keep_identical
    )
    tree = {"a": str(run_a), "b": str(run_b), "comparisons": [asdict(row) for row in rows]}
    if printed_as_json(tree, json_file):
        return
    width = max(len(row.measure) for row in rows)
    print(f"{'':<{width}}  {'A':>6}  {'B':>6}  {'B - A':>7}  {'95% interval':^18}  {'p':>7}")
    for row in rows:
        interval = f"[{row.low:+.4f}, {row.high:+.4f}]"
        values = f"{row.a:.4f}  {row.b:.4f}  {row.difference:+.4f}  {interval:^18}  {row.p_value:.5f}"
        print(f"{row.measure:<{width}}  {values}")
    flips = " or ".join(dict.fromkeys(row.test for row in rows))
    print(
        f"{rows[0].queries} queries; p: {flips}; interval: bootstrap; {len(rows)} tests, not corrected for their number"
    )


def tell(scores: Any, json_file: Path | None, per_query: bool) -> None:
    """Print a table of means, or write JSON."""
    tree = {"mean": scores.mean, **({"per_query": scores.per_query} if per_query else {})}
    if printed_as_json(tree, json_file):
        return
    width = max(len(name) for name in scores.mean)
    for name, value in scores.mean.items():
        print(f"{name:<{width}}  {value:.4f}")


def tell_rows(rows: list[Any], passages: int, json_file: Path | None) -> None:
    """Quality and bytes of each precision: a table, or JSON."""
    tree = [
        {"precision": row.precision, "rescored_by": row.rescored_by, "bytes": row.bytes, "mean": row.scores.mean}
        for row in rows
    ]
    if printed_as_json({"passages": passages, "rows": tree}, json_file):
        return
    names = list(rows[0].scores.mean)
    print(f"{'vectors':<10}{'rescored by':<13}{'bytes':>6}{'MB':>10}  " + "  ".join(f"{name:>9}" for name in names))
    for row in rows:
        values = "  ".join(f"{row.scores.mean[name]:>9.4f}" for name in names)
        print(f"{row.precision:<10}{row.rescored_by:<13}{row.bytes:>6}{row.bytes * passages / 1e6:>10.2f}  {values}")


def printed_as_json(tree: dict[str, Any], json_file: Path | None) -> bool:
    """Write JSON to the requested file, if any; whether it went to standard output, which then holds nothing else."""
    if json_file is None:
        return False
    if str(json_file) == "-":
        print(json.dumps(tree, indent=1))
        return True
    from lead_ds.io.files import write_json

    write_json(json_file, tree)
    return False


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    for command in (evaluate, compare):
        app.command()(command)
