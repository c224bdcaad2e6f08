"""From what Python gives a run to its configuration, the same tree that a YAML file holds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lead_ds.config import Config
from lead_ds.config.load import parse_config
from lead_ds.data.taught.relevance import MANIFEST
from lead_ds.errors import InputError
from lead_ds.face.model import Model
from lead_ds.losses import LOSSES, Chosen, Loss, register
from lead_ds.models.load import kind_of
from lead_ds.models.own import probe
from lead_ds.settings.base import Section
from lead_ds.settings.data import DataConfig
from lead_ds.settings.roles import Share
from lead_ds.settings.train import TrainConfig

WHERE = "Distiller"
ROWS = "(rows given from Python)"  # data.path of a run whose groups are in memory

ModelLike = Model | nn.Module | str | Path | Mapping[str, Any]
_READ_OF_OWN = {"dtype", "scale"}
# Settings that stand beside sections, by the section that they are of: Distiller(steps=100) is train.steps.
_SHORT: tuple[tuple[str, type[Section], frozenset[str]], ...] = (
    ("train", TrainConfig, frozenset[str]()),
    ("data", DataConfig, frozenset({"path", "train"})),
)


def compose(
    teacher: ModelLike | Sequence[ModelLike] | None,
    student: ModelLike,
    data: Any,
    losses: Mapping[str, Any] | Sequence[Any] | None,
    settings: Mapping[str, Any],
) -> Config:
    """The checked configuration of a run. Raises InputError for what cannot be, with the nearest name of what is unknown."""
    tree: dict[str, Any] = {"student": model_section(student, "student"), "data": data_section(data)}
    sections = {key: model_section(one, "teacher") for key, one in given_teachers(teacher).items()}
    if sections.keys() == {"teacher"}:
        tree["teacher"] = sections["teacher"]
    elif sections:
        tree["teachers"] = list(sections.values())
    tree["losses"] = losses_section(losses, teacher is not None)
    for name, value in settings.items():
        place_setting(tree, name, value)
    config = parse_config(tree, WHERE)
    if module_of(student) is not None or modules_of(teacher):
        check_own(config)
    return config


def model_section(model: ModelLike, role: str) -> dict[str, Any]:
    """The section of a model: of one that is loaded, or in a directory, or given as the section itself."""
    if isinstance(model, Model):
        model = model.section
    if module_of(model) is not None:
        return own_section(model, role)
    if isinstance(model, str | Path):
        model = {"path": model}
    if not isinstance(model, Mapping):
        what = f"a {type(model).__name__} is not a {role}"
        remedy = "give load(...), a path, a torch module, or a section such as {'path': ..., 'kind': ...}"
        raise InputError(f"{WHERE}: {role}", what, remedy)
    section = dict(model)
    if "path" in section:
        path = Path(section["path"]).expanduser()
        section["path"] = str(path) if path.exists() else str(section["path"])
        if "kind" not in section:
            taught = role == "teacher" and (path / MANIFEST).exists()
            section["kind"] = "cached" if taught else kind_of(section["path"])
    return section


def module_of(model: object) -> nn.Module | None:
    """The module that is given in place of a path: itself, or as `module` of a section."""
    model = model.section if isinstance(model, Model) else model
    model = model.get("module") if isinstance(model, Mapping) else model
    return model if isinstance(model, nn.Module) else None


def given_teachers(teacher: Any) -> dict[str, Any]:
    """What is given as teachers, by the keys that they have in the configuration."""
    if isinstance(teacher, list | tuple):
        return {f"teachers.{place}": one for place, one in enumerate(teacher)}
    return {} if teacher is None else {"teacher": teacher}


def modules_of(teacher: Any) -> dict[str, nn.Module]:
    """The modules that are given in place of teachers, by the keys that these have in the configuration."""
    return {key: module for key, one in given_teachers(teacher).items() if (module := module_of(one)) is not None}


def own_section(model: Any, role: str) -> dict[str, Any]:
    """The section of a module of one's own: what is read of it is a dual encoder's. Raises InputError for what is not."""
    module = module_of(model)
    assert module is not None
    probe(module)
    section = {name: value for name, value in model.items() if name != "module"} if isinstance(model, Mapping) else {}
    allowed = {"batch_size", *Share.model_fields} if role == "teacher" else {"dims"}
    ignored = sorted(section.keys() - _READ_OF_OWN - allowed)
    if ignored:
        remedy = f"the module itself decides: take it out; {', '.join(sorted(_READ_OF_OWN))} are read"
        raise InputError(f"{WHERE}: {role}.{ignored[0]}", "is ignored by a module of your own", remedy)
    where = {"placement": "replicate", "truncate": False} if role == "teacher" else {}
    name = f"({type(module).__name__} given from Python)"
    return {"kind": "dual_encoder", "path": name, "attention": "sdpa", **where, **section}


def check_own(config: Config) -> None:
    """Refuse what a run with modules of one's own cannot do."""
    tapped = config.losses.needing("attention")
    for key, value, off in (
        ("train.grad_cache", config.train.grad_cache, None),
        ("data.token_cache", config.data.token_cache, False),
        (f"losses.{''.join(tapped[:1])}.weight", tapped, 0),
    ):
        if value:
            raise InputError(f"{WHERE}: {key}", "needs models of a kind, not a module of your own", f"set it to {off}")


