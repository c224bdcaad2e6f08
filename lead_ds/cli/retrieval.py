"""Commands over a trained model: encode, index, search, mine."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import typer

from lead_ds.cli import options
from lead_ds.errors import InputError

MODEL = typer.Option(..., "--model", help="A student, sentence-transformers or Hugging Face directory.")
DATA = typer.Option(..., "--data", help="A folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv (or .gz).")


def encode(
    settings: list[str] | None = options.SETTINGS,
    model: str = MODEL,
    data: Path = DATA,
    out: Path = typer.Option(..., "--out", help="Where the vectors go: memory-mapped .npy shards, ids, a manifest."),
    kind: str = typer.Option("corpus", "--kind", help="corpus or queries."),
    dtype: str = typer.Option(
        "float32", "--dtype", help="float32, float16, int8, binary or ubinary, of the stored vectors."
    ),
    precision: str | None = typer.Option(
        None,
        "--precision",
        help="fp32, bf16 or fp16 (GPU), of the model's matrix products; default: that of its weights, see the setting dtype. "
        "bf16: near three times as fast on a CPU with AMX. int8, binary or ubinary: as --dtype.",
    ),
    dim: int | None = options.DIM,
    batch_size: int | None = options.BATCH,
) -> None:
    """Encode a corpus (or its queries). Run it again after a kill to finish; under a launcher, every rank does its share.

    lead-ds encode --model runs/x/student --data data/msmarco --out vectors

    lead-ds encode --model intfloat/e5-base-v2 --data data/msmarco --out vectors passage_prompt="passage: "

    deepspeed --module lead_ds encode --model runs/x/student --data data/msmarco --out vectors
    """
    options.choice("--kind", kind, "corpus", "queries")
    from lead_ds.retrieval.small import SMALL

    options.choice("--dtype", dtype, "float32", "float16", *SMALL)
    options.choice("--precision", precision or "fp32", "fp32", "bf16", "fp16", *SMALL)
    if precision in SMALL:
        if dtype not in ("float32", precision):
            raise InputError("--dtype", f"{dtype} and --precision {precision} were both given", "give one of them")
        dtype, precision = precision, None
    given = options.check_settings([*(["dtype=fp32"] if precision == "fp32" else []), *(settings or [])])
    from lead_ds.data.collections.dataset import Dataset
    from lead_ds.engine.distributed.agreement import agreed
    from lead_ds.engine.distributed.watchdog import waiting_ranks
    from lead_ds.models.dtypes import dtype_of
    from lead_ds.retrieval.encode import Encoding, Stored, encode_to
    from lead_ds.retrieval.evaluate import open_encoder
    from lead_ds.retrieval.search import model_facts

    queries, documents = options.two_models(model, None, None)
    model = (documents or queries) if kind == "corpus" else queries
    with waiting_ranks() as here:
        dataset = Dataset.open(data)
        texts = dataset.corpus if kind == "corpus" else dataset.queries
        scorer, encoder = opened = agreed(here, lambda: open_encoder(model, here.device, dim, given))
        if scorer.sparse:
            if dtype != "float32":
                raise InputError(
                    "--dtype", f"{dtype} is of dense vectors, and {model} gives sparse ones", "leave it out"
                )
            dtype = "sparse"
        agreed(here, lambda: options.tell_reading(opened, dataset, here))
        facts = model_facts(model, scorer)
        if (read_as := dtype_of(scorer)) != "fp32":
            facts["read_as"] = read_as  # an encode of other numbers cannot finish this one
        how = Encoding(options.batch_of(batch_size, here.device), here.device, cast(Any, precision or "fp32"))
        stored = Stored(cast(Any, dtype))
        read = scorer.ranked if scorer.sparse else scorer.embed
        vectors = encode_to(out, read, encoder, texts, facts, how, stored, peers=here)
        if here.main:
            print(f"{len(vectors)} vectors of {vectors.dimension} in {vectors.shards} shards: {out}")


def index(
    settings: list[str] | None = options.SETTINGS,
    vectors: Path = typer.Option(..., "--vectors", help="What `lead-ds encode` wrote."),
    out: Path = typer.Option(..., "--out", help="Where the index goes."),
    factory: str = typer.Option(
        "Flat", "--factory", help="FAISS's index string: Flat (exact), IVF4096,Flat, HNSW32, PQ64 ..."
    ),
    rescore: Path | None = typer.Option(
        None,
        "--rescore",
        help="Finer vectors of the same texts, to score candidates again by. Default for signs: themselves.",
    ),
    gpus: int = typer.Option(0, "--gpus", min=0, help="GPUs to train and fill it on."),
    layout: str | None = options.LAYOUT,
    data: Path | None = typer.Option(None, "--data", help="Check that the vectors are of this dataset as it is now."),
    query_model: str | None = typer.Option(
        None,
        "--query-model",
        help="Another model, in the same space, that may ask this index: a student of the one that made it.",
    ),
) -> None:
    """Build a FAISS index from encoded vectors. Vectors are added in chunks, so that they need not fit in memory.

    Of a sparse encoder's vectors: an inverted index; run it again after a kill to finish.

    lead-ds index --vectors vectors --out index --factory IVF4096,Flat
    """
    layout = options.layout_of(layout, gpus)
    from lead_ds.data.collections.dataset import Dataset
    from lead_ds.retrieval.index import build_index
    from lead_ds.retrieval.vectors import Vectors, check_texts

    opened = Vectors.open(vectors)
    if data is not None:
        dataset = Dataset.open(data)
        check_texts(
            opened.manifest, dataset.corpus if opened.manifest["kind"] == "corpus" else dataset.queries, vectors
        )
    if rescore is not None and rescore.resolve() == vectors.resolve():
        what = "is what the index itself is made of, and scores nothing more finely"
        raise InputError("--rescore", what, "leave it out, or name vectors of float32 or int8")
    finer = None if rescore is None else Vectors.open(rescore)
    asks: dict[str, Any] | None = None
    if settings and query_model is None:
        raise InputError(settings[0], "is a setting of a model, and none is read", "add --query-model")
    if query_model is not None:
        from lead_ds.retrieval.evaluate import open_encoder
        from lead_ds.retrieval.search import model_facts

        asking = open_encoder(query_model, "cpu", settings=options.check_settings(settings))
        options.tell_reading(asking, None)
        asks = model_facts(query_model, asking[0])
    built: Any = build_index(opened, out, factory, gpus=gpus, layout=layout, queries=asks, rescore=finer)  # type: ignore[arg-type]
    print(f"{'inverted' if opened.dtype == 'sparse' else factory}: {len(opened)} vectors: {built}")


def search(
    query: list[str] | None = typer.Argument(None, help="Queries; none: those of the data's queries.jsonl."),
    model: str | None = typer.Option(
        None, "--model", help="A student, sentence-transformers or Hugging Face directory, or a Router's."
    ),
    given: list[str] | None = typer.Option(
        None,
        "--set",
        help="A setting of the model: passage_length=256, query_prompt='query: ' ... Of two models: query.KEY=VALUE ...",
        metavar="KEY=VALUE",
    ),
    query_model: Path | None = options.QUERY_MODEL,
    document_model: Path | None = options.DOCUMENT_MODEL,
    data: Path | None = typer.Option(
        None, "--data", help="Searched directly where there is no --index; shows texts of hits."
    ),
    index: Path | None = typer.Option(None, "--index", help="What `lead-ds index` wrote."),
    k: int | None = typer.Option(
        None, "-k", min=1, help="Passages for each query; 10 are shown and 1000 written by default."
    ),
    split: str | None = typer.Option(None, "--split", help="Only the queries that are judged in qrels/SPLIT.tsv."),
    out: Path | None = typer.Option(None, "--out", help="Write a TREC run instead of showing hits."),
    tag: str | None = typer.Option(
        None, "--tag", help="With --out: the run's name in the TREC file.", show_default="lead-ds"
    ),
    dim: int | None = options.DIM,
    gpus: int = options.GPUS,
    layout: str | None = options.LAYOUT,
    nprobe: int | None = options.NPROBE,
    ef_search: int | None = options.EF_SEARCH,
    rescored: int | None = options.RESCORED,
    keep_identical: bool = options.KEEP_IDENTICAL,
    as_json: bool = typer.Option(False, "--json", help="Print hits as JSON lines."),
) -> None:
    """Search: a question from the command line, or all queries of a dataset into a TREC run.

    lead-ds search --model runs/x/student --data data "read a json file"

    lead-ds search --model intfloat/e5-base-v2 --set "query_prompt=query: " --data data "read a json file"

    lead-ds search --model runs/x/student --data data --index index --split test -k 1000 --out run.trec
    """
    layout = options.layout_of(layout, gpus)
    if index is None:
        of_index = {"--gpus": gpus or None, "--nprobe": nprobe, "--ef-search": ef_search, "--rescored": rescored}
        options.unused(of_index, "is of an index", "add --index, or take it out")
    if out is None:
        options.unused({"--tag": tag}, "is written into a run", "add --out, or take it out")
    else:
        options.unused({"--json": as_json}, "prints hits, and --out writes a run instead", "give one of them")
    if query:
        of_data = {"--split": split, "--keep-identical": keep_identical}
        options.unused(of_data, "is of a dataset's queries, and one was given here", "take it out")
    from lead_ds.data.collections.dataset import Dataset
    from lead_ds.data.collections.qrels import run_writer
    from lead_ds.retrieval.evaluate import open_encoder
    from lead_ds.retrieval.indexed import check_k
    from lead_ds.retrieval.search import Searcher
    from lead_ds.retrieval.ties import telling_ties

    settings: dict[str, Any] = {}
    if index is not None:
        settings = {"index": index, "gpus": gpus, "layout": layout, "nprobe": nprobe, "ef_search": ef_search}
        settings["rescored"] = rescored
    if not query and data is None:
        raise InputError(
            "search", "no query was given", 'add one, such as "read a json file", or --data with queries.jsonl'
        )
    if not query and out is None:
        raise InputError("--out", "is needed for a dataset's queries", "name the TREC run to write")
    tag = tag or "lead-ds"
    if out is not None:
        check_search_names(data, index, tag, out)
    if k is not None and index is None and data is not None:  # now, and not when all of it has been encoded
        corpus = Dataset.open(data).corpus
        check_k(k, len(corpus), "-k", corpus.path)
    queries, documents = options.two_models(model, query_model, document_model)
    of_queries, of_documents = options.settings_of_two(given, documents)
    opened = open_encoder(queries, dim=dim, settings=of_queries)
    dataset = None if data is None else Dataset.open(data)
    options.tell_reading(opened, dataset)
    if documents is not None and index is None:
        settings["document_model"] = reads = open_encoder(documents, dim=dim, settings=of_documents)
        options.tell_reading(reads, dataset)
    else:
        options.refuse_settings_of_index(of_documents)
        settings["document_model"] = documents
    searcher = Searcher.open(opened, data, quiet=bool(as_json), **settings)
    if query and out is None:
        for text in query:
            hits = searcher.search(text, k)
            if as_json:
                print(json.dumps({"query": text, "hits": [hit.__dict__ for hit in hits]}))
            else:
                show(text, hits)
        return
    assert out is not None
    judged = None
    if query:
        ids, texts, keep_identical = [f"q{i}" for i in range(1, len(query) + 1)], list(query), True
    else:
        assert data is not None
        dataset = Dataset.open(data)
        judged = dataset.qrels(split) if split else None
        ids = list(dataset.queries.ids if judged is None else judged)
        texts = dataset.queries.texts(dataset.queries.rows(ids))
    with run_writer(out, tag) as write:
        for part in telling_ties(
            searcher.runs(ids, texts, k, quiet=False, keep_identical=keep_identical, judged=judged)
        ):
            write(part)
    print(f"{len(ids)} queries: {out}")


def mine(
    settings: list[str] | None = options.SETTINGS,
    data: Path = DATA,
    out: Path = typer.Option(..., "--out", help="The training groups to write (JSON lines)."),
    model: str | None = typer.Option(None, "--model", help="Negatives by this model's exact search."),
    run: Path | None = typer.Option(None, "--run", help="Negatives from this TREC run; neither: BM25."),
    split: str = typer.Option("train", "--split", help="The judged queries to mine for."),
    number: int = typer.Option(30, "--number", min=1, help="Negatives of each query."),
    depth: int | None = typer.Option(
        None, "--depth", min=1, help="Candidates read of each query; default: 200, or --skip + --number if more."
    ),
    skip: int = typer.Option(0, "--skip", min=0, help="Leave out the first so many ranks."),
    margin: float | None = typer.Option(
        None, "--margin", help="A negative scores at least this much below the query's least positive."
    ),
    ratio: float | None = typer.Option(
        None, "--ratio", help="A negative scores at most this share of the least positive's score."
    ),
    similar: float = typer.Option(
        0.9, "--similar", help="Leave out near-duplicates of a positive: share of words in common."
    ),
    keep_identical: bool = typer.Option(
        False, "--keep-identical", help="Keep a passage that is the query itself, by its id or its text."
    ),
    rescore: str | None = typer.Option(
        None,
        "--rescore",
        help="Choose by the scores of this model, of any kind, which are kept in OUT.scores/; or of a server, at its address.",
    ),
    rescore_settings: list[str] = typer.Option(
        [], "--rescore-set", help="A setting of that model, key=value: kind=llm_reranker, template=qwen3 ..."
    ),
    relabel: bool = typer.Option(
        False, "--relabel", help="What scores above --margin or --ratio becomes a positive, instead of being left out."
    ),
    sample: str = typer.Option(
        "top", "--sample", help="Of the candidates that pass: top, random, or stratified over their scores."
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Of --sample random."),
) -> None:
    """Mine hard negatives from a model, a TREC run, or BM25; writes training groups with the scores it saw.

    After a kill it starts over, but for what --rescore has scored. To resume the rest as well, use encode, index and
    search --out, which resume, and then mine --run.

    lead-ds mine --model runs/first/student --data data/msmarco --out data/msmarco/train.jsonl --depth 200 --number 30

    lead-ds mine --model intfloat/e5-base-v2 --data data --out data/train.jsonl query_prompt="query: "

    lead-ds mine --data data --out data/train.jsonl --rescore models/reranker --margin 0 --relabel --sample stratified

    lead-ds mine --data data --out data/train.jsonl --rescore http://localhost:8080/rerank --rescore-set api=tei
    """
    if model is not None and run is not None:
        raise InputError("mine", "--model and --run were both given", "give one of them, or neither for BM25")
    if model is None and settings:
        raise InputError(settings[0], "is a setting of a model, and none is given", "add --model")
    from lead_ds.data.collections.dataset import Dataset
    from lead_ds.retrieval.evaluate import ModelLike, open_encoder
    from lead_ds.retrieval.mine import mine as run_mine
    from lead_ds.settings.mining import MineSettings
    from lead_ds.settings.parse import parse_section

    wanted: dict[str, Any] = {"number": number, "skip": skip, "depth": depth, "margin": margin, "ratio": ratio}
    wanted |= {"similar": similar, "sample": sample, "seed": seed, "keep_identical": keep_identical, "relabel": relabel}
    how = parse_section(MineSettings, wanted, "mine")
    if rescore_settings and rescore is None:
        raise InputError("--rescore-set", "is of a model that scores, and none is given", "add --rescore")
    dataset = Dataset.open(data)
    source: ModelLike = run or "bm25"
    if model is not None:
        source = open_encoder(model, settings=options.check_settings(settings))
        options.tell_reading(source, dataset)
    again = None
    if rescore is not None and ("kind=served" in rescore_settings or "://" in rescore):
        from lead_ds.teachers.served_order import open_served, order

        lookup = open_served(rescore, [setting for setting in rescore_settings if setting != "kind=served"])
        again = partial(order, lookup, dataset)
    elif rescore is not None:
        from lead_ds.retrieval.rescore import open_teacher
        from lead_ds.retrieval.rescore import rescore as score_again

        teacher = open_teacher(rescore, options.check_settings(rescore_settings))
        options.tell_reading((teacher[0].scorer, teacher[0].encoder), dataset)
        again = partial(score_again, teacher, dataset, folder=out.with_name(f"{out.name}.scores"))
    mined = run_mine(source, dataset, out, split, how, rescored=again)
    left_out = ", ".join(f"{count} {why}" for why, count in mined.left_out.items() if count)
    print(
        f"{mined.queries} queries, {mined.negatives} negatives: {out}" + (f"; left out: {left_out}" if left_out else "")
    )
    if mined.relabelled:
        print(f"{mined.relabelled} candidates score as positives do, and became positives")
    if mined.short:
        print(f"{mined.short} queries have fewer than {number} negatives: fewer candidates were left")
    if mined.unscored:
        print(
            f"{mined.unscored} queries have a positive that the run lacks: --margin and --ratio cannot look at its score"
        )


def check_search_names(data: Path | None, index: Path | None, tag: str, out: Path) -> None:
    """Refuse, before the work, ids and a tag that a run cannot hold."""
    from lead_ds.data.collections.dataset import Dataset, check_run_names
    from lead_ds.data.collections.qrels import blank_name
    from lead_ds.data.collections.texts import Ids
    from lead_ds.retrieval.vectors import IDS

    if data is not None:
        check_run_names(Dataset.open(data), out, tag)
    elif blank_name([tag]):
        raise InputError("--tag", f"{tag!r} holds white space, or nothing", "use one word")
    elif index is not None and (name := blank_name(Ids.of_lines(index / IDS, "build the index again"))) is not None:
        raise InputError(
            index / IDS, f"the id {name} holds white space or a NUL, which a TREC run cannot", "rename and index again"
        )


def show(query: str, hits: list[Any]) -> None:
    """Hits for a person: score, id, the beginning of the text."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=query, show_lines=True, title_justify="left")
    for name, justify in (("score", "right"), ("id", "left"), ("text", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    from rich.text import Text

    for hit in hits:
        lines = hit.text.splitlines()[:6]
        table.add_row(f"{hit.score:.4f}", Text(hit.id), Text("\n".join(line[:160] for line in lines)))
    Console().print(table)


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    for command in (encode, index, search, mine):
        app.command()(command)
