"""Distil a teacher into a small dual encoder, from rows in memory.

    python examples/distil_in_ten_lines.py TEACHER STUDENT OUTPUT
    deepspeed examples/distil_in_ten_lines.py TEACHER STUDENT OUTPUT

TEACHER, STUDENT: directories or hub names, such as cross-encoder/ms-marco-MiniLM-L6-v2 and nreimers/MiniLM-L6-H384-uncased.
"""

import sys

from lead_ds import Distiller, load, losses

teacher, student, output = sys.argv[1:]
facts = [
    "has three hearts",
    "grinds rock into flour",
    "carries four strings",
    "throws ash",
    "stores nectar",
    "warns ships",
]
things = ["octopus", "glacier", "violin", "volcano", "honeybee", "lighthouse"]
rows = [{"query": f"what {f}", "positives": [f"The {t} {f}."]} for t, f in zip(things, facts, strict=True)]

run = Distiller(
    teacher=load(teacher, max_length=64),
    student=student,
    data=rows,  # or a folder of corpus, queries and groups, or a datasets.Dataset
    losses=[losses.Response(weight=3), losses.Contrastive()],
    steps=10,
    batch_size=3,
    negatives=2,
    lr=1e-4,
    output=output,
)
run.train()
print(run.student.encode(["an octopus"]).shape, "vectors; the model is in", run.folder)
