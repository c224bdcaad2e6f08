"""Step time of a distillation on 1 to 64 nodes, on paper: `python -m benchmarks.scaling`; the page is scaling.md.

Nothing here runs on a GPU. The model and its assumptions are `benchmarks.scaling_model`; memory is `lead_ds.plan`'s. Every
assumption is an option. GB = 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.scaling_model import ELEMENT, PLACEMENTS, Hardware, Model, Step, Work, break_even, forward, step

PAGE = Path(__file__).with_name("scaling.md")
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
NODES = (1, 2, 4, 8, 16, 32, 64)
COLUMNS = ["1 node", *(f"{nodes} nodes" for nodes in NODES[1:])]
NEAR = 1.05  # what counts as equally fast
PREFERRED = ("zero3", "zero3+hpz", "replicate", "zero3+cpu", "zero3+nvme")  # of equally fast ones


# Shapes as published (config.json of mistralai/Mistral-7B-v0.1, meta-llama/Llama-2-13b-hf and -70b-hf, distilbert-base-uncased)
DECODER = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
TEACHERS: dict[str, dict[str, Any]] = {
    name: {
        **DECODER,
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
    }
    | {"num_attention_heads": heads, "num_key_value_heads": keys}
    for name, kind, hidden, inner, layers, heads, keys in (
        ("7B", "mistral", 4096, 14336, 32, 32, 8),
        ("13B", "llama", 5120, 13824, 40, 40, 40),
        ("70B", "llama", 8192, 28672, 80, 64, 8),
    )
}
STUDENT = {"model_type": "distilbert", "dim": 768, "hidden_dim": 3072, "n_heads": 12, "n_layers": 6}


@cache
def requirements(name: str, work: Work) -> Any:
    """lead_ds.plan's requirements of a run, from the models' shapes alone: on the meta device, nothing downloaded."""
    from lead_ds.config import Config
    from lead_ds.plan.requirements import requirements as of_run

    with tempfile.TemporaryDirectory() as folder:
        for part, shape in (("teacher", TEACHERS[name]), ("student", STUDENT)):
            (Path(folder) / part).mkdir()
            (Path(folder) / part / "config.json").write_text(json.dumps(shape))
        lengths = {"weights": "random", "query_length": work.query_tokens, "passage_length": work.tokens}
        config = Config.model_validate(
            {
                "teacher": {"kind": "dual_encoder", "path": f"{folder}/teacher", "placement": "zero3", **lengths},
                "student": {"path": f"{folder}/student", **lengths},
                "data": {"path": folder, "negatives": work.passages - 1},
                "losses": {"layer": {"k": work.layers}},
                "train": {"batch_size": work.queries},
            }
        )
        return of_run(config)


def models(name: str, work: Work) -> tuple[Model, Model]:
    """(teacher, student) as `lead_ds.plan` sees them."""
    r = requirements(name, work)
    teacher, student = (
        Model(n, s.layers, s.width, s.largest_layer, s.largest_other, s.numel)
        for n, s in ((name, r.teachers[0].shape), ("student", r.student))
    )
    return teacher, student


@cache
def memory(name: str, work: Work, gpus: int, nodes: int, accumulation: int, gpu_memory: float) -> dict[str, Any]:
    """lead_ds.plan's estimate of each placement, for the whole window in one teacher forward. gpu_memory: GB."""
    from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config
    from lead_ds.plan import Cluster, make_plan

    r = requirements(name, work)
    train = r.config.train.model_copy(update={"accumulation": accumulation})
    r = replace(r, config=r.config.model_copy(update={"train": train}))
    hpz = read_deepspeed_config("ds_configs/teacher_zero3_hpz.json")["zero_optimization"]
    cluster = Cluster(gpus, nodes, int(gpu_memory * 1e9))
    found = {e.choice.placement: e for e in make_plan(r, cluster).placements}
    second = make_plan(replace(r, teacher_zero={**r.teacher_zero, "zero3": hpz}), cluster)
    found["zero3+hpz"] = next(e for e in second.placements if e.choice.placement == "zero3")
    return found


@dataclass(frozen=True)
class Row:
    """One cell of the step time tables."""

    network_gbps: float
    accumulation: int
    teacher: str
    placement: str
    nodes: int
    step: Step
    gpu_bytes: int
    fits: bool

    @property
    def text(self) -> str:
        """Seconds, and those of exposed communication."""
        return seconds(self.step) if self.fits else "no room"


