"""`teach`: the frozen teacher's relevance of every passage that training may draw, of every layer, into a cache.

Dimensions: T layers of the teacher, C candidates of a shard's groups, Q its queries, P its passages, B texts of a forward,
L tokens, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lead_ds.config import Config, TeacherConfig
from lead_ds.data.groups import Groups, open_groups
from lead_ds.data.teacher_cache import (
    MANIFEST,
    VERSION,
    TeacherCache,
    damage,
    identity,
    read_manifest,
    save_arrays,
    shard_arrays,
    shard_path,
)
from lead_ds.data.tokens import TextEncoder, Tokens, tokenizer_checksum
from lead_ds.engine.agreement import agreed, check_agreement, check_shared, flat
from lead_ds.engine.cached import data_facts, deciding_settings, epochs_of, stored_scale
from lead_ds.engine.distill import closed_to_others
from lead_ds.engine.provenance import provenance
from lead_ds.engine.ranks import Ranks
from lead_ds.engine.ranks import ranks as joined_ranks
from lead_ds.engine.teacher import FrozenTeacher, build_teacher, teacher_dtype
from lead_ds.errors import InputError, RunError
from lead_ds.models.colbert import score_mask
from lead_ds.relevance import Scale, TokenFeatures, VectorFeatures, pad_tokens
from lead_ds.retrieval.encode import ahead
from lead_ds.retrieval.files import atomic, model_checksum, write_json
from lead_ds.retrieval.progress import Progress, progress

PAIRS = ("cross_encoder", "llm_reranker")
GROUPS_OF_PAIRS, GROUPS_OF_TEXTS = 512, 2048  # of a shard; texts that its groups share are read once
AHEAD = 4  # batches tokenised ahead of the model
PAIRS_AT_ONCE = 32  # of which late interaction compares all tokens


def teach(
    config: Config,
    out: Path,
    *,
    epochs: int | None = None,
    shard_groups: int | None = None,
    command: Sequence[str] = (),
    quiet: bool = False,
) -> TeacherCache:
    """Write the teacher's relevance of every training group to `out`, or finish what an earlier call began.

    Every process calls this, on a file system they share. epochs: whose random negatives are included, where groups
    list too few (default: those that train.steps take on as many processes as now).
    Raises InputError where the input cannot work or `out` holds another cache; RunError, with the finished shards
    intact, where the work fails.
    """
    settings = teachable(config)
    with joined_ranks() as ranks, closed_to_others():
        check_agreement(config, False, ranks)
        check_shared(out, ranks)
        groups, encoder = agreed(ranks, lambda: (open_groups(config.data), TextEncoder.from_config(settings)))
        manifest = ranks.from_main(
            agreed(ranks, lambda: begin(config, out, groups, encoder, epochs, ranks) if ranks.main else {})
        )
        dtype = str(teacher_dtype(settings, ranks.device))
        if manifest["layers"] is None or (todo := unfinished(out, manifest, ranks)):
            torch.manual_seed(config.seed)  # a teacher of random weights is the same on every rank
            teacher = build_teacher(config, ranks)
            if manifest["layers"] is None:
                size = shard_groups or groups_of_shard(settings, len(groups), ranks)
                manifest |= {"layers": teacher.num_layers, "shard_groups": size, **provenance(command, ranks.world)}
                if ranks.main:
                    write_json(out / MANIFEST, manifest)
                ranks.barrier()
                todo = unfinished(out, manifest, ranks)
            if ranks.main and not quiet:
                held, whole = teacher.parameter_bytes()
                say(f"teacher {settings.path}: {teacher.num_layers} layers, {teacher.placement}, {dtype[6:]}")
                say(f"{held / 1e6:.1f} of {whole / 1e6:.1f} MB of parameters on each rank; {len(groups)} groups")
            window = config.train.batch_size * config.train.accumulation * (1 + config.data.negatives)
            reader = Reader(settings, teacher, encoder, settings.batch_size or window)
            write_shards(config, out, groups, reader, manifest, todo, ranks, quiet)
        ranks.barrier()
        return agreed(ranks, lambda: TeacherCache.open(out, verify=False))


def teachable(config: Config) -> TeacherConfig:
    """The teacher of a configuration. Raises InputError where it cannot be cached."""
    teacher = config.teacher
    if teacher is None:
        raise InputError("teacher", "is missing", "name the model to learn from")
    if teacher.kind == "cached":
        raise InputError("teacher.kind", "is cached already", "name the teacher itself, with its kind")
    if teacher.train:
        raise InputError("teacher.train", "a co-trained teacher changes at every step", "set teacher.train=false")
    return teacher


def begin(
    config: Config, out: Path, groups: Groups, encoder: TextEncoder, epochs: int | None, ranks: Ranks
) -> dict[str, Any]:
    """The manifest of a cache that an earlier call began, if it is of the same; else a new one, with layers None."""
    facts = facts_of(config, groups, encoder, epochs, ranks)
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        old, new = dict(flat(manifest["facts"])), dict(flat(facts))
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        if changed:
            what = f"holds the relevance of another {', '.join(changed)}"
            raise InputError(out, what, "delete it, or choose another folder with --out")
        return manifest
    if out.exists() and not out.is_dir():
        raise InputError(out, "is a file", "choose a folder with --out")
    if any(out.glob("relevance-*.safetensors")):
        raise InputError(out, "holds shards without a manifest", "delete it, or choose another folder with --out")
    assert config.teacher is not None
    return {"facts": facts, "layers": None, "shard_groups": None, "teacher_path": config.teacher.path}


def facts_of(config: Config, groups: Groups, encoder: TextEncoder, epochs: int | None, ranks: Ranks) -> dict[str, Any]:
    """Everything that decides what a cache holds, and nothing else."""
    teacher = config.teacher
    assert teacher is not None
    fewest = min(groups.offered(row) for row in range(len(groups)))
    draws = None
    if fewest < config.data.negatives:
        draws = {"seed": config.seed, "negatives": config.data.negatives}
        draws["epochs"] = epochs or epochs_of(config, len(groups), ranks)
        say(
            f"a group lists {fewest} of {config.data.negatives} negatives: the random ones of {draws['epochs']} epochs are "
            "included; mined ones would do for any seed and length (lead-ds mine)"
        )
    return {
        "version": VERSION,
        "teacher": {
            "kind": teacher.kind,
            "checksum": model_checksum(teacher.path),
            "settings": deciding_settings(teacher),
            "tokenizer": tokenizer_checksum(encoder),
            "query_prompt": encoder.query_prompt,
            "passage_prompt": encoder.passage_prompt,
            "computed_in": str(teacher_dtype(teacher, ranks.device)).removeprefix("torch."),
            "seed": config.seed if teacher.weights == "random" else None,
        },
        "scale": stored_scale(teacher.kind, teacher.scale),
        "stored_in": "float16",
        "data": data_facts(groups),
        "fewest_negatives": fewest,
        "draws": draws,
    }


def groups_of_shard(settings: TeacherConfig, groups: int, ranks: Ranks) -> int:
    """Groups of a shard: few enough that every rank has work until the end, and that a kill costs little."""
    most = GROUPS_OF_PAIRS if settings.kind in PAIRS else GROUPS_OF_TEXTS
    return max(1, min(most, -(-groups // (4 * ranks.world))))


def unfinished(out: Path, manifest: dict[str, Any], ranks: Ranks) -> list[int]:
    """Shards that are not there, or not as they were written, on every rank."""
    todo: list[int] = []
    if ranks.main:
        groups, size = manifest["facts"]["data"]["groups"], manifest["shard_groups"]
        for shard in range(-(-groups // size)):
            path = shard_path(out, shard)
            problem = damage(path, identity(manifest)) if path.exists() else ""
            if problem:
                say(f"{path.name} is damaged ({problem}): it is made anew")
            if problem is not None:
                todo.append(shard)
    return ranks.from_main(todo)


@dataclass
class Shard:
    """Texts of consecutive groups: each group's query, and its candidates by key."""

    queries: list[str]
    keys: list[np.ndarray]
    passages: list[str]  # C, group after group

    @cached_property
    def owners(self) -> np.ndarray:
        """The group of each candidate, int64 [C]."""
        return np.repeat(np.arange(len(self.keys)), [len(keys) for keys in self.keys])

    @classmethod
    def read(cls, groups: Groups, rows: range, negatives: int, draws: dict[str, int] | None) -> Shard:
        """Every passage that a draw of these groups may choose."""
        shard = cls([], [], [])
        for row in rows:
            pool = groups.pool(row)
            found = dict(zip(pool.keys.tolist(), pool.passages, strict=True))
            if draws is not None and groups.offered(row) < negatives:
                for epoch in range(draws["epochs"]):
                    drawn = groups.draw(row, draws["seed"], epoch)
                    found |= dict(zip(drawn.keys.tolist(), drawn.passages, strict=True))
            shard.queries.append(pool.query)
            shard.keys.append(np.array(list(found), np.int64))
            shard.passages += found.values()
        return shard


