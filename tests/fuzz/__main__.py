"""`python -m tests.fuzz [INPUTS] [READER ...]`: so many inputs in all, other ones each time; every kind of finding once."""

from __future__ import annotations

import random
import sys
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.inputs import inputs_of
from tests.fuzz.readers import READERS, Reader
from tests.fuzz.test_readers import check

Findings = dict[tuple[str, str], bytes]


def fuzz(reader: Reader, inputs: int, start: int, findings: Findings) -> int:
    """Feed a reader; the smallest input of each new place where it breaks goes into `findings`."""
    count = Counter[str]()

    @seed(start)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        content = data.draw(inputs_of(reader))
        count["inputs"] += 1
        try:
            check(reader, content)
        except Exception as error:
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "lead_ds" in frame.filename]
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "the check"
            key = (reader.name, f"{type(error).__name__} at {place}: {str(error)[:160]!r}".split(": ")[0])
            if len(content) < len(findings.get(key, b"x" * (1 << 30))):
                findings[key] = content
                print(f"  {key[1]}: {str(error)[:160]!r}: {content[:200]!r}", flush=True)

    run()
    return count["inputs"]


def main() -> None:
    """Print how many inputs each reader took; status 1 where any broke one."""
    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    names = sys.argv[2:] or list(READERS)
    start = random.SystemRandom().randrange(1 << 32)
    findings: Findings = {}
    print(f"seed {start}")
    for name in names:
        done = fuzz(READERS[name], -(-inputs // len(names)), start, findings)
        broken = sum(key[0] == name for key in findings)
        print(f"{name}: {done} inputs, {broken} findings", flush=True)
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
