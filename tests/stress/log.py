"""The log of kills, one JSON object a line: a kill, or the end of a run that was killed so often. It is gone on with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any


class Log:
    """Kills of runs that ended, and were compared; those of a run that an earlier call left unfinished are dropped."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path is not None and path.exists() else []
        rows = [json.loads(line) for line in lines]
        ended = {row["run"] for row in rows if "kills" in row}
        self.rows = [row for row in rows if row["run"] in ended]
        self._write("w", self.rows)

    def add(self, **row: Any) -> None:
        """Append a line."""
        self.rows.append(row)
        self._write("a", [row])

    def _write(self, mode: str, rows: list[dict[str, Any]]) -> None:
        if self.path is not None:
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    @property
    def kills(self) -> list[dict[str, Any]]:
        """Every kill."""
        return [row for row in self.rows if "victims" in row]

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Every run that ended."""
        return [row for row in self.rows if "kills" in row]

    def summary(self) -> dict[str, Any]:
        """Counts of the whole log."""
        kills, runs = self.kills, self.runs
        return {
            "kills": len(kills),
            "runs": len(runs),
            "differing": sum(not run["equal"] for run in runs),
            "lost": sum(len(kill["lost"]) for kill in kills),
            "partial": sum(len(kill["partial"]) for kill in kills),
            "orphans": sum(len(kill["orphans"]) for kill in kills),
            "left": sum(len(run["left"]) for run in runs),
            "failed": sum(bool(run.get("failed")) for run in runs),
            "by work": dict(Counter(kill["work"] for kill in kills).most_common()),
            "by victims": dict(Counter(kill["victims"] for kill in kills).most_common()),
            "by phase": dict(Counter(kill["phase"] for kill in kills).most_common()),
            "processor seconds": round(sum(run["seconds"] for run in runs)),
        }