class Study:
    """Every cluster, window, teacher, placement and number of nodes that was requested."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.networks: list[float] = options.network_gbps
        self.accumulations: list[int] = options.accumulation
        self.gpu_memory: float = options.gpu_memory
        hardware = Hardware(**{name: getattr(options, name) for name in asdict(Hardware()) if name != "network_gbps"})
        self.clusters = {gbps: replace(hardware, network_gbps=gbps) for gbps in self.networks}
        self.work = Work(**{name: getattr(options, name) for name in asdict(Work())})
        self.teachers = {name: models(name, self.work)[0] for name in TEACHERS}
        self.student = models(next(iter(TEACHERS)), self.work)[1]
        self.rows = [
            self.row(gbps, accumulation, name, placement, nodes)
            for gbps in self.networks
            for accumulation in self.accumulations
            for name in TEACHERS
            for placement in PLACEMENTS
            for nodes in NODES
        ]

    def row(self, gbps: float, accumulation: int, name: str, placement: str, nodes: int) -> Row:
        """One of them."""
        cluster = self.clusters[gbps]
        cost = step(cluster, self.work, self.teachers[name], self.student, placement, nodes, accumulation)
        plan = memory(name, self.work, cluster.gpus, nodes, accumulation, self.gpu_memory)[placement]
        return Row(gbps, accumulation, name, placement, nodes, cost, plan.total, plan.fits)

    def select(self, **wanted: Any) -> list[Row]:
        """Rows with these values."""
        return [row for row in self.rows if all(getattr(row, key) == value for key, value in wanted.items())]


def seconds(cost: Step) -> str:
    """A step, and its exposed communication."""
    return f"{cost.total:.2f} ({cost.exposed:.2f})"


def table(header: Sequence[object], body: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shapes(study: Study) -> str:
    """The models."""
    header = ("model", "layers", "width", "M parameters held", "of a layer", "of the embeddings", "GB in fp16")
    body = []
    for model in (*study.teachers.values(), study.student):
        millions = (f"{count / 1e6:,.1f}" for count in (model.numel, model.layer, model.embeddings))
        body.append([model.name, model.layers, model.width, *millions, f"{ELEMENT * model.numel / 1e9:.2f}"])
    return table(header, body)


def thresholds(study: Study) -> str:
    """Tokens from which gathers hide, for ZeRO-3 by nodes."""
    body = []
    for gbps, cluster in study.clusters.items():
        for name, teacher in study.teachers.items():
            rule = cluster.tflops * 1e12 / cluster.network
            need = (break_even(cluster, teacher, "zero3", nodes) for nodes in NODES)
            body.append([f"{gbps:g} Gb/s", name, *(f"{tokens:,.0f}" for tokens in (rule, *need))])
    return table(["network", "teacher", "FLOPS / bandwidth", *COLUMNS], body)


def placement_thresholds(study: Study) -> str:
    """The same for every placement that fetches, on one node and on the most."""
    clusters, most = list(study.clusters.values()), NODES[-1]
    body = []
    for placement in PLACEMENTS[1:]:
        for name, teacher in study.teachers.items():
            need = [break_even(clusters[0], teacher, placement, 1)]
            need += [break_even(cluster, teacher, placement, most) for cluster in clusters]
            body.append([placement, name, *(f"{tokens:,.0f}" for tokens in need)])
    return table(["placement", "teacher", "1 node", *(f"{most} nodes, {gbps:g} Gb/s" for gbps in study.clusters)], body)


def steps(study: Study, gbps: float, accumulation: int) -> str:
    """Step times on one network with one window."""
    cached = (step(study.clusters[gbps], study.work, None, study.student, "", n, accumulation) for n in NODES)
    body: list[list[object]] = [["none: cached scores", "", *map(seconds, cached)]]
    for name in TEACHERS:
        for placement in PLACEMENTS:
            line = study.select(network_gbps=gbps, accumulation=accumulation, teacher=name, placement=placement)
            body.append([name, placement, *(row.text for row in line)])
    return table(["teacher", "placement", *COLUMNS], body)


def breakdown(study: Study, accumulation: int) -> str:
    """Where ZeRO-3's time goes; last, what would be exposed if queries and passages were read in one pass."""
    body = []
    for row in study.select(accumulation=accumulation, placement="zero3"):
        if row.nodes in (1, 8, 64):
            tokens = [accumulation * sum(study.work.passes)]
            cluster, teacher = study.clusters[row.network_gbps], study.teachers[row.teacher]
            _, joint = forward(cluster, teacher, tokens, "zero3", row.nodes)
            spent = (f"{part:.3f}" for part in (*asdict(row.step).values(), joint))
            body.append([f"{row.network_gbps:g} Gb/s", row.teacher, row.nodes, *spent])
    parts = ("teacher computes", "gathers exposed", "student computes", "passage vectors", "student gradients")
    return table(["network", "teacher", "nodes", *parts, "gathers exposed in one pass"], body)


