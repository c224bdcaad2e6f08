"""`fit-lens`: a small affine read-out of each layer of a frozen teacher, fitted on states that were read once.

Layers are independent: each rank fits some of them, and what they become does not depend on how many ranks there are.

Dimensions: T layers, G groups of N passages (the positive first), D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lead_ds.engine.distributed.agreement import agreed
from lead_ds.errors import InputError, RunError
from lead_ds.io.facts import ANOTHER_FOLDER, check_facts
from lead_ds.io.files import atomic, read_json, write_json
from lead_ds.io.owner import owned
from lead_ds.io.progress import progress
from lead_ds.io.provenance import provenance
from lead_ds.models.kinds.kind import KINDS
from lead_ds.models.lens import RECORD, VERSION, WEIGHTS, Lens
from lead_ds.relevance import ScoreFeatures, VectorFeatures
from lead_ds.report.lens import lens_plot
from lead_ds.settings.roles import TeacherRole
from lead_ds.settings.run import Run
from lead_ds.teachers.frozen import to_read
from lead_ds.teachers.informative import worth
from lead_ds.teachers.lens import lens_identity
from lead_ds.teachers.reading import opened
from lead_ds.teachers.states import States, read_states

LOOKS = 20  # at the held-out groups, while a layer is fitted
PATIENCE = 6  # looks without a better one


@dataclass(frozen=True)
class Fit:
    """How a lens is fitted. `held_out`: the part of the groups to stop by, and as much again to report on."""

    groups: int = 2000
    steps: int = 400
    lr: float = 0.003
    batch_size: int = 64
    rank: int = 64
    held_out: float = 0.1
    target: Literal["labels", "final"] = "labels"


def fit_settings(asked: dict[str, Any]) -> Fit:
    """`Fit` with what was requested. Raises InputError for what cannot be."""
    fit = Fit(**asked)
    if not 0 < fit.lr < math.inf:
        raise InputError("--lr", f"is {fit.lr}", "give a learning rate above 0")
    if fit.target not in ("labels", "final"):
        raise InputError("--target", f"is {fit.target!r}", "labels or final")
    if not 0 < fit.held_out < 0.5:
        what = f"is {fit.held_out}: that part of the groups, twice, leaves nothing to fit on"
        raise InputError("--held-out", what, "give a part between 0 and 0.5")
    return fit


def fit_lens(config: Run, out: Path, fit: Fit, *, command: Sequence[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Fit the lens of the configuration's teacher, write it to `out` with its record and plot; the record.

    Every process calls this, on a file system they share. Raises InputError where the teacher can have no lens, where
    `out` holds another teacher's, or where the groups are too few. Raises RunError where a fit does not end in finite
    numbers.
    """
    asked = fittable(config)
    with opened(config, asked, out) as (ranks, config, groups, encoder), owned(out, "another lead-ds fit-lens", ranks):
        settings: TeacherRole = config.teacher
        if groups.alone:
            raise InputError(groups.path, "holds texts alone: a lens is fitted to groups", "name groups, or lens: head")
        facts = agreed(ranks, lambda: check_folder(out, lens_identity(settings, encoder, config.seed)))
        states = read_states(config, out / "states", groups, encoder, fit.groups, ranks, quiet=quiet)
        rows_of = agreed(ranks, lambda: split(states.positives, fit.held_out, config.seed))
        task = Task(states, settings, config.losses.layer.teacher_temperature, rows_of, fit, config.seed, ranks.device)
        mine = range(ranks.rank, states.num_layers, ranks.world)
        fitted = {}
        with progress("fitting", len(mine), "layers", shown=ranks.main and not quiet) as meter:
            for layer in mine:
                fitted[layer] = task.fit_layer(layer)
                meter.advance(1)
        everyone = {layer: found for part in ranks.all(fitted) for layer, found in part.items()}
        lens = Lens.joined([everyone[layer][0] for layer in range(states.num_layers)])
        record = {
            "version": VERSION,
            "form": lens.form,
            "facts": facts,
            "checksum": lens.checksum(facts),
            "data": states.manifest["facts"]["data"],
            "fit": {**asdict(fit), "seed": config.seed, "temperature": task.temperature},
            "groups": {name: len(rows) for name, rows in rows_of.items()},
            "passages": 1 + config.data.negatives,
            "chance": {"nll": math.log(1 + config.data.negatives), "accuracy": 1 / (1 + config.data.negatives)},
            "final": task.final(),
            "layers": [everyone[layer][1] for layer in range(states.num_layers)],
            **provenance(command, ranks.world),
        }
        agreed(ranks, lambda: save_lens(out, lens, record) if ranks.main else None)
        ranks.barrier()
        return record


