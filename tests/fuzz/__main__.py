"""`python -m tests.fuzz [INPUTS] [--only READER ...] [--out FILE]`: so many inputs in all, other ones each time; findings once.

FILE keeps what each reader took; a call with one that an earlier call began goes on with the readers that are left.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import platform
import random
import sys
import time
import traceback
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.check import check
from tests.fuzz.inputs import inputs_of
from tests.fuzz.readers import READERS, Reader

AT_ONCE = 1000  # inputs of one seed: so many are drawn before hypothesis begins anew


def fuzz(reader: Reader, inputs: int, start: int, say: bool = True) -> dict[str, Any]:
    """Feed a reader: how many it read and refused; the smallest input of each new place where it breaks."""
    count = Counter[str]()
    findings: dict[str, bytes] = {}
    began = time.process_time()

    def one(data: st.DataObject) -> None:
        content = data.draw(inputs_of(reader))
        count["inputs"] += 1
        try:
            count["read" if check(reader, content) else "refused"] += 1
        except Exception as error:
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "lead_ds" in frame.filename]
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "the check"
            key = f"{type(error).__name__} at {place}"
            if len(content) < len(findings.get(key, b"x" * (1 << 30))):
                findings[key] = content
                if say:
                    print(f"  {reader.name}: {key}: {str(error)[:160]!r}: {content[:300]!r}", flush=True)

    done = 0
    while done < inputs:
        some = settings(
            max_examples=min(AT_ONCE, inputs - done),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        before = count["inputs"]
        seed(start + done)(some(given(st.data())(one)))()
        if count["inputs"] == before:
            break
        done += count["inputs"] - before
    seconds = round(time.process_time() - began, 1)
    return {**count, "findings": [f"{key}: {content[:300]!r}" for key, content in findings.items()], "seconds": seconds}


def main() -> None:
    """Print how many inputs each reader took; status 1 where any broke one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int, nargs="?", default=100_000)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    names = asked.only or list(READERS)
    shares = sum(READERS[name].share for name in names)
    known: dict[str, Any] = {}
    if asked.out is not None and asked.out.exists():
        known = json.loads(asked.out.read_text("utf-8"))
    if known.get("asked") != asked.inputs or not known.get("going on"):
        start = random.SystemRandom().randrange(1 << 32)
        machine = f"{platform.machine()}, Python {platform.python_version()}"
        command = f"python -m tests.fuzz {asked.inputs}"
        known = {
            "command": command,
            "date": f"{date.today()}",
            "machine": machine,
            "asked": asked.inputs,
            "seed": start,
        }
        known |= {"going on": True, "readers": {}}
    print(f"seed {known['seed']}")
    for name in names:
        if name not in known["readers"]:
            faulthandler.dump_traceback_later(3600, exit=True)  # what hangs where no signal is heard
            share = max(2, round(asked.inputs * READERS[name].share / shares))
            known["readers"][name] = fuzz(READERS[name], share, known["seed"])
            faulthandler.cancel_dump_traceback_later()
            told = {key: len(value) if key == "findings" else value for key, value in known["readers"][name].items()}
            print(f"{name}: {told}", flush=True)
        found = list(known["readers"].values())
        known["inputs"] = sum(one["inputs"] for one in found)
        known["findings"] = sum(len(one["findings"]) for one in found)
        known["processor seconds"] = round(sum(one["seconds"] for one in found))
        known["going on"] = name != names[-1]
        if asked.out is not None:
            asked.out.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    print({key: value for key, value in known.items() if key != "readers"})
    sys.exit(bool(known["findings"]))


if __name__ == "__main__":
    main()