def room(study: Study) -> str:
    """Memory of each GPU."""
    body = []
    for accumulation in study.accumulations:
        for name in TEACHERS:
            for placement in PLACEMENTS:
                wanted = {"accumulation": accumulation, "teacher": name, "placement": placement}
                line = study.select(network_gbps=study.networks[0], **wanted)
                text = (f"{row.gpu_bytes / 1e9:.1f}" + ("" if row.fits else " **no**") for row in line)
                body.append([*wanted.values(), *text])
    return table(["accumulation", "teacher", "placement", *COLUMNS], body)


def choice(rows: Sequence[Row]) -> str:
    """The first of `PREFERRED` that fits and is within 5% of the fastest that fits."""
    fitting = {row.placement: row.step.total for row in rows if row.fits}
    if not fitting:
        return "nothing fits"
    limit = NEAR * min(fitting.values())
    return next(placement for placement in PREFERRED if fitting.get(placement, limit + 1) <= limit)


def choices(study: Study) -> str:
    """What to take."""
    body = []
    for gbps in study.networks:
        for accumulation in study.accumulations:
            for name in TEACHERS:
                wanted = {"network_gbps": gbps, "accumulation": accumulation, "teacher": name}
                best = (choice(study.select(nodes=nodes, **wanted)) for nodes in NODES)
                body.append([f"{gbps:g} Gb/s", accumulation, name, *best])
    return table(["network", "accumulation", "teacher", *COLUMNS], body)


def tables(study: Study) -> str:
    """Everything on the page that is computed."""
    queries, passages = study.work.passes
    parts = ["### Models", shapes(study)]
    parts += [f"A micro-batch of a rank: {queries:,} tokens of queries, {passages:,} of passages, read in two passes."]
    parts += ["### Tokens per rank and pass from which gathers hide", thresholds(study)]
    parts += ["The same for each placement that fetches:", placement_thresholds(study)]
    for gbps in study.networks:
        for accumulation in study.accumulations:
            window = accumulation * (queries + passages)
            parts += [f"### Seconds of a step, {gbps:g} Gb/s, accumulation {accumulation}: {window:,} tokens per rank"]
            parts += [steps(study, gbps, accumulation)]
    for accumulation in study.accumulations:
        parts += [f"### Where the seconds go: zero3, accumulation {accumulation}", breakdown(study, accumulation)]
    parts += [f"### GB on each GPU, of {study.gpu_memory:g}", room(study)]
    parts += ["### Which placement", choices(study)]
    return "\n\n".join(parts)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options: every number of `Hardware` and `Work`, the networks, the windows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    for name, value in {**asdict(Hardware()), **asdict(Work())}.items():
        if name != "network_gbps":
            parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    parser.add_argument("--network-gbps", type=float, nargs="+", default=[100.0, 400.0], help="Gb/s of a whole node")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4], help="micro-batches of a window")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB of a GPU")
    parser.add_argument("--json", type=Path, help="also write every cell, as JSON")
    parser.add_argument("--write", type=Path, nargs="?", const=PAGE, help="replace the tables of a page (scaling.md)")
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        for number in value if isinstance(value, list) else [value]:
            lowest_is_zero = name in ("base_us", "hop_us", "network_hop_us")
            if isinstance(number, (int, float)) and not (number > 0 or (lowest_is_zero and number == 0)):
                parser.error(f"argument --{name.replace('_', '-')}: must be positive, not {number}")
    return options


def command(options: argparse.Namespace) -> str:
    """The command that gives these tables: the options that are not the defaults."""
    words = ["python", "-m", "benchmarks.scaling"]
    for name, default in vars(parse([])).items():
        value = getattr(options, name)
        if value != default and name not in ("json", "write"):
            words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def main(argv: Sequence[str]) -> None:
    """Print the tables, or put them on the page; write the JSON."""
    options = parse(argv)
    study = Study(options)
    text = f"Tables by `{command(options)}`.\n\n{tables(study)}\n"
    if options.json:
        cells = [{**asdict(r), "seconds": r.step.total, "exposed": r.step.exposed} for r in study.rows]
        options.json.write_text(json.dumps(cells, indent=1) + "\n", "utf-8")
    if options.write is None:
        print(text, end="")
        return
    page = options.write.read_text("utf-8")
    before, rest = page.split(BEGIN)
    options.write.write_text(f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
