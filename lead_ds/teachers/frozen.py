"""The frozen teacher: where its parameters live, and its one forward pass per accumulation window."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.data.groups.group import Groups
from lead_ds.data.reads import ModelBatch, Reads, passes_of
from lead_ds.data.tokens.encoder import Tokens
from lead_ds.engine.distributed.agreement import agreed
from lead_ds.engine.distributed.deepspeed_files import teacher_deepspeed_config
from lead_ds.engine.distributed.engines import begin_engine
from lead_ds.engine.distributed.ranks import Ranks, local_world
from lead_ds.errors import InputError
from lead_ds.io.files import model_files
from lead_ds.models.attention_backend import candidates, choose_attention
from lead_ds.models.backbone import blank_model, cut_shape, find_layers
from lead_ds.models.dtypes import half_of
from lead_ds.models.kinds.kind import KINDS, Kind
from lead_ds.models.load import DTYPES, load_teacher, load_text, read_model_config
from lead_ds.models.merging import merge_adapter
from lead_ds.models.packing_check import check_packing
from lead_ds.models.special_weights import keep_experts_together, quantised_by
from lead_ds.models.vocabulary import check_vocabulary
from lead_ds.relevance import Features
from lead_ds.settings.data import DataConfig
from lead_ds.settings.roles import TeacherRole
from lead_ds.settings.run import Run
from lead_ds.teachers.lens import FittedLens, open_lens
from lead_ds.teachers.teacher import Gift, Lesson, Teacher, TeacherView


class FrozenTeacher(Teacher):
    """A frozen scorer, replicated or sharded by ZeRO-3, that answers whole accumulation windows.

    One large forward per window is what hides ZeRO-3's gathers: their cost does not depend on how many tokens pass.
    """

    Settings = TeacherRole
    gives = frozenset({"final", "layers", "features", "attention"})
    reads_alone = computes = True

    def __init__(
        self, scorer: Kind, engine: Any, placement: str, device: torch.device, fitted: FittedLens | None = None
    ) -> None:
        self.scorer, self.engine, self.placement, self.device = scorer, engine, placement, device
        self.num_layers = scorer.num_layers if getattr(scorer, "has_layers", True) else 0  # that can be read
        self.fitted = fitted
        if fitted is not None:
            self.lens_facts = fitted.facts
            scorer.lens = fitted.lens.to(device)

    @classmethod
    def given(cls, settings: TeacherRole) -> frozenset[Gift]:
        """See `Teacher`: no vectors where its kind gives scores, or a vector per token."""
        return cls.gives if KINDS[settings.kind].gives_vectors else cls.gives - {"features"}

    @classmethod
    def files(cls, settings: TeacherRole) -> dict[str, Path]:
        """See `Teacher`: those of a model in a folder."""
        folder = Path(settings.path)
        return model_files(folder) if folder.is_dir() else {}

    @classmethod
    def reads(cls, lesson: Lesson, groups: Groups, ranks: Ranks) -> Reads:
        """See `Teacher`: tokens. Where it is trained or its attention is read, of the student's micro-batches, one by one."""
        settings, train = lesson.teacher, lesson.train
        if settings.weights == "pretrained":  # now, while every process may fail alone
            merge_adapter(
                settings.path, trust_remote_code=settings.trust_remote_code, allow_pickle=settings.allow_pickle
            )
        encoder = load_text(settings)
        open_lens(settings, lesson.lens_folder, lesson.seed, encoder)  # reported before any model is loaded
        tapped = "attention" in lesson.losses.needs
        return Reads(
            encoder=encoder,
            at_once=train.batch_size if settings.train or tapped else at_once(settings, lesson.data),
            passes=passes_of(settings.passes, sharded=may_shard(settings, ranks), tapped=tapped, device=ranks.device),
            # A frozen teacher keeps no activations: GradCache has nothing to save there.
            queries_at_once=train.grad_cache if settings.train else None,
            by_words=tapped,
        )

    @classmethod
    def open(cls, lesson: Lesson, reads: Reads, sample: Callable[[], list[ModelBatch]], ranks: Ranks) -> FrozenTeacher:
        """See `Teacher`: loaded as far as the losses need it, with the fastest attention, its packed rows checked."""
        settings = lesson.teacher
        teacher = build_teacher(lesson, ranks, depth_needed(settings, lesson.losses))
        check_vocabulary(teacher.scorer, reads.encoder, settings.path)
        backends = candidates(settings, teacher_dtype(settings, ranks.device), ranks.device)
        if backends:
            batches = sample()
            choose_attention(teacher.scorer, backends, lambda: teacher.window(batches, []), ranks, lesson.attention)
        if settings.passes == "packed":
            check_packing(teacher.scorer, teacher.all_layers, "teacher.passes")
        return teacher

    @torch.no_grad()  # not inference_mode: its tensors could not enter the student's graph
    def window(
        self, chunks: Sequence[ModelBatch], layers: Sequence[int], tap_layers: Sequence[int] = ()
    ) -> TeacherView:
        module = self.engine if self.engine is not None else self.scorer
        outputs = [module(chunk.to(self.device), layers=layers, tap_layers=tap_layers) for chunk in chunks]
        return TeacherView(
            final=_merged([output.final for output in outputs]),
            layers=_merged([output.layers for output in outputs if output.layers is not None]) if layers else None,
            outputs=outputs if tap_layers else [],
        )

    def describe(self) -> str:
        held, whole = self.parameter_bytes()
        return (
            f"teacher {self.scorer.config.path}: {self.num_layers} layers, {self.placement}, "
            f"{held / 1e6:.1f} of {whole / 1e6:.1f} MB of parameters on each rank"
            + ("" if self.fitted is None else f", read through the lens in {self.fitted.folder}")
        )

    def facts(self) -> dict[str, Any]:
        held, whole = self.parameter_bytes()
        return {
            "placement": self.placement,
            "attention": self.scorer.backbone.config._attn_implementation,
            "dtype": str(next(self.scorer.parameters()).dtype),
            "parameter_bytes": whole,
            "parameter_bytes_per_rank": held,
            "lens": self.lens_facts,
        }

    @torch.no_grad()
    def read(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        """What the scorer gives for texts or pairs from `layers`, then from its final state: see `Scorer.forward`.

        Every rank must call this equally often, with tokens of its own.
        """
        module = self.engine if self.engine is not None else self.scorer
        moved = {name: x.to(self.device) for name, x in tokens.items()}
        said = module(tokens=moved, layers=layers)
        return said if layers else said.unsqueeze(0)

    def all_layers(self, tokens: Tokens) -> Tensor:
        """`read` of every layer."""
        return self.read(tokens, list(range(self.num_layers)))

    def parameter_bytes(self) -> tuple[int, int]:
        """Bytes of parameters that this rank holds between forwards, and of the whole model."""
        held = whole = 0
        for parameter in self.scorer.parameters():
            numel = getattr(parameter, "ds_numel", parameter.numel())
            whole += numel * parameter.element_size()
            sharded = getattr(parameter, "ds_tensor", None)
            held += (numel if sharded is None else sharded.numel()) * parameter.element_size()
        return held, whole


def at_once(settings: TeacherRole, data: DataConfig) -> int | None:
    """Groups of one forward of a teacher; None: all of a window."""
    return None if settings.batch_size is None else max(1, settings.batch_size // (1 + data.negatives))


def build_teacher(lesson: Lesson, ranks: Ranks, depth: int | None = None) -> FrozenTeacher:
    """Load, place and freeze the model of a lesson; with `depth`, its first layers only."""
    settings: TeacherRole = lesson.teacher
    fitted = agreed(ranks, lambda: open_lens(settings, lesson.lens_folder, lesson.seed))
    dtype = teacher_dtype(settings, ranks.device)
    placement = choose_placement(settings, dtype, ranks, depth)
    if settings.compile and placement != "replicate":
        what = f"the teacher's placement is {placement}, whose gathers cannot be compiled"
        raise InputError("teacher.compile", what, "set it to false, or teacher.placement=replicate")
    if placement == "replicate":
        with ranks.device:  # read there at once: the host's memory would hold a whole copy for each of its ranks
            scorer = _frozen(load_teacher(settings, dtype, depth))
        scorer.to(ranks.device)
        if settings.compile:
            scorer.compile_layers()
        return FrozenTeacher(scorer, None, placement, ranks.device, fitted)
    blank = _blank(settings)
    tree = teacher_deepspeed_config(
        lesson.deepspeed,
        dtype,
        hidden=int(blank.config.get_text_config().hidden_size),
        layer=largest_layer(blank),
        shard=max(-(-parameter.numel() // ranks.world) for parameter in blank.parameters()),
        local_world=local_world(ranks.world),
        offload=settings.offload,
        offload_path=settings.offload_path,
    )
    with _sharded_loading(tree):
        scorer = load_teacher(settings, dtype, depth)
    keep_experts_together(scorer)
    engine = begin_engine(_frozen(scorer), config=tree)
    _restore_rotations(scorer)
    engine.eval()
    return FrozenTeacher(scorer, engine, placement, ranks.device, fitted)


@torch.no_grad()
def _restore_rotations(scorer: Kind) -> None:
    """Have rotary positions their float32 frequencies. Loaded by shards, transformers 5.20 computes them in the
    parameters' 16 bits (5.24 does not): other vectors than the whole model's, without a word.
    """
    backbone: Any = getattr(scorer, "backbone", None)
    for module in backbone.modules() if hasattr(backbone, "_init_weights") else ():
        rounded = {name: x for name, x in module.named_buffers(recurse=False) if "inv_freq" in name and x.itemsize == 2}
        for name, buffer in rounded.items():
            module._buffers[name] = buffer.float()
        if rounded:
            backbone._init_weights(module)


def teacher_dtype(settings: TeacherRole, device: torch.device) -> torch.dtype:
    """What the configuration sets; auto: 16 bits, on a GPU those that the model was published in (see `half_of`)."""
    return half_of(settings.path, device) if settings.dtype == "auto" else DTYPES[settings.dtype]


def to_read(config: Run) -> TeacherRole:
    """The teacher of a configuration, a frozen model that is to be read. Raises InputError where it is none."""
    teacher = config.teacher
    if teacher is None:
        raise InputError("teacher", "is missing", "name the model to read")
    if teacher.kind not in KINDS:
        raise InputError("teacher.kind", f"{teacher.kind} is no model to run here", "name the model with its kind")
    if teacher.train:
        raise InputError("teacher.train", "a co-trained teacher changes at every step", "set teacher.train=false")
    return teacher


def depth_needed(settings: TeacherRole, losses: Any) -> int | None:
    """How many of the teacher's layers a distillation needs; None: all of them."""
    if not settings.truncate:
        return None
    whole = int(read_model_config(settings).get_text_config().num_hidden_layers)
    needed = losses.deepest(whole)
    return needed if needed < whole else None


def choose_placement(settings: TeacherRole, dtype: torch.dtype, ranks: Ranks, depth: int | None = None) -> str:
    """`auto`: a copy per rank where it takes less than a third of the memory there is, or is quantised; else shards."""
    if settings.placement != "auto" or settings.offload != "none":
        return "replicate" if settings.placement == "replicate" else "zero3"
    if ranks.world == 1 or quantised_by(read_model_config(settings)) is not None:
        return "replicate"
    needed = count_parameters(settings, depth) * dtype.itemsize
    if ranks.device.type == "cuda":
        room = torch.cuda.mem_get_info(ranks.device)[0]
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world(ranks.world)
    # Ranks may see different free memory: the tightest decides for all, or they would wait for each other for ever.
    return "replicate" if needed * 3 < min(ranks.all(room)) else "zero3"


def may_shard(settings: TeacherRole, ranks: Ranks) -> bool:
    """Whether `choose_placement` may come to shards. One that is trained is placed as the student is."""
    placement = settings.placement
    alone = placement == "auto" and settings.offload == "none" and ranks.world == 1
    return settings.train or not (placement == "replicate" or alone)


def count_parameters(settings: TeacherRole, depth: int | None = None) -> int:
    """Parameters of the backbone, or of its first layers, from its configuration alone."""
    return _numel(_blank(settings, depth))


def largest_layer(model: nn.Module) -> int:
    """Parameters of a model's largest layer; of all of it where it has no list of layers, as code of its own may have none."""
    try:
        return max(map(_numel, find_layers(model)[1]))
    except InputError:
        return _numel(model)


def _blank(settings: TeacherRole, depth: int | None = None) -> Any:
    shape = read_model_config(settings)
    if depth is not None:
        cut_shape(shape, range(depth))
    with torch.device("meta"):
        return blank_model(shape, "base", settings)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _merged(parts: Sequence[Features]) -> Features:
    return parts[0].merged(parts[1:])


def _frozen(scorer: Kind) -> Kind:
    scorer.requires_grad_(False)
    scorer.eval()
    return scorer


@contextmanager
def _sharded_loading(tree: dict[str, Any]) -> Iterator[None]:
    """While open, from_pretrained shards parameters as it reads them. Closed at once: the scope is global to the process."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    scope = HfDeepSpeedConfig(tree)
    try:
        yield
    finally:
        del scope
        unset_hf_deepspeed_config()
