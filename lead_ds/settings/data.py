"""Settings of the training data."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lead_ds.settings.base import PACE, PLACE, Fraction, NonNegative, Place, Section


class DataFiles(Section):
    """Where training groups, or texts alone, are, and how they are written."""

    path: Annotated[Place, PLACE]
    train: Annotated[Place, PLACE] = Field(
        "train.jsonl", description="training groups, or a qrels .tsv, or texts alone; relative to path"
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


class DataSet(DataFiles):
    """One set of a mixture."""

    name: str | None = Field(None, description="what its evaluation is called; null: the name of its folder")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="its share is weight * size^alpha")
    prompts: dict[Literal["query", "passage"], str] = Field(
        {}, description="what is put before each of its texts, behind the prompts of the models"
    )

    @property
    def label(self) -> str:
        """Its name."""
        return self.name or PurePath(self.path).name


class DataConfig(DataFiles):
    """Texts, judgements and training groups: of one folder, or of several sets, a mixture."""

    sets: list[DataSet] = Field(
        [], description="a mixture, in place of path, train, format and role; `data: [...]` is short for it"
    )
    alpha: Fraction = Field(1.0, description="of a mixture: how much a set's size decides its share; 0: not at all")
    batches: Literal["mixed", "apart"] = Field(
        "mixed",
        description="of a mixture: a micro-batch holds groups of every set, or, over all ranks, of one set alone",
    )
    negatives: NonNegative = 7
    schedule: Literal["easy_to_hard"] | None = Field(
        None,
        description="which negatives are drawn at which step, of those with a score in the training file. easy_to_hard: of a "
        "half of a group's negatives, which moves from the lowest scores to the highest over the steps",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _first_path(cls, tree: Any) -> Any:
        """A mixture lies where its first set does."""
        sets = tree.get("sets") if isinstance(tree, dict) else None
        first = sets[0] if isinstance(sets, list) and sets else None
        path = first.get("path") if isinstance(first, dict) else getattr(first, "path", None)
        return {"path": path, **tree} if path is not None else tree

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.sets:
            usual = {name: field.default for name, field in DataFiles.model_fields.items()}
            for name, value in {**usual, "path": self.sets[0].path}.items():
                if getattr(self, name) != value:
                    raise ValueError(f"{name} is ignored beside sets: set it in one of them")
            labels = [one.label for one in self.sets]
            if len(set(labels)) < len(labels):
                raise ValueError("two of the sets have one name: set name")
            if self.token_cache:
                raise ValueError("token_cache is of one set: set it to false")
        elif self.alpha != 1 or self.batches != "mixed":
            raise ValueError("alpha and batches are ignored without sets: take them out")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> DataConfig:
        if self.schedule is not None and self.negatives == 0:
            raise ValueError("schedule is ignored without negatives: take it out, or set negatives")
        return self

    @property
    def by_name(self) -> dict[str, DataConfig]:
        """Each set by its name, as if it were alone; of no mixture, itself."""
        shared = self.model_dump(exclude={"sets", "alpha", "batches", *DataFiles.model_fields})
        files = {one.label: one.model_dump(include={*DataFiles.model_fields}) for one in self.sets}
        return {name: DataConfig(**shared, **one) for name, one in files.items()} or {PurePath(self.path).name: self}
