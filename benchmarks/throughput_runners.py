"""The providers of `benchmarks.throughput`: each builds what it trains with, and runs steps under a clock."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import LOOPS, LeadLoop, Loop, Settings
from benchmarks.throughput_inputs import Inputs, Work
from benchmarks.throughput_memory import PeakMemory, allocated, settle
from lead_ds.config import Config
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.distributed.signals import Signals, Stop
from lead_ds.engine.distributed.watchdog import Watchdog
from lead_ds.engine.records.checkpoint import Checkpoints
from lead_ds.engine.records.phases import Phase, PhaseClock, Phases
from lead_ds.engine.records.recorder import Recorder
from lead_ds.engine.training.ahead import with_next
from lead_ds.engine.training.distill import open_inputs, open_teachers, settled
from lead_ds.engine.training.loop import Bookkeeping, Training
from lead_ds.engine.training.numerics import fit_attention
from lead_ds.engine.training.objective import build_objective
from lead_ds.engine.training.trainee import Trainee, build_engine, student_dtype
from lead_ds.models.backbone import load_model
from lead_ds.models.files import transformer_folder
from lead_ds.models.kinds.llm_reranker import LLMReranker, LLMRerankerConfig, answer_tokens
from lead_ds.models.load import load_student
from lead_ds.models.templates import CARDS, Asked
from lead_ds.teachers.frozen import FrozenTeacher, build_teacher, teacher_dtype
from lead_ds.teachers.teach import teach
from lead_ds.teachers.teacher import Lesson, Teacher

Tokens = dict[str, Tensor]


class ProcessorClock(PhaseClock):
    """Counts the process's own time, all its threads': what else a shared CPU does disturbs it less."""

    def _now(self) -> float:
        return time.process_time()


class Relay(Phases):
    """Tells whoever listens now."""

    def __init__(self) -> None:
        self.to = Phases()

    def at(self, phase: Phase) -> None:
        self.to.at(phase)

    def inside(self, phase: Phase) -> AbstractContextManager[None]:
        return self.to.inside(phase)

    def end_step(self) -> None:
        self.to.end_step()


class Runner(ABC):
    """One provider. held: bytes that building it and warming it up left behind."""

    name: str
    talks = False  # whether it communicates
    reads_teacher = True

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        settle(ranks.device)
        self.before, self.held = allocated(ranks.device), 0.0

    @abstractmethod
    def run(self, first: int, count: int, phases: Phases) -> None:
        """Steps `first` to `first + count - 1` of the run, reported to `phases`."""

    @property
    @abstractmethod
    def work(self) -> Work:
        """Of an average step."""

    clock: type[PhaseClock] = PhaseClock
    teacher_dtype = torch.float32
    student_dtype = torch.float32

    def warm_up(self, steps: int) -> None:
        """Steps that nobody times."""
        self.run(0, steps, Phases())
        settle(self.ranks.device)
        self.held = max(0.0, allocated(self.ranks.device) - self.before)

    def timed(self, first: int, count: int) -> list[dict[str, float]]:
        """Seconds of each part of each step."""
        clock = self.clock(self.ranks.device)
        self.run(first, count, clock)
        return clock.seconds()

    def peaks(self, first: int) -> dict[str, float]:
        """Bytes above `held` at the peak of each part of a step."""
        memory = PeakMemory(self.ranks.device)
        self.run(first, 1, memory)
        return memory.peaks

    def now(self) -> float:
        """Bytes in use, with the caches of the allocator emptied."""
        settle(self.ranks.device)
        return allocated(self.ranks.device)

    def close(self) -> None:
        """Let go of everything."""
        self.__dict__ = {"name": self.name, "held": self.held}
        gc.collect()


class LeadDS(Runner):
    """The engine's training loop, assembled as `lead-ds distill` does."""

    talks = True

    def __init__(self, name: str, config: Config, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self.name = name
        config = self.config = settled(config)
        self.reads_teacher = config.losses.needs_teacher
        _, _, batches, _ = open_inputs(config, ranks)
        torch.manual_seed(config.seed)
        self.student_dtype = student_dtype(config.student, ranks.device)
        student = load_student(config.student, self.student_dtype)
        trainee = Trainee(student).to(ranks.device)
        fit_attention(trainee, config.student, batches, self.student_dtype, ranks)
        teachers = open_teachers(config, batches, ranks)
        self.teacher: Teacher | None = teachers.get("teacher")
        trainee.losses = build_objective(config, student, list(teachers.values()), batches, ranks)
        engine = build_engine(trainee, config, self.student_dtype, ranks)
        if isinstance(self.teacher, FrozenTeacher):
            assert config.teacher is not None
            self.teacher_dtype = teacher_dtype(config.teacher, ranks.device)
        else:
            self.reads_teacher = False
        output = Path(config.output).with_name(f"run-{name.replace(' ', '-')}")
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        self.relay = Relay()
        recorder = Recorder(
            output,
            ranks,
            engine,
            stop=Stop(Signals(), ranks),
            train=config.train,
            start=0,
            quiet=True,
        )
        checkpoints = Checkpoints(output / "checkpoints", ranks, config.train.keep)
        self.training = Training(
            config=config,
            ranks=ranks,
            engine=engine,
            teachers=teachers,
            batches=batches,
            evaluator=None,
            books=Bookkeeping(checkpoints, recorder, Watchdog(ranks, 0, output, Signals()), self.relay),
            state={},
        )
        self.output = output

    def run(self, first: int, count: int, phases: Phases) -> None:
        training, self.relay.to = self.training, phases
        training.step = first
        phases.at("waiting for data")
        # A pipeline of its own for each turn: nothing is prepared while others have theirs.
        with contextlib.closing(training.batches.windows(first, first + count)) as windows:  # type: ignore[type-var]
            pairs = with_next(windows) if training.ahead else ((window, None) for window in windows)
            for window, following in pairs:
                training.optimize(window, following)
                training.step += 1
                phases.at("waiting for data")
                phases.end_step()

    @property
    def work(self) -> Work:
        # By the same texts as the others': only a teacher that is here reads any.
        teacher = self.teacher.scorer if isinstance(self.teacher, FrozenTeacher) else None
        config = self.config if teacher is not None else self.config.model_copy(update={"teacher": None})
        inputs = Inputs(config, self.ranks)
        inputs.step(0)
        return inputs.work(self.training.engine.module.student, teacher)


class Bare(Runner):
    """The teacher's forward, where it was placed, and a student's forward and backward; on padded batches prepared before."""

    name = "bare"

    def __init__(self, config: Config, ranks: Ranks, teacher: FrozenTeacher | None = None) -> None:
        super().__init__(config, ranks)
        self.inputs = Inputs(config, ranks)
        self.student_dtype = student_dtype(config.student, ranks.device)
        self.student = load_student(config.student, self.student_dtype).to(ranks.device)
        if teacher is None:
            teacher = build_teacher(Lesson.of(config), ranks)
        self.teacher = teacher
        assert config.teacher is not None
        self.teacher_dtype = teacher_dtype(config.teacher, ranks.device)

    def run(self, first: int, count: int, phases: Phases) -> None:
        for step in range(first, first + count):
            batches = self.inputs.step(step)
            phases.at("teacher forward")
            with torch.no_grad():
                for texts in batches:
                    for tokens in (texts.teacher_queries, texts.teacher_passages, texts.teacher_pairs):
                        if tokens is not None:
                            self._teach(self._moved(tokens))
            for texts in batches:
                phases.at("student forward")
                states = [
                    self.student.backbone(**self.student._inputs(self._moved(tokens))).last_hidden_state
                    for tokens in (texts.student_queries, texts.student_passages)
                ]
                phases.at("backward")
                torch.stack([state[:, 0].float().sum() for state in states]).sum().backward()
            self.student.zero_grad()
            phases.at("waiting for data")
            phases.end_step()

    def _teach(self, tokens: Tokens) -> None:
        if self.teacher.engine is not None:
            self.teacher.engine(tokens=tokens)  # ZeRO-3 gathers for a forward from the top
        else:
            self.teacher.scorer.backbone(**self.teacher.scorer._inputs(tokens))

    def _moved(self, tokens: Tokens) -> Tokens:
        return {name: x.to(self.ranks.device, non_blocking=True) for name, x in tokens.items()}

    @property
    def work(self) -> Work:
        return self.inputs.work(self.student, self.teacher.scorer)


class LoopRunner(Runner):
    """A baseline."""

    def __init__(self, name: str, config: Config, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self.name = name
        kind = LOOPS[name]
        self.inputs = Inputs(config, ranks, pads_to_maximum=kind.pads_to_maximum)
        self.loop = build_loop(kind, config, ranks.device)
        self.teacher_dtype = next(self.loop.teacher.parameters()).dtype
        mixed = kind is not LeadLoop and ranks.device.type == "cuda"
        self.student_dtype = torch.bfloat16 if mixed else torch.float32

    def run(self, first: int, count: int, phases: Phases) -> None:
        for step in range(first, first + count):
            self.loop.step(self.inputs.step(step), self.inputs.layers(step), phases.at)
            phases.at("waiting for data")
            phases.end_step()

    @property
    def work(self) -> Work:
        return self.inputs.work(self.loop.student, self.loop.teacher)


def build_loop(kind: type[Loop], config: Config, device: torch.device) -> Loop:
    """A baseline's models, as its users would load them: LEAD's with the attention that its code knew."""
    assert config.teacher is not None
    assert config.student is not None
    lead = kind is LeadLoop
    old = {"attention": "eager", "dtype": "fp32"} if lead else {}
    teacher_config = config.teacher.model_copy(update=old)
    student_config = config.student.model_copy(update=old)
    dtype = torch.float32 if lead else teacher_dtype(teacher_config, device)
    reranker = isinstance(config.teacher, LLMRerankerConfig)
    torch.manual_seed(config.seed)
    with _made_on(device, config):
        teacher = load_model(teacher_config, "causal" if reranker else "base", dtype).to(device)
        student = load_model(student_config, "base", torch.float32).to(device)
    losses = config.losses
    answers = None
    if isinstance(config.teacher, LLMRerankerConfig):
        from lead_ds.data.tokens.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(config.teacher.path, transformer_folder(config.teacher.path), False)
        yes, no = answer_tokens(tokenizer, config.teacher, Asked(None, CARDS["plain"]))
        answers = yes, no
    settings = Settings(
        group_size=1 + config.data.negatives,
        teacher_temperature=losses.response.teacher_temperature,
        layer_teacher_temperature=losses.layer.teacher_temperature,
        layer_temperature=losses.layer.layer_temperature,
        clip=config.train.clip,
        teacher_pooling="cls" if getattr(config.teacher, "pooling", None) == "cls" else "last",
        teacher_cosine=config.teacher.scale == "cosine",
        lr=config.train.lr,
        reranker=answers,
    )
    return kind(teacher, student, settings, device)


def _made_on(device: torch.device, config: Config) -> AbstractContextManager[Any]:
    """Random weights of billions are drawn where they will live."""
    random = config.teacher is not None and config.teacher.weights == "random"
    return torch.device(device) if random and device.type == "cuda" else nullcontext()


# lead-ds from a cache, and the layers whose vectors it holds: none, where it holds relevance.
CACHED = {"cached teacher": None, "cached vectors": "auto"}


def build_runner(name: str, config: Config, ranks: Ranks, others: Sequence[Runner] = ()) -> Runner:
    """A provider by its name; it may share the teacher of `others`."""
    assert config.teacher is not None
    if name == "bare":
        placed = (other.teacher for other in others if isinstance(other, LeadDS))
        return Bare(config, ranks, next((teacher for teacher in placed if isinstance(teacher, FrozenTeacher)), None))
    if name in LOOPS:
        return LoopRunner(name, config, ranks)
    if name in CACHED:
        cache = Path(config.output).with_name(name.replace(" ", "-"))
        if not cache.exists():
            teach(config, cache, vectors=CACHED[name], quiet=True)
        tree = config.teacher.model_dump() | {"kind": "cached", "path": str(cache)}
        given = {"kind", "path"}
        cached = type(config.teacher).model_construct(_fields_set=given, **tree)
        return LeadDS(name, config.model_copy(update={"teacher": cached}), ranks)
    if name == "labels alone":
        off = {part: {"weight": 0.0} for part in ("response", "layer", "margin_mse", "attention")}
        tree = config.model_dump()
        for part, change in off.items():
            tree["losses"][part] |= change
        return LeadDS(name, Config.model_validate(tree), ranks)
    if name == "lead-ds":
        return LeadDS(name, config, ranks)
    raise SystemExit(f"error: no provider {name} (one of lead-ds, bare, labels alone, {', '.join([*CACHED, *LOOPS])})")


def same_losses(config: Config, ranks: Ranks, kind: type[Loop] = LeadLoop) -> tuple[dict[str, float], dict[str, float]]:
    """The losses of lead-ds and of a baseline by name, on the same first batch and weights: float32, without dropout."""
    assert config.teacher is not None
    models = {
        "teacher": config.teacher.model_copy(update={"dtype": "fp32"}),
        "student": config.student.model_copy(update={"dtype": "fp32"}),
    }
    exact = config.model_copy(update={**models, "train": config.train.model_copy(update={"accumulation": 1})})
    ours = LeadDS("exact", exact, ranks)
    assert isinstance(ours.teacher, FrozenTeacher)
    scorer: Any = ours.training.engine.module.student
    loop = build_loop(kind, exact, ranks.device)
    copied: Any = loop.teacher.base_model
    copied.load_state_dict(ours.teacher.scorer.model.base_model.state_dict())
    if isinstance(ours.teacher.scorer, LLMReranker) and loop.settings.reranker is not None:
        causal: Any = loop.teacher
        head = causal.get_output_embeddings()
        with torch.no_grad():
            head.weight[list(loop.settings.reranker)] = ours.teacher.scorer.rows_AD
    loop.student.load_state_dict(scorer.model.state_dict())
    loop.student.eval()
    scorer.eval()
    inputs = Inputs(exact, ranks, pads_to_maximum=kind.pads_to_maximum)
    theirs = loop.step(inputs.step(0), inputs.layers(0), lambda part: None)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    ours.run(0, 1, Phases())
    torch.backends.cuda.matmul.allow_tf32 = tf32
    ours.training.recorder.flush()
    row = json.loads((ours.output / "metrics.jsonl").read_text().splitlines()[0])
    ours.close()
    return row["parts"], theirs
