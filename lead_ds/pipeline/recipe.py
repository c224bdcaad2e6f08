"""From a recipe to its stages: which there are, what each one's command is, and what decides its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_ds.config import Config, load_config
from lead_ds.errors import InputError
from lead_ds.io.fingerprints import Fingerprints
from lead_ds.models.kinds.kind import KINDS, kinds_that
from lead_ds.pipeline.ready import Ready, reading_settings
from lead_ds.pipeline.settings import deciding, existing, flat, options_of
from lead_ds.pipeline.stage_graph import Made, Reads, StageGraph
from lead_ds.retrieval.metrics import DEFAULT_DEPTH, depth, parse_measure
from lead_ds.settings.data import DataConfig
from lead_ds.settings.documents import in_yaml
from lead_ds.settings.parse import key_of
from lead_ds.settings.pipeline import EvaluateStage, LensStage, Mining, PipelineConfig, TeachStage
from lead_ds.settings.train import EvaluationConfig
from lead_ds.teachers.open import teacher_class

MAIN = "distilled"


@dataclass(frozen=True)
class Evaluation:
    """What a stage of the family `evaluate` measures."""

    model: str
    data: str
    item: EvaluateStage
    stage: str


@dataclass(frozen=True)
class Given:
    """What a command reads beside the output of stages: models by path, and what decides of them."""

    models: tuple[str, ...]
    tree: dict[str, str]


class Recipe:
    """A configuration file with overrides, and the stages that it describes."""

    def __init__(self, path: Path, overrides: Sequence[str], fingerprints: Fingerprints | None = None) -> None:
        self.path, self.overrides = path, list(overrides)
        self.config = load_config(path, overrides)
        self.text = path.read_bytes()
        self.pipeline = self.config.pipeline or PipelineConfig()
        self.output = Path(self.config.output)
        self.fingerprints = fingerprints or Fingerprints(self.output / "stages" / "fingerprints.json")
        self._data = Path(self.config.data.path)
        self._graph = StageGraph(self.output / "stages", self._data, self.fingerprints)
        self.stages = self._graph.stages
        self.evaluations: list[Evaluation] = []
        self._plan()

    def unchanged(self) -> bool:
        """Whether the file is as it was: a command that is started now reads it again."""
        if self.path.read_bytes() == self.text:
            return True
        return load_config(self.path, self.overrides) == self.config

    def _plan(self) -> None:
        pipeline = self.pipeline
        if pipeline.prepare:
            self._prepare()
        groups, first, teacher, student = "", "", "", ""
        if pipeline.first is not None or pipeline.mine is None:
            groups = self._first_negatives()
        if pipeline.first is not None:
            first = self._train("first", "warmup", "student", pipeline.first, groups)
        if pipeline.mine is not None:
            groups = self._mine(first)
        if pipeline.teacher is not None:
            teacher = self._train("teacher", "warmup", "teacher", pipeline.teacher, groups)
        if pipeline.student is not None:
            student = self._train("student", "warmup", "student", pipeline.student, groups)
        lens = self._teach("lens", pipeline.lens, groups, teacher)
        cache = self._teach("teach", pipeline.teach, groups, teacher, lens)
        sources = {"student": student, "teacher": teacher, "lens": lens, "cache": cache}
        distilled = self._train("distill", "distill", "", {}, groups, **sources)
        run = self.stages[distilled].folder / "run"
        self._graph.add("report", ["report", run, "--out"], Made("report", ("report/*",)), needs=[distilled])
        made = {"first": first, "teacher": teacher, "student": student, MAIN: distilled}
        for name in pipeline.models:
            self._evaluate(name, made)

    def _prepare(self) -> None:
        commands = []
        for stage in self.pipeline.prepare:
            command: list[Any] = ["prepare", stage.kind, stage.src, self._data]
            options = stage.model_dump(exclude={"kind", "src", "triples"}, exclude_defaults=True)
            commands.append([*command, *options_of(options), *([] if stage.triples else ["--no-triples"])])
        deciding = {"prepare": [stage.model_dump(mode="json") for stage in self.pipeline.prepare]}
        made = Made(None, ("*.jsonl", "qrels/*.tsv"), root=self._data)
        self._graph.add("prepare", commands[0], made, deciding, more=commands[1:])

    def _first_negatives(self) -> str:
        settings = self.pipeline.negatives
        if settings.source == "given":
            return ""
        if settings.source == "random":
            return f"qrels/{settings.split}.tsv"
        return self._mined("negatives", settings, [], [], {})

    def _mine(self, first: str) -> str:
        settings = self.pipeline.mine
        assert settings is not None
        if settings.model is None:
            model = self.stages[first].folder / "run" / "model"
            return self._mined("mine", settings, ["--model", model], [first], {})
        inputs = {"model": self.fingerprints.model(settings.model)}
        return self._mined("mine", settings, ["--model", settings.model], [], inputs, models=(settings.model,))

    def _mined(
        self,
        name: str,
        settings: Mining,
        source: list[Any],
        needs: list[str],
        inputs: dict[str, str],
        models: tuple[str, ...] = (),
    ) -> str:
        options = settings.model_dump(include=set(Mining.model_fields))
        command = ["mine", "--data", self._data, *source, *options_of(options), "--out"]
        reads = Reads(self._graph.files("corpus.jsonl", "queries.jsonl", f"qrels/{settings.split}.tsv"))
        made = Made("train.jsonl", ("train.jsonl",))
        return self._graph.add(name, command, made, {"mine": options} | inputs, needs, reads, models=models)

    def _train(self, name: str, command: str, of: str, changes: Mapping[str, Any], groups: str, **sources: str) -> str:
        """Add a stage of `warmup` or `distill`; `sources`: stages that give its models, lens and cache."""
        wiring, needs = self._wiring(groups, **sources)
        overrides, config = self._settings(name, {**flat(changes), **wiring})
        kind = "none" if config.teacher is None else config.teacher.kind
        if of == "teacher" and not _trainable(kind):
            what = f"a teacher of kind {kind} cannot be warmed up"
            raise InputError(
                f"{self.path}: pipeline.teacher", what, "set pipeline.teacher=null: it is used as it comes"
            )
        if name == "first" and not KINDS[config.student.kind].gives_vectors:
            what = f"a {config.student.kind} cannot search for negatives"
            remedy = f"set pipeline.first.student.kind={kinds_that('gives_vectors')}"
            raise InputError(f"{self.path}: pipeline.first", what, remedy)
        tree = deciding(config)
        if of:
            for part in ("student" if of == "teacher" else "teacher", "losses"):
                tree.pop(part, None)
            others = {"teacher_temperature"} if of == "student" else set()
            tree.pop("teachers", None)
            tree |= {"contrastive": config.losses.contrastive.model_dump(exclude_defaults=True, exclude=others)}
            del tree["deepspeed"]["teacher"]
        given = self._given(config, wiring, groups, (of,) if of else ("student", *config.taught))
        tree |= given.tree
        product = "student" if command == "distill" else "model"
        return self._graph.add(
            name,
            [command, self.path, *overrides, *(["--of", of] if of else [])],
            Made("run", (f"run/{product}/**/*",), resumes="run/config.yaml"),
            tree,
            needs,
            Reads(self._training_files(config.data, groups), self._evaluation_files(config.evaluation)),
            models=given.models,
            distributed=True,
        )

    def _teach(
        self, name: str, settings: LensStage | TeachStage | None, groups: str, teacher: str, lens: str = ""
    ) -> str:
        """Add the stage that reads the frozen teacher: a lens that is fitted to it, or a cache of its output."""
        if settings is None:
            return ""
        wiring, needs = self._wiring(groups, teacher=teacher, lens=lens)
        overrides, config = self._settings(name, wiring)
        if config.teacher is None or config.cotrained or not teacher_class(config.teacher.kind).computes:
            what = "reads a teacher that is there and stays as it is"
            remedy = "set teacher.train=false and name the teacher itself"
            if config.teachers:
                what, remedy = (
                    "reads one teacher, and there are several",
                    f"set pipeline.{name}=null: see --teacher of it",
                )
            raise InputError(f"{self.path}: pipeline.{name}", what, remedy)
        fits = name == "lens"
        product = "lens" if fits else "cache"
        asked = settings.model_dump(exclude_none=True)
        options = options_of(asked)
        tree = {key: value for key, value in deciding(config).items() if key in ("seed", "teacher", "data", "train")}
        tree |= {"options": asked, "temperature": config.losses.layer.teacher_temperature if fits else None}
        if asked.get("vectors") == "auto":
            tree["layer"] = config.losses.layer.model_dump(mode="json")
        given = self._given(config, wiring, groups, ("teacher",))
        tree |= given.tree
        return self._graph.add(
            name,
            ["fit-lens" if fits else "teach", self.path, *overrides, *options, "--out"],
            Made(product, (f"{product}/*",), repairs=True),
            tree,
            needs,
            Reads(self._training_files(config.data, groups)),
            models=given.models,
            distributed=True,
        )

    def _given(self, config: Config, wiring: Mapping[str, Any], groups: str, roles: Sequence[str]) -> Given:
        """The models, lens and groups that a command reads and no stage makes."""
        sections = {"student": config.student, **config.taught}
        given = {role: path for role in roles if (path := getattr(sections.get(role), "path", ""))}
        paths = {role: path for role, path in given.items() if f"{role}.path" not in wiring}
        tree = {f"{role} model": self.fingerprints.model(path) for role, path in paths.items()}
        if groups not in self.stages:
            tree["groups"] = config.data.train
        for role, teacher in config.taught.items():
            if role in roles and getattr(teacher, "lens", "head") == "tuned" and f"{role}.lens_path" not in wiring:
                name = "lens" if role == "teacher" else f"{role} lens"
                tree[name] = self.fingerprints.model(str(teacher.lens_path or config.lens_folder))
        return Given(tuple(paths.values()), tree)

    def _evaluate(self, model: str, made: Mapping[str, str]) -> None:
        """Add encode and index of every dataset, search and evaluate of every split, with one of the models."""
        if not self.pipeline.evaluate:
            return
        own = documents = self._ready(model, made[model])
        if model == MAIN and self.pipeline.documents == "teacher":
            documents = self._ready("teacher", made["teacher"])
        for item in self.pipeline.evaluate:
            data = self._data if item.data is None else Path(item.data)
            named = [] if item.data is None else [item.name or data.name]
            parts = [*([] if model == MAIN else [model]), *named]
            encode, index = "-".join(["encode", *parts]), "-".join(["index", *parts])
            if encode not in self.stages:
                self._encode(encode, documents, data)
                self._index(index, encode)
            elif str(data) not in self.stages[encode].commands[0]:
                raise InputError(
                    f"{self.path}: pipeline.evaluate", f"two datasets are called {data.name!r}", "set name"
                )
            stage = self._search(item, own, documents, data, [*parts, item.split], index)
            self.evaluations.append(Evaluation(model, named[0] if named else data.name, item, stage))

    def _ready(self, model: str, stage: str) -> Ready:
        """A model to search with, that a stage makes, or as it comes. Raises InputError for one that gives no vectors."""
        section = self.config.teacher if model == "teacher" else self.config.student
        if model != "first" and (section is None or not _gives_vectors(section.kind)):
            what = f"the {model} gives no vectors to index"
            raise InputError(f"{self.path}: pipeline.models", what, "leave it out of models, or set evaluate: []")
        if stage:
            made = self.stages[stage].folder / "run" / ("student" if model == MAIN else "model")
            return Ready(str(made), [stage], {}, ())
        path, settings = self._as_it_comes(model), reading_settings(section)
        inputs = {"model": self.fingerprints.model(path)} | ({"settings": " ".join(settings)} if settings else {})
        return Ready(path, [], inputs, (path,), settings)

    def _as_it_comes(self, model: str) -> str:
        """The path of a model that no stage trains. Raises InputError for one that is only made when training starts."""
        section = self.config.teacher if model == "teacher" else self.config.student
        assert section is not None
        if any(getattr(section, name, None) for name in ("layers", "width")) or section.weights == "random":
            what = f"the {model} is made at start of training"
            raise InputError(f"{self.path}: pipeline.models", what, f"take {model} out, or warm it up")
        return section.path

    def _encode(self, name: str, model: Ready, data: Path) -> None:
        settings = self.pipeline.encode
        options = options_of(settings.model_dump(exclude_defaults=True))
        self._graph.add(
            name,
            ["encode", *model.settings, "--model", model.path, "--data", data, *options, "--out"],
            Made("vectors", ("vectors/*",), repairs=True),
            {"encode": settings.model_dump(exclude={"batch_size"} | ({"dim"} if settings.dim is None else set()))}
            | model.inputs,
            model.needs,
            Reads(self._graph.files("corpus.jsonl", data=data)),
            models=model.models,
            distributed=True,
        )

    def _index(self, name: str, encode: str) -> None:
        settings = self.pipeline.index
        options = settings.model_dump(include={"factory", "gpus", "layout"}, exclude_defaults=True)
        command = ["index", "--vectors", self.stages[encode].folder / "vectors", *options_of(options), "--out"]
        self._graph.add(name, command, Made("index", ("index/*",)), {"index": {"factory": settings.factory}}, [encode])

    def _search(
        self, item: EvaluateStage, own: Ready, documents: Ready, data: Path, parts: list[str], index: str
    ) -> str:
        for measure in item.measures:
            parse_measure(measure, item.relevance_level)
        settings, search = self.pipeline.index, "-".join(["search", *parts])
        if search in self.stages:
            where = f"{self.path}: pipeline.evaluate"
            raise InputError(where, f"split {item.split!r} is given twice", "list all measures of a split together")
        options: dict[str, Any] = {"split": item.split}
        if (
            depth(item.measures) > DEFAULT_DEPTH
        ):  # else as many as measures without a cutoff read, or all that there are
            options["k"] = depth(item.measures)
        options |= settings.model_dump(
            include={"gpus", "layout", "nprobe", "ef_search", "rescored"}, exclude_defaults=True
        )
        qrels = f"qrels/{item.split}.tsv"
        two = own is not documents
        inputs = own.inputs | ({"documents": documents.path, **documents.inputs} if two and documents.inputs else {})
        folder, models = self.stages[index].folder / "index", own.asking(documents if two else None)
        command = ["search", *models, "--data", data, "--index", folder, *options_of(options)]
        self._graph.add(
            search,
            [*command, "--tag", search, "--out"],
            Made("run.trec", ("run.trec",)),
            {"search": {key: value for key, value in options.items() if key not in ("gpus", "layout")}} | inputs,
            [*own.needs, *(documents.needs if two else []), index],
            Reads(self._graph.files("queries.jsonl", "corpus.jsonl", qrels, data=data)),
        )
        return self._graph.add(
            "-".join(["evaluate", *parts]),
            [
                *["evaluate", "--run", self.stages[search].folder / "run.trec", "--qrels", existing(data / qrels)],
                *["--measures", " ".join(item.measures), "--relevance-level", item.relevance_level],
                *["--per-query", "--json"],
            ],
            Made("scores.json", ("scores.json",)),
            {"evaluate": {"measures": item.measures, "relevance_level": item.relevance_level}},
            [search],
            Reads(self._graph.files(qrels, data=data)),
        )

    def _wiring(self, groups: str, **sources: str) -> tuple[dict[str, Any], list[str]]:
        """Keys that lead a command to what earlier stages made, and those stages. `groups`: a stage, a file, or as given."""
        wiring: dict[str, Any] = {}
        needs = [name for name in (groups, *sources.values()) if name in self.stages]
        if groups in self.stages:
            wiring["data.train"] = str((self.stages[groups].folder / "train.jsonl").absolute())
        elif groups:
            wiring["data.train"] = groups
        if student := sources.get("student"):
            wiring["student.path"] = str(self.stages[student].folder / "run" / "model")
            # The model was cut, and drawn at random, when it was warmed up.
            wiring |= {f"student.{name}": None for name in ("layers", "width") if getattr(self.config.student, name)}
            wiring |= {"student.weights": "pretrained"} if self.config.student.weights == "random" else {}
        if cache := sources.get("cache"):
            wiring |= {"teacher.kind": "cached", "teacher.path": str(self.stages[cache].folder / "cache")}
            return wiring, needs
        if teacher := sources.get("teacher"):
            wiring["teacher.path"] = str(self.stages[teacher].folder / "run" / "model")
            if getattr(self.config.teacher, "weights", "") == "random":
                wiring["teacher.weights"] = "pretrained"
        if lens := sources.get("lens"):
            wiring |= {"teacher.lens": "tuned", "teacher.lens_path": str(self.stages[lens].folder / "lens")}
        return wiring, needs

    def _settings(self, name: str, changes: Mapping[str, Any]) -> tuple[list[str], Config]:
        """Overrides of a stage's command, and the configuration that it will read."""
        changed = [f"{key}={in_yaml(value)}" for key, value in changes.items()]
        # What the stage has otherwise than the rest of the run stands in place of it.
        instead = ("pipeline.", *(f"{key}." for key in changes))
        own = [override for override in self.overrides if not f"{key_of(override)}.".startswith(instead)]
        try:
            return [*own, *changed], load_config(self.path, [*own, *changed])
        except InputError as error:
            where = error.where.replace(f"{self.path}: ", f"{self.path}: pipeline.{name}.")
            raise InputError(where, error.what, error.remedy) from None

    def _evaluation_files(self, evaluation: EvaluationConfig) -> tuple[Path, ...]:
        """What evaluation during training reads, beside what the training reads."""
        if evaluation.split is None:
            return ()
        elsewhere = () if evaluation.path is None else ("corpus.jsonl", "queries.jsonl")
        data = None if evaluation.path is None else Path(evaluation.path)
        run = () if evaluation.run is None else (Path(evaluation.run),)
        return (*self._graph.files(f"qrels/{evaluation.split}.tsv", *elsewhere, data=data), *run)

    def _training_files(self, data: DataConfig, groups: str) -> tuple[Path, ...]:
        """What a training command reads of the data, beside the groups that a stage makes."""
        files: list[Path] = []
        for part in data.by_name.values():
            folder = Path(part.path)
            files += self._graph.files("corpus.jsonl", "queries.jsonl", data=folder)
            if (folder / part.train).is_dir():  # of texts alone
                files += sorted((folder / part.train).iterdir())
            elif groups not in self.stages:
                files += self._graph.files(part.train, data=folder)
        return tuple(files)


def _trainable(kind: str) -> bool:
    return kind in KINDS and KINDS[kind].can_be_trained


def _gives_vectors(kind: str) -> bool:
    return kind in KINDS and KINDS[kind].gives_vectors