def data_section(data: Any) -> dict[str, Any]:
    """The section of the training data: a folder, a file of groups, the section itself, a list of sets, or rows, which have
    no path."""
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        folder = path.parent.parent if path.parent.name == "qrels" else path.parent  # where corpus and queries lie
        return {"path": str(folder), "train": str(path.relative_to(folder))} if path.is_file() else {"path": str(path)}
    if isinstance(data, Mapping):
        if hasattr(data, "column_names"):
            splits = ", ".join(map(str, data))
            raise InputError(
                f"{WHERE}: data", f"is a DatasetDict with {splits}", "give one of them, such as data['train']"
            )
        return dict(data)
    if isinstance(data, Sequence) and data and all(isinstance(one, Mapping) and "path" in one for one in data):
        return {"sets": [dict(one) for one in data]}
    return {"path": ROWS}


def losses_section(losses: Mapping[str, Any] | Sequence[Any] | None, taught: bool) -> dict[str, Any]:
    """The section of the losses: those that are named have a weight. None: the defaults, of labels alone without a teacher."""
    if losses is None:
        return {} if taught else only({"contrastive": {}})
    if isinstance(losses, Mapping):
        return only(losses)
    if not isinstance(losses, Sequence) or isinstance(losses, str):
        remedy = "give a list such as [losses.Response(weight=3)], or a dictionary"
        raise InputError(f"{WHERE}: losses", f"a {type(losses).__name__} is not a set of losses", remedy)
    chosen: dict[str, Any] = {}
    for item in losses:
        name, values = chosen_loss(item)
        if name in chosen:
            raise InputError(f"{WHERE}: losses", f"{name} is there twice", "add their weights up in one of them")
        chosen[name] = values
    return only(chosen)


def chosen_loss(item: object) -> tuple[str, dict[str, Any]]:
    """Name and settings of one loss: its class, or what this gives when called with settings. A new class is registered."""
    loss, values = (item.loss, item.values) if isinstance(item, Chosen) else (item, {})
    if not (isinstance(loss, type) and issubclass(loss, Loss)):
        remedy = "give losses.Response(weight=3), or a class of your own: a subclass of lead_ds.losses.Loss"
        raise InputError(f"{WHERE}: losses", f"a {type(item).__name__} is not a loss", remedy)
    try:
        register(loss)
    except (AttributeError, ValueError) as error:
        raise InputError(f"{WHERE}: losses.{loss.__name__}", str(error), "give it a name of its own") from None
    return loss.name, values


def only(losses: Mapping[str, Any]) -> dict[str, Any]:
    """A section in which every other loss is switched off."""
    others = {name: {"weight": 0.0} for name in LOSSES if name not in losses}
    return others | {name: {"weight": 1.0, **values} for name, values in losses.items()}


def place_setting(tree: dict[str, Any], name: str, value: Any) -> None:
    """Put one keyword where it belongs: a section or a setting of the whole run, or one of `train` or `data`."""
    if name in Config.model_fields and name not in ("teacher", "teachers", "student", "losses"):
        if isinstance(value, Mapping):
            tree[name] = {**tree.get(name, {}), **value}
        elif name == "data":
            raise InputError(f"{WHERE}: data", "is given twice", "give it once")
        else:
            tree[name] = str(value) if isinstance(value, Path) else value
        return
    for section, kind, hidden in _SHORT:
        if name in kind.model_fields and name not in hidden:
            tree[section] = {**tree.get(section, {}), name: value}
            return
    known = {*Config.model_fields, *(name for _, kind, hidden in _SHORT for name in set(kind.model_fields) - hidden)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else "see ds_configs/recipes/ for what can be set"
    raise InputError(f"{WHERE}: {name}", "unknown setting", remedy)
