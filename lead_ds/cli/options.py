"""Options that several commands have, and how their values are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from lead_ds.errors import InputError

CONFIG = typer.Argument(..., help="A YAML configuration; see ds_configs/recipes/ for examples.", metavar="CONFIG")
OVERRIDES = typer.Argument(None, help="Settings to override, such as train.lr=2e-5.", metavar="[KEY=VALUE]...")
ACCEPT = typer.Option(
    None,
    "--accept-changed",
    help="Go on with an input that changed, by its name: train, corpus, teacher, tokenizer ... Needs --resume; repeatable.",
    metavar="NAME",
)
RESUME = typer.Option(False, "--resume", help="Continue the run in the output folder from its last good checkpoint.")
QUIET = typer.Option(False, "--quiet", "-q", help="No progress.")
_OF_RUNS = ("passes", "weights", "path")
SETTINGS = typer.Argument(
    None,
    help="Settings of the model, as in a configuration's section of it: kind=K, passage_length=256, query_prompt='query: ', "
    "pooling=mean, trust_remote_code=true ... Of two models: query.KEY=VALUE and document.KEY=VALUE.",
    metavar="[KEY=VALUE]...",
)
BATCH = typer.Option(
    None,
    "--batch-size",
    min=1,
    help="Texts of full length (512 tokens at most) per forward; of shorter ones more, of longer ones fewer. Default: 64, and 16 "
    "on a CPU, whose caches hold no more.",
)
KEEP_IDENTICAL = typer.Option(
    False,
    "--keep-identical",
    help="Keep a passage that has its query's id, which otherwise is left out unless it is judged relevant, as in BEIR.",
)
LAYOUT = typer.Option(None, "--layout", help="shard or replicate, over several GPUs.", show_default="shard")
GPUS = typer.Option(0, "--gpus", min=0, help="GPUs for the index.")
DIM = typer.Option(
    None,
    "--dim",
    min=1,
    help="Read a dual encoder by the first so many dimensions of its vectors. Default: all; with an index, as many as it has.",
)
QUERY_MODEL = typer.Option(
    None, "--query-model", help="What encodes queries, with --document-model in place of --model."
)
DOCUMENT_MODEL = typer.Option(
    None,
    "--document-model",
    help="What encodes passages, in the same space as --query-model: a teacher's index serves both.",
)
RESCORED = typer.Option(
    None,
    "--rescored",
    min=0,
    help="Times k candidates that an index of small vectors scores again; default 4; 0: none.",
)
NPROBE = typer.Option(None, "--nprobe", min=1, help="Cells searched of an IVF index.")
EF_SEARCH = typer.Option(None, "--ef-search", min=1, help="Breadth of the search in an HNSW index.")


def two_models(model: Any, query_model: Any, document_model: Any) -> tuple[str, str | None]:
    """The model of queries, and that of documents where it is another: as given, or out of a Router's directory."""
    from lead_ds.models.router import routes

    if query_model is not None and document_model is not None and model is None:
        return str(query_model), str(document_model)
    if query_model is not None or document_model is not None or model is None:
        what = "give --model, or both of --query-model and --document-model"
        raise InputError("--model", "one model must be given, or two: one of queries and one of documents", what)
    return routes(model) or (str(model), None)


def settings_of_two(settings: list[str] | None, documents: str | None) -> tuple[list[str], list[str]]:
    """Settings of the model of queries, and of that of documents; where one model is both, all are its.

    Raises InputError as `check_settings`, and where two models are given and a setting says of neither that it is its.
    """
    if documents is None:
        return check_settings(settings), []
    found: dict[str, list[str]] = {"query": [], "document": []}
    for setting in settings or []:
        side, dot, own = setting.partition(".")
        if not dot or side not in found:
            raise InputError(
                setting, "is a setting of one model, and two are given", f"write query.{setting} or document.{setting}"
            )
        found[side].append(own)
    return check_settings(found["query"]), check_settings(found["document"])


def refuse_settings_of_index(of_documents: list[str]) -> None:
    """Raise InputError for a setting of the model that made an index, which is not read again."""
    for setting in of_documents:
        raise InputError(f"document.{setting}", "is ignored: that model made the index", "give it to lead-ds encode")


def check_settings(settings: list[str] | None) -> list[str]:
    """Settings of a model that a command reads. Raises InputError for those that only a run heeds, and for one given twice."""
    from lead_ds.settings.parse import refuse_twice

    given = list(settings or [])
    refuse_twice(given)
    for setting in given:
        name = setting.partition("=")[0].strip()
        if name in _OF_RUNS:
            raise InputError(name, "is of a model in a run", f"take it out: this command ignores {', '.join(_OF_RUNS)}")
    return given


def tell_reading(model: Any, dataset: Any, here: Any = None) -> None:
    """Say on stderr how a model, (scorer, encoder), reads the texts of a dataset, which may be None; one process does.

    Raises InputError where a prompt or a length leaves too little of a text.
    """
    import sys

    from lead_ds.models.as_read import SAMPLE, check_room, reading_line

    scorer, encoder = model
    texts = ([], []) if dataset is None else dataset.sample(SAMPLE)
    check_room(encoder, "", *texts)
    if here is None or here.main:
        print(reading_line(scorer, encoder, *texts), file=sys.stderr, flush=True)


def batch_of(given: int | None, device: Any) -> int:
    """The batch size that was given, or the device's default."""
    return given or (16 if device.type == "cpu" else 64)


def layout_of(given: str | None, gpus: int) -> str:
    """The layout that was given, or the default. Raises InputError where there is nothing to lay out."""
    choice("--layout", given or "shard", "shard", "replicate")
    if gpus < 2:
        unused({"--layout": given}, "is of an index on several GPUs", "add --gpus, or take it out")
    return given or "shard"


def unused(given: Mapping[str, Any], why: str, remedy: str) -> None:
    """Raise InputError for an option that was given, and that the command would not read."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise InputError(name, why, remedy)


def choice(option: str, value: str, *valid: str) -> None:
    """Refuse a value that is not among the valid ones."""
    if value not in valid:
        raise InputError(option, f"{value!r} is unknown", f"use {' or '.join(valid)}")
