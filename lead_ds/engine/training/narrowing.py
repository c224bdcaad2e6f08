"""A student that is cut in width before the first step: measured on the run's first texts, kept beside the checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lead_ds.data.batches import Batches
from lead_ds.engine.distributed.agreement import agreed
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.training.fitting import first_windows
from lead_ds.engine.training.objective import said
from lead_ds.errors import InputError
from lead_ds.io.files import atomic
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.narrow import Importance, Kept, Sizes, chosen, first_ones, narrow, sizes_after
from lead_ds.settings.roles import WidthConfig

NARROWED = "narrowed.safetensors"


def narrowed(
    width: WidthConfig | None, student: Kind, batches: Batches, ranks: Ranks, resumed: Path | None
) -> tuple[Kind, Kept]:
    """The student as `width` cuts it, and what of it was kept; itself and {} without. Every rank calls this.

    resumed: the folder of a run that goes on, whose own choice is read. Raises InputError where that is damaged, and as
    `sizes_after` and `narrow`.
    """
    if width is None:
        return student, {}
    sizes = agreed(ranks, lambda: sizes_after(width, student))
    if resumed is not None and ranks.from_main((resumed / NARROWED).exists()):
        kept = agreed(ranks, lambda: load_kept(resumed / NARROWED, sizes, student.num_layers))
    else:
        kept = chosen(measured(student.to(ranks.device), batches, ranks, width.sample), sizes)
    return agreed(ranks, lambda: narrow(student, kept)), kept


def measured(student: Kind, batches: Batches, ranks: Ranks, texts: int) -> dict[str, torch.Tensor]:
    """How much each part does on at least `texts` texts of the run's first windows, or one epoch's. Equal on every process."""
    importance = Importance(student)
    with torch.no_grad(), importance.reading():
        for window in first_windows(batches, ranks, texts):
            for batch in window.student:
                said(student, batch.to(ranks.device))
    student.capture.uninstall()  # the student that is made of this one has hooks of its own
    parts = ranks.all({name: sum_X.numpy() for name, sum_X in importance.sums.items()})
    return {name: torch.from_numpy(sum(part[name] for part in parts)) for name in parts[0]}


def kept_facts(kept: Kept) -> dict[str, str]:
    """The checksum of what was kept; none of a student that was not cut."""
    return {"student.width: kept": _checksum(kept)} if kept else {}


def save_kept(kept: Kept, folder: Path) -> None:
    """Write what was kept to a run's folder, with its checksum; nothing of a student that was not cut."""
    if kept:
        with atomic(folder / NARROWED) as temporary:
            save_file(kept, str(temporary), metadata={"checksum": _checksum(kept)})


def load_kept(path: Path, sizes: Sizes, layers: int) -> Kept:
    """What `save_kept` wrote. Raises InputError for a file that is damaged, or of other sizes."""
    from safetensors import SafetensorError, safe_open

    remedy = "bring it back, or set output= to another folder for a new run"
    try:
        kept = load_file(str(path))
        with safe_open(str(path), "pt") as file:
            checksum = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError) as error:
        raise InputError(path, f"cannot be read: {error}", remedy) from None
    forms = {name: x.shape for name, x in first_ones(sizes, layers).items()}
    if checksum != _checksum(kept) or {name: x.shape for name, x in kept.items()} != forms:
        raise InputError(path, "does not hold what the student was cut to", remedy)
    return kept


def _checksum(kept: Kept) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(kept):
        found.update(name.encode() + b"\0" + kept[name].contiguous().numpy().tobytes())
    return found.hexdigest()
