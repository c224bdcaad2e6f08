"""Settings of the training data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lead_ds.settings.base import PACE, PLACE, NonNegative, Place, Section


class DataConfig(Section):
    """Texts, judgements and training groups."""

    path: Annotated[Place, PLACE]
    train: Annotated[Place, PLACE] = Field(
        "train.jsonl", description="training groups, or a qrels .tsv; relative to path"
    )
    format: Literal["auto", "canonical", "qrels", "texts", "tevatron", "flagembedding", "sentence-transformers"] = (
        Field(
            "auto",
            description="auto: by the file's first record. texts: groups that list their texts; or texts alone, in JSON lines, "
            "plain lines or parquet, a file or a folder of them",
        )
    )
    role: Literal["query", "passage"] | None = Field(
        None,
        description="of texts alone, how every one is read; null: as its field says (role, query, passage), else its file's "
        "name (queries...)",
    )
    negatives: NonNegative = 7
    mask_duplicates: bool = Field(
        True, description="an in-batch passage that is also a positive of the query is left out of its distribution"
    )
    keep_identical: bool = Field(
        False,
        description="let a passage that is the query itself, by its id or its text, be its negative, and count it in evaluation",
    )
    token_cache: Annotated[bool | Place, PACE] = Field(
        False,
        description="keep every text's tokens on disk, made once, and put batches together from them: true, or a folder. For "
        "slow tokenizers or few cores; groups of ids only; a model that reads pairs otherwise than text by text goes on "
        "tokenising",
    )
    workers: Annotated[NonNegative, PACE] = Field(
        0, description="data-loader processes per rank; 0: a thread of the rank itself"
    )