def fittable(config: Run) -> TeacherRole:
    """The teacher of a configuration. Raises InputError where it can have no lens."""
    teacher = to_read(config)
    if getattr(teacher, "dim", None) is not None:
        raise InputError("teacher.dim", "a lens is fitted to whole vectors", "take it out")
    if KINDS[teacher.kind].lens_form is None:
        has = "none of its layers" if KINDS[teacher.kind].gives_vectors else "one per token"
        what = f"a lens reads one state per text, {teacher.kind} has {has}"
        raise InputError("teacher.kind", what, "distil it as it is")
    if config.data.negatives == 0:
        raise InputError("data.negatives", "is 0: there is nothing to compare a positive with", "set it to 7, say")
    return teacher


def check_folder(out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """`facts`; InputError where `out` is not a folder, or holds the lens of another teacher."""
    if out.exists() and not out.is_dir():
        raise InputError(out, "is a file", "choose a folder with --out")
    if (out / RECORD).exists():
        check_facts(out, "holds the lens", read_json(out / RECORD, ANOTHER_FOLDER).get("facts"), facts)
    return facts


def split(positives: np.ndarray, held_out: float, seed: int) -> dict[str, np.ndarray]:
    """Places of the groups to fit on, to stop by, and to report on; groups of one positive stay together.

    Otherwise a lens could learn held-out positives by remembering passages. Raises InputError where too few differ.
    """
    generator = np.random.default_rng([seed, 0x1E45])
    _, owner, sizes = np.unique(positives, return_inverse=True, return_counts=True)
    order = generator.permutation(len(sizes))
    before = np.empty(len(sizes), np.int64)
    before[order] = np.cumsum(sizes[order]) - sizes[order]
    place, wanted = before[owner], int(len(positives) * held_out)
    bounds = {"stop": (0, wanted), "report": (wanted, 2 * wanted), "fit": (2 * wanted, len(positives))}
    rows_of = {name: np.flatnonzero((first <= place) & (place < last)) for name, (first, last) in bounds.items()}
    if any(len(rows) == 0 for rows in rows_of.values()):
        what = f"{len(positives)} groups have {len(sizes)} positives: too few to hold some out"
        raise InputError("--groups", what, "use more groups")
    return rows_of


class Task:
    """States, and how to fit a layer on them."""

    def __init__(
        self,
        states: States,
        settings: TeacherRole,
        temperature: float,
        rows_of: dict[str, np.ndarray],
        fit: Fit,
        seed: int,
        device: torch.device,
    ) -> None:
        self.states, self.scale, self.temperature = states, settings.scale, temperature
        self.fit, self.seed, self.device = fit, seed, device
        self.rows_of = {name: torch.from_numpy(rows).to(device) for name, rows in rows_of.items()}
        self.final_log_GN = self.logits(*self.read(-1)).log_softmax(-1)

    def read(self, layer: int) -> tuple[Tensor, ...]:
        """What the layer's own read-out gives: scores [G, N], or vectors of queries [G, D] and passages [G, N, D]."""
        names = ("own",) if self.states.pairs else ("queries", "passages")
        return tuple(self.states.layer(name, layer, self.device) for name in names)

    def logits(self, *said: Tensor) -> Tensor:
        """[G, N]: what the layer loss compares, over its temperature."""
        if self.states.pairs:
            features: ScoreFeatures | VectorFeatures = ScoreFeatures(said[0].unsqueeze(0), self.scale)
        else:
            q_GD, p_GND = said
            if self.states.manifest["normalize"]:
                q_GD, p_GND = (torch.nn.functional.normalize(x, dim=-1) for x in (q_GD, p_GND))
            features = VectorFeatures(q_GD.unsqueeze(0), p_GND.flatten(0, 1).unsqueeze(0), self.scale)
        group_size = said[-1].shape[1]
        return features.group_relevance(group_size).logits[0] / self.temperature

    def fit_layer(self, layer: int) -> tuple[Lens, dict[str, Any]]:
        """The read-out of a layer, as a lens of one, and what it was worth on the groups to report on."""
        fit, pairs = self.fit, self.states.pairs
        own = self.read(layer)
        states = (self.states.layer("states", layer, self.device),) if pairs else own
        # In units of what the layer holds, so that one learning rate does for any model.
        unit_D = states[-1][self.rows_of["fit"]].flatten(0, 1).std(0) + 1e-6 if pairs else _rms(states[-1])
        lens = Lens.identity("scores" if pairs else "vectors", layer + 1, self.states.width, fit.rank, self.seed)
        free = {name: x[layer:].to(self.device).requires_grad_() for name, x in lens.tensors.items()}

        def fitted() -> Lens:
            tensors = dict(free)
            if pairs:
                tensors["weight_TD"] = free["weight_TD"] / unit_D
            else:
                tensors["bias_TD"] = free["bias_TD"] * unit_D
            return Lens("scores" if pairs else "vectors", tensors)

        def logits(rows: Tensor, through: Lens | None = None) -> Tensor:
            one = fitted() if through is None else through
            said = []
            for had, state in zip(own, states, strict=True):
                x = state[rows]
                flat = one.through(had[rows].flatten(0, x.dim() - 2).unsqueeze(0), x.flatten(0, -2).unsqueeze(0), [0])
                said.append(flat.view(had[rows].shape))
            return self.logits(*said)

        optimizer = torch.optim.Adam(free.values(), lr=fit.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / fit.steps)
        generator = torch.Generator().manual_seed(self.seed * 4099 + layer)
        every = max(1, fit.steps // LOOKS)
        best, best_step, kept = math.inf, 0, fitted()
        for step in range(fit.steps + 1):
            if step % every == 0 or step == fit.steps:
                with torch.no_grad():
                    loss = float(self.loss(logits(self.rows_of["stop"]), self.rows_of["stop"]))
                if loss < best:
                    best, best_step = loss, step
                    kept = Lens(lens.form, {name: x.detach().clone() for name, x in fitted().tensors.items()})
                elif step - best_step >= PATIENCE * every:
                    break
            if step < fit.steps:
                drawn = torch.randint(len(self.rows_of["fit"]), (fit.batch_size,), generator=generator)
                rows = self.rows_of["fit"][drawn.to(self.device)]
                optimizer.zero_grad()
                self.loss(logits(rows), rows).backward()
                optimizer.step()
                schedule.step()
        if not math.isfinite(best):
            raise RunError(f"layer {layer}", "its lens came to no finite number", "lower --lr")
        rows = self.rows_of["report"]
        with torch.no_grad():
            before, after = _worth(self.logits(*(had[rows] for had in own))), _worth(logits(rows, kept))
        return kept.to("cpu"), {"layer": layer, "before": before, "after": after, "stopped_at": best_step}

    def loss(self, logits_GN: Tensor, rows_G: Tensor) -> Tensor:
        """NLL of the positive, or KL from the teacher's final distribution; the mean over groups."""
        log_GN = logits_GN.log_softmax(-1)
        if self.fit.target == "labels":
            return -log_GN[:, 0].mean()
        final_GN = self.final_log_GN[rows_G]
        return (final_GN.exp() * (final_GN - log_GN)).sum(-1).mean()

    def final(self) -> dict[str, float]:
        """What the final state is worth, which no lens changes."""
        return _worth(self.final_log_GN[self.rows_of["report"]])


def save_lens(out: Path, lens: Lens, record: dict[str, Any]) -> None:
    """Write a lens; its record last, whose checksum the weights must have."""
    with atomic(out / WEIGHTS) as temporary:
        lens.save_weights(temporary)
    write_json(out / RECORD, record)
    with atomic(out / "lens.png") as temporary:
        temporary.write_bytes(lens_plot(record))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _worth(logits_GN: Tensor) -> dict[str, float]:
    nll_G, first_G = worth(logits_GN)
    return {"nll": float(nll_G.mean()), "accuracy": float(first_G.mean())}
