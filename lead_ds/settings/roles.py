"""What a model is set by as the teacher or the student of a run, beside what its kind is set by."""

from __future__ import annotations

from pydantic import Field

from lead_ds.settings.base import Section


class Trained(Section):
    """Of a teacher that learns along: these decide a run, but not what the model says of a text."""

    train: bool = Field(
        False, description="co-train the teacher, as LEAD's paper does: in the student's engine and dtype"
    )
    lr: float | None = Field(None, gt=0, description="learning rate of a co-trained teacher; null: train.lr")
