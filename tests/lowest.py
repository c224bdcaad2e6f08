"""A tiny run from beginning to end, of the program's own packages alone: what `make test-lowest` starts."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import yaml

from lead_ds.cli.main import main
from tests.helpers.rooms import make_rooms, settings

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_rooms(root)
        config = root / "run.yaml"
        config.write_text(yaml.safe_dump(settings(root, root / "run", train={"steps": 2, "batch_size": 4})))
        for command in (
            ["distill", str(config)],
            ["evaluate", "--model", str(root / "run" / "student"), "--data", str(root / "data"), "--split", "dev"],
        ):
            try:
                main(command)
            except SystemExit as ended:
                if ended.code:
                    sys.exit(ended.code)
