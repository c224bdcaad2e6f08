"""Commands that take a trained model elsewhere: export, push."""

from __future__ import annotations

from pathlib import Path

import typer

from lead_ds.cli.options import SETTINGS, check_settings, choice, tell_reading, unused
from lead_ds.errors import InputError


def export(
    out: Path = typer.Argument(..., help="The folder to write; it must not be there yet."),
    settings: list[str] | None = SETTINGS,
    model: str = typer.Option(..., "--model", help="A student, sentence-transformers or Hugging Face directory."),
    to: str = typer.Option(..., "--to", help="onnx, int8 (ONNX with 8-bit weights), sentence-transformers or router."),
    document_model: str | None = typer.Option(
        None,
        "--document-model",
        help="With --to router: what encodes documents, in the same space as --model, which asks.",
    ),
    data: Path | None = typer.Option(None, "--data", help="Measure both models on this dataset as well."),
    split: str | None = typer.Option(None, "--split", help="With --data: which qrels/SPLIT.tsv.", show_default="test"),
) -> None:
    """Export a dual encoder: one ONNX graph from token ids to the finished vector, its int8 form, or a plain directory.

    The result is compared with the original before it is put in place. ONNX must give the same vectors to 1e-4; of int8
    the cosine to them is reported, and with --data what it costs in nDCG@10. Beside the model stand tokenizer,
    configuration and card.

    lead-ds export --model runs/x/student --to onnx exported/onnx

    lead-ds export --model runs/x/student --document-model models/teacher --to router exported/both

    lead-ds export --model runs/x/student --to int8 --data data/scifact exported/int8

    lead-ds export --model intfloat/e5-base-v2 --to onnx exported/e5 query_prompt="query: " passage_length=256
    """
    if data is None:
        unused({"--split": split}, "is of --data", "add --data, or take it out")
    split = split or "test"
    choice("--to", to, "onnx", "int8", "sentence-transformers", "router")
    if (document_model is not None) != (to == "router"):
        raise InputError("--document-model", "goes with --to router, and it with that", "give both, or neither")
    if document_model is not None:
        if settings:
            raise InputError(
                settings[0], "is ignored by --to router, which keeps both models as they are", "take it out"
            )
        if data is not None:
            raise InputError("--data", "is not measured with --to router", "use lead-ds evaluate --model OUT --data")
        from lead_ds.models.router import save_router
        from lead_ds.retrieval.evaluate import open_encoder

        query, document = ((path, open_encoder(path, "cpu")) for path in (model, document_model))
        save_router(query, document, out)
        print(f"{out}: queries by {model}, documents by {document_model}; {query[1][0].features_width} dimensions")
        return
    from lead_ds.models.export import MODEL, export_onnx, export_sentence_transformers
    from lead_ds.models.onnx_file import OnnxEncoder
    from lead_ds.retrieval.evaluate import open_encoder

    if data is not None:
        from lead_ds.data.collections.dataset import Dataset

        dataset = Dataset.open(data)
        dataset.qrels(split)  # what is wrong with it is reported before the work
    given = check_settings(settings)
    opened = open_encoder(model, "cpu", settings=given)
    tell_reading(opened, None if data is None else dataset)
    if to == "sentence-transformers":
        done = export_sentence_transformers(model, out, settings=given)
    else:
        done = export_onnx(model, out, int8=to == "int8", settings=given)
    print(
        f"{out}: {done.bytes / 1e6:.1f} MB, the original's weights {done.original_bytes / 1e6:.1f} MB; "
        f"cosine to its vectors {done.mean_cosine:.6f} (least {done.least_cosine:.6f}), "
        f"largest difference {done.difference:.1e}"
    )
    if data is None:
        return
    from lead_ds.retrieval.evaluate import Task, evaluate_model

    scorer, encoder = opened
    other = open_encoder(str(out), "cpu")[0] if to == "sentence-transformers" else OnnxEncoder(out / MODEL)
    for name, embed in (("original", scorer.embed), (to, other.embed)):
        scores = evaluate_model(scorer, encoder, Task(dataset, split, ["nDCG@10", "R@100"]), embed=embed)
        print(f"{name:<22}" + "  ".join(f"{measure} {value:.4f}" for measure, value in scores.mean.items()))


def push(
    model: Path = typer.Option(..., "--model", help="The directory to upload: runs/x/student, or an export."),
    repo: str = typer.Option(..., "--repo", help="The repository on the Hugging Face hub: owner/name."),
    public: bool = typer.Option(False, "--public", help="Make a new repository public; private without it."),
    yes: bool = typer.Option(False, "--yes-upload", help="Really upload. Without it the files are only listed."),
) -> None:
    """Upload a model to the Hugging Face hub, when confirmed: without --yes-upload it lists what would go, and stops.

    Weights (safetensors, ONNX), configuration, tokenizer and card go; checkpoints, logs and anything else stay.

    lead-ds push --model runs/x/student --repo me/my-student

    lead-ds push --model runs/x/student --repo me/my-student --yes-upload
    """
    from lead_ds.models.upload import plan_upload, upload

    planned = plan_upload(model, repo, private=not public)
    for name, size in planned.files.items():
        print(f"{size:>14,}  {name}")
    print(f"{planned.bytes:>14,}  bytes in {len(planned.files)} files to {repo}, {'public' if public else 'private'}")
    print(f"licence: {planned.licence or 'none named: add `license:` to the header of README.md'}")
    if planned.left:
        listed = ", ".join(planned.left[:5]) + (", ..." if len(planned.left) > 5 else "")
        print(f"staying here: {len(planned.left)} files ({listed})")
    if not yes:
        raise InputError("--yes-upload", "was not given, so nothing was uploaded", "add it to upload these files")
    print(upload(planned))


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    for command in (export, push):
        app.command()(command)