def write_shards(
    config: Config,
    out: Path,
    groups: Groups,
    reader: Reader,
    manifest: dict[str, Any],
    todo: list[int],
    ranks: Ranks,
    quiet: bool,
) -> None:
    """Write the shards of `todo`, every rank its own; they take turns together, for a sharded teacher needs them all."""
    size, draws = manifest["shard_groups"], manifest["facts"]["draws"]

    def load(shard: int | None) -> Shard:
        rows = range(0) if shard is None else range(shard * size, min((shard + 1) * size, len(groups)))
        return Shard.read(groups, rows, config.data.negatives, draws)

    turns = -(-len(todo) // ranks.world)
    mine: list[int | None] = [*todo[ranks.rank :: ranks.world]]
    mine += [None] * (turns - len(mine))
    total = sum(min(size, len(groups) - shard * size) for shard in mine if shard is not None)
    shown = ranks.main and not quiet and total > 0
    with ThreadPoolExecutor(1) as pool, progress("teaching", total, "groups", shown=shown) as meter:
        for shard, texts in zip(mine, ahead(pool, load, iter(mine), 1), strict=True):
            forwards = max(ranks.all(reader.forwards(texts)))
            relevance = reader.read(texts, forwards, meter)
            if shard is not None:
                agreed(ranks, lambda: save_shard(out, shard, texts, relevance, manifest))  # noqa: B023 - called at once
            else:
                agreed(ranks, lambda: None)


def save_shard(out: Path, shard: int, texts: Shard, relevance: np.ndarray, manifest: dict[str, Any]) -> None:
    """Write a shard, whole or not at all. Raises RunError for relevance that cannot be stored."""
    try:
        arrays = shard_arrays(texts.keys, relevance)
    except ValueError as error:
        raise RunError(shard_path(out, shard), f"the teacher gave {error}", "try teacher.scale=cosine") from None
    with atomic(shard_path(out, shard)) as temporary:
        save_arrays(temporary, arrays, identity(manifest))


class Reader:
    """The teacher reading a shard: long texts first, a text that several groups share once."""

    def __init__(self, settings: TeacherConfig, teacher: FrozenTeacher, encoder: TextEncoder, batch_size: int) -> None:
        self.teacher, self.encoder, self.batch_size = teacher, encoder, batch_size
        self.scale: Scale = stored_scale(settings.kind, settings.scale)
        self.pairs = settings.kind in PAIRS

    def forwards(self, shard: Shard) -> int:
        """How often the model will run."""
        if self.pairs:
            return -(-len(shard.passages) // self.batch_size)
        return sum(-(-len(set(texts)) // self.batch_size) for texts in (shard.queries, shard.passages))

    def read(self, shard: Shard, forwards: int, meter: Progress) -> np.ndarray:
        """Relevance of every candidate, float32 [C, T + 1], by `forwards` runs of the model."""
        out = np.empty((len(shard.passages), self.teacher.num_layers + 1), np.float32)
        done = 0

        def tell(part: float) -> None:
            nonlocal done
            now = int(part * len(shard.queries) + 1e-9)
            meter.advance(now - done)
            done = now

        (self._read_pairs if self.pairs else self._read_texts)(shard, out, tell)
        for _ in range(forwards - self.forwards(shard)):
            self.teacher.all_layers(self._tokens_of_pairs([("a", "a")]) if self.pairs else self.encoder.queries(["a"]))
        return out

    def _read_pairs(self, shard: Shard, out: np.ndarray, tell: Callable[[float], None]) -> None:
        pairs = [(shard.queries[owner], text) for owner, text in zip(shard.owners, shard.passages, strict=True)]
        sizes = [len(query) + len(passage) for query, passage in pairs]
        read = 0
        for places, _, scores_TB in self._run(pairs, sizes, self._tokens_of_pairs):
            out[places] = scores_TB.float().T.cpu().numpy()
            read += len(places)
            tell(read / len(pairs))

    def _tokens_of_pairs(self, pairs: Sequence[tuple[str, str]]) -> Tokens:
        return self.encoder.pairs([query for query, _ in pairs], [passage for _, passage in pairs])

    def _read_texts(self, shard: Shard, out: np.ndarray, tell: Callable[[float], None]) -> None:
        query_rows = {text: i for i, text in enumerate(dict.fromkeys(shard.queries))}
        passage_rows = {text: i for i, text in enumerate(dict.fromkeys(shard.passages))}
        if not query_rows:
            return
        queries = self._read_queries(list(query_rows))
        query_of = np.array([query_rows[shard.queries[owner]] for owner in shard.owners])
        passage_of = np.array([passage_rows[text] for text in shard.passages])
        by_passage = np.argsort(passage_of, kind="stable")
        bounds = np.searchsorted(passage_of[by_passage], np.arange(len(passage_rows) + 1))
        texts = list(passage_rows)
        read = 0
        for places, tokens, states in self._run(texts, [len(text) for text in texts], self.encoder.passages):
            candidates = [by_passage[bounds[place] : bounds[place + 1]] for place in places]
            own = np.repeat(np.arange(len(places)), [len(found) for found in candidates])
            slots = np.concatenate(candidates)
            for first in range(0, len(slots), PAIRS_AT_ONCE):
                some = slice(first, first + PAIRS_AT_ONCE)
                out[slots[some]] = self._compare(queries, query_of[slots[some]], states, tokens, own[some])
            read += len(places)
            tell(read / len(texts))

    def _read_queries(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """States [T + 1, Q, D] or [T + 1, Q, L, D] of queries, in their order, and which tokens count [Q, L]."""
        places, masks, states = [], [], []
        for some, tokens, read in self._run(texts, [len(text) for text in texts], self.encoder.queries):
            places += some
            masks.append(score_mask(tokens))
            states.append(read)
        longest = max(mask.shape[1] for mask in masks)
        mask_QL = torch.cat([pad_tokens(mask, 1, longest) for mask in masks])
        if states[0].ndim == 4:
            states = [pad_tokens(read, 2, longest) for read in states]
        order = torch.tensor(np.argsort(places), device=mask_QL.device)
        return torch.cat(states, 1)[:, order], mask_QL[order]

    def _compare(
        self, queries: tuple[Tensor, Tensor], query_of: np.ndarray, states: Tensor, tokens: Tokens, own: np.ndarray
    ) -> np.ndarray:
        """Relevance [C', T + 1] of pairs of a query and a passage of the batch at hand."""
        q, p = (torch.from_numpy(rows).to(states.device) for rows in (query_of, own))
        features: VectorFeatures | TokenFeatures
        if states.ndim == 3:
            features = VectorFeatures(queries[0][:, q], states[:, p], self.scale)
        else:
            mask_PL = score_mask(tokens)
            features = TokenFeatures(queries[0][:, q], queries[1][q], states[:, p], mask_PL[p], self.scale)
        return features.group_relevance(1).logits[..., 0].T.cpu().numpy()

    def _run(
        self, items: Sequence[Any], sizes: Sequence[int], tokenize: Callable[[list[Any]], Tokens]
    ) -> Iterator[tuple[list[int], Tokens, Tensor]]:
        """(places in items, their tokens and states on the device), batch after batch, the longest first."""
        order = sorted(range(len(items)), key=lambda i: -sizes[i])
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]

        def read(places: list[int]) -> tuple[list[int], Tokens]:
            return places, tokenize([items[i] for i in places])

        with ThreadPoolExecutor(1) as pool:
            for places, tokens in ahead(pool, read, iter(batches), AHEAD):
                moved = {name: x.to(self.teacher.device) for name, x in tokens.items()}
                yield places, moved, self.teacher.all_layers(moved)


def say(text: str) -> None:
    """Tell the user, on stderr."""
    print(text, file=sys.stderr, flush=True)
