"""Crash-safe checkpoints around DeepSpeed's: whole or absent, checksummed, the newest good one found again.

DeepSpeed writes its shards in place. Here they go to `step-N.partial`; when every rank has written, rank 0 records a
checksum of each file in `manifest.json`, syncs, and renames the folder to `step-N`. A folder without that name is no
checkpoint, whatever a kill left in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.records.universal import for_this_world, settle_steps, tensors_only
from lead_ds.errors import RunError
from lead_ds.io.files import sync
from lead_ds.io.json_text import parse_json

PREFIX, PARTIAL, MANIFEST, BEST = "step-", ".partial", "manifest.json", "best.json"


class Checkpoints:
    """The checkpoints of one run, in `folder`. whole: with the weights that are not trained, too."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int, whole: bool = True) -> None:
        self.folder, self.ranks, self.keep, self.whole = folder, ranks, keep, whole
        self._good: set[Path] = set()  # whose files this process has compared with their checksums

    def save(self, engine: Any, step: int, state: dict[str, Any], best: dict[str, Any] | None = None) -> Path:
        """Write the engine and `state` (JSON) as the checkpoint of `step`; every rank calls this.

        best: the run's best evaluation so far. It is recorded in best.json, and its checkpoint is kept however old it grows.

        Raises RunError on every rank, with earlier checkpoints intact, where the disk is full or a file cannot be written.
        """
        final = self.folder / f"{PREFIX}{step:08d}"
        partial = final.with_name(final.name + PARTIAL)
        try:
            self._together(lambda: self._prepare(partial, engine), step)
            with _failures_kept(engine) as failures:
                some = {} if self.whole else {"exclude_frozen_parameters": True}
                engine.save_checkpoint(str(self.folder), tag=partial.name, save_latest=False, **some)
            self._together(lambda: _raise(failures), step)
            self._together(lambda: self._complete(partial, final, state, best), step)
        except RunError:
            if self.ranks.main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    def clear(self) -> None:
        """Remove what a kill left: half of a checkpoint or of best.json, or of an old checkpoint that was being removed."""
        if self.ranks.main:
            for stale in self.folder.glob(f"{PREFIX}*{PARTIAL}"):
                shutil.rmtree(stale, ignore_errors=True)
            _unfinished(self.folder / BEST).unlink(missing_ok=True)

    def best(self) -> dict[str, Any] | None:
        """What best.json holds: the best evaluation and its checkpoint."""
        try:
            found = parse_json((self.folder / BEST).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("checkpoint"), str) else None

    def last(self, count: int) -> list[str]:
        """The names of the last `count` checkpoints whose files are as they were written, oldest first; fewer if there are."""
        found: list[str] = []
        for path in sorted(self.folder.glob(f"{PREFIX}*"), reverse=True) if self.ranks.main else ():
            if len(found) < count and path.is_dir() and not path.name.endswith(PARTIAL) and damage(path) is None:
                self._good.add(path)
                found.insert(0, path.name)
        return self.ranks.from_main(found)

    def newest(self, tell: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint whose files are as they were written, and its state; damaged ones are reported and
        skipped."""
        found = None
        if self.ranks.main:
            for path in sorted(self.folder.glob(f"{PREFIX}*"), reverse=True):
                if path.name.endswith(PARTIAL) or not path.is_dir():
                    continue
                problem, state = damage(path), {}
                if problem is None:
                    try:
                        state = read_state(path)
                    except ValueError as error:
                        problem = str(error)
                if problem is None:
                    self._good.add(path)
                    found = (path, state)
                    break
                tell(f"checkpoint {path.name} is damaged ({problem}): falling back to the one before")
        return self.ranks.from_main(found)

    def load(self, engine: Any, path: Path) -> None:
        """Restore parameters and optimizer from a checkpoint, whatever number of ranks wrote it.

        Only from files that are as they were written, and as tensors: never code. Raises RunError on every rank.
        """
        problem, processes = self.ranks.from_main(self._check(path) if self.ranks.main else ("", 0))
        if problem:
            raise RunError(path, f"is damaged: {problem}", "remove it to fall back to the one before")
        temporary = path.with_name(f"{path.name}-for-{self.ranks.world}{PARTIAL}")
        try:
            with for_this_world(path, processes, temporary, engine, self.ranks) as folder, tensors_only():
                some = {} if self.whole else {"load_module_strict": False}
                loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, **some)
        except pickle.UnpicklingError:
            raise RunError(path, "holds more than tensors and plain values: not read", "it is not ours") from None
        if loaded is None:
            raise RunError(path, "DeepSpeed could not load this checkpoint", "remove it to fall back to the one before")
        settle_steps(getattr(engine.optimizer, "optimizer", engine.optimizer))

    def _check(self, path: Path) -> tuple[str, int]:
        """What is wrong with a checkpoint ("": nothing), and how many ranks wrote it."""
        problem = None if path in self._good else damage(path)
        if problem:
            return problem, 0
        self._good.add(path)
        try:
            return "", int(read_state(path, "processes")["processes"])
        except ValueError as error:
            return str(error), 0

    def _prepare(self, partial: Path, engine: Any) -> None:
        if not self.ranks.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clear()
        previous = [p for p in self.folder.glob(f"{PREFIX}*") if p.is_dir()]
        stored = [p for p in engine.module.parameters() if self.whole or p.requires_grad]
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in stored)
        needed = max([folder_bytes(p) for p in previous], default=12 * parameters)
        free = shutil.disk_usage(self.folder).free
        if free < needed * 1.05:
            raise OSError(28, f"a checkpoint takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free")
        partial.mkdir()

    def _complete(self, partial: Path, final: Path, state: dict[str, Any], best: dict[str, Any] | None) -> None:
        if not self.ranks.main:
            return
        write_json(partial / "state.json", state)
        files = {str(p.relative_to(partial)): checksum(p, sync=True) for p in sorted(partial.rglob("*")) if p.is_file()}
        write_json(partial / MANIFEST, files)
        sync(partial)
        # A step saved again: after an evaluation that was owed, or falling back past a damaged one. Moved aside, not removed,
        # until the new one has its name: removing takes long, and a kill meanwhile would leave neither.
        older = move_aside(final) if final.exists() else None
        os.replace(partial, final)
        sync(self.folder)
        if older is not None:
            shutil.rmtree(older)
        # Of an earlier checkpoint, too: a run that was killed before this line knows it from its state alone.
        if best is not None and best != self.best():
            write_json(self.folder / BEST, best)
        self._prune()

    def _prune(self) -> None:
        complete = sorted(p for p in self.folder.glob(f"{PREFIX}*") if p.is_dir() and not p.name.endswith(PARTIAL))
        best = self.best()
        for path in complete[: -self.keep]:
            if best is None or path.name != best["checkpoint"]:
                remove(path)

    def _together(self, act: Callable[[], None], step: int) -> None:
        """Run `act` on every rank; if it failed on any, all raise, so that none waits for the others for ever."""
        failure = ""
        try:
            act()
        except OSError as error:
            failure = error.strerror or str(error)
            if error.errno == 28 and error.args[1:] and error.args[1] != os.strerror(28):
                failure = f"no space left: {error.args[1]}"
        failures = [f"rank {rank}: {reason}" for rank, reason in enumerate(self.ranks.all(failure)) if reason]
        if failures:
            raise RunError(
                self.folder,
                f"the checkpoint of step {step} could not be saved: {'; '.join(failures)}",
                "earlier checkpoints are intact: make room and continue with --resume",
            )


@contextmanager
def _failures_kept(engine: Any) -> Iterator[list[str]]:
    """Collect what goes wrong when DeepSpeed writes a file. Raised there, on one rank, it would leave the others in the
    barriers that DeepSpeed has between its files. The scripts that it adds beside them are left out: nobody here runs them.
    """
    failures: list[str] = []
    files, write = engine.checkpoint_engine, engine.checkpoint_engine.save

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
            failures.append(f"{Path(path).name}: {error}")

    files.save, engine._copy_recovery_script = save, lambda folder: None
    try:
        yield failures
    finally:
        files.save = write
        del engine._copy_recovery_script  # the class's own again


def _raise(failures: list[str]) -> None:
    if failures:
        raise OSError(5, failures[0].splitlines()[0])


def remove(path: Path) -> None:
    """Remove a checkpoint: renamed first, so that a kill half way leaves nothing under a checkpoint's name."""
    shutil.rmtree(move_aside(path))


def move_aside(path: Path) -> Path:
    """Rename a checkpoint to a name that no checkpoint has: see `Checkpoints.clear`."""
    aside = path.with_name(path.name + ".old" + PARTIAL)
    os.replace(path, aside)
    return aside


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder: a missing, changed or truncated file; None where it is whole."""
    try:
        files = parse_json((path / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        return "no manifest"
    except (OSError, ValueError):
        return "its manifest cannot be read"
    if not isinstance(files, dict):
        return "its manifest is not a JSON object"
    for name, expected in files.items():
        try:
            if checksum(path / name) != expected:
                return f"{name} changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name}: {error.strerror}"
        except ValueError as error:  # no file can have that name
            return f"{name!r}: {error}"
    return None


def read_state(path: Path, needed: str = "step") -> dict[str, Any]:
    """What a checkpoint remembers beside the engine's state. Raises ValueError where it lacks the number `needed`."""
    try:
        state = parse_json((path / "state.json").read_text("utf-8"))
        if isinstance(state[needed], int):
            return dict(state)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError("state.json does not hold a run's state")


def checksum(path: Path, sync: bool = False) -> str:
    """BLAKE2b of a file's bytes; `sync` forces them to the disk first."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def folder_bytes(path: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    partial = _unfinished(path)
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
