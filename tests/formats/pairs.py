"""Directories of models that read a query and a passage as one text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.formats.format import a_format, change
from tests.models import reranker_cards as rerankers
from tests.models.tiny_models import tiny_model

BARE = "transformers"
pair_format = partial(a_format, pairs=True)


def classifier(folder: Path, family: str, labels: int = 1, names: list[str] | None = None, **more: Any) -> str:
    """A classifier of transformers, with no file of sentence-transformers."""
    path = tiny_model(folder, family, "classifier", labels=labels, layers=2, **more)
    if family in (
        "roberta",
        "xlm-roberta",
    ):  # their positions begin at 2: sentence-transformers would cut two tokens too late
        change(path, "tokenizer_config.json", model_max_length=128)
    if names is not None:
        change(path, "config.json", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    return path


def through_sentence_transformers(write: Callable[[Path], str], **more: Any) -> Callable[[Path], str]:
    """The same, saved by the installed sentence-transformers."""

    def saved(folder: Path) -> str:
        from sentence_transformers import CrossEncoder

        CrossEncoder(write(folder / "origin"), **more).save_pretrained(str(folder / "saved"), create_model_card=False)
        return str(folder / "saved")

    return saved


for family in ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2", "modernbert"):
    pair_format(f"cross-encoder: {family}, one label", source=BARE)(
        lambda folder, family=family: classifier(folder, family)
    )
pair_format("cross-encoder: qwen3, one label", source=BARE)(lambda folder: rerankers.made(folder, "classifier"))
for name, names in (
    ("irrelevant, relevant", ["irrelevant", "relevant"]),
    ("relevant first", ["relevant", "not relevant"]),
):
    pair_format(f"cross-encoder: two labels, {name}", source=BARE)(
        lambda folder, names=names: classifier(folder, "bert", 2, names)
    )
pair_format("cross-encoder: NLI, entailment first", source=BARE)(
    lambda folder: classifier(folder, "bert", 3, ["entailment", "neutral", "contradiction"])
)
pair_format("cross-encoder: three labels without names", source=BARE, refused="set relevant_label")(
    lambda folder: classifier(folder, "bert", 3)
)
pair_format("cross-encoder")(through_sentence_transformers(lambda folder: classifier(folder, "bert")))
pair_format("cross-encoder: a default prompt")(
    through_sentence_transformers(
        lambda folder: classifier(folder, "bert"), prompts={"q": "find: ", "query": "no: "}, default_prompt_name="q"
    )
)
pair_format("cross-encoder: prompts without a default")(
    through_sentence_transformers(lambda folder: classifier(folder, "bert"), prompts={"query": "query: "})
)
pair_format("cross-encoder: max_length of 40")(
    through_sentence_transformers(lambda folder: classifier(folder, "bert"), max_length=40)
)
pair_format("cross-encoder: a chat template", source=BARE)(
    lambda folder: rerankers.made(folder, "classifier", rerankers.JUDGE)
)
pair_format("cross-encoder: a chat template, saved")(
    through_sentence_transformers(lambda folder: rerankers.made(folder, "classifier", rerankers.JUDGE))
)
pair_format("cross-encoder: a chat template without places", source=BARE, refused="no place for a query and a passage")(
    lambda folder: rerankers.made(
        folder, "classifier", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
)
for false in ("no", None):
    for chat in (True, False):
        pair_format(f"1_LogitScore: yes and {false}, {'chat template' if chat else 'plain pairs'}")(
            lambda folder, false=false, chat=chat: rerankers.scored(
                rerankers.made(folder / "m", chat=rerankers.JUDGE), false=false, chat=chat
            )
        )


def by_card(card: Callable[[str, list[Any], int], Tensor]) -> Callable[[str, list[str], list[str]], Tensor]:
    """The card's code over pairs."""
    return lambda path, queries, passages: card(path, list(zip(queries, passages, strict=True)), 400)


for name, (card, repository, _) in rerankers.CARDS.items():
    for how, settings in (("by its name", ()), ("template", (f"template={name}",))):
        pair_format(
            f"{repository}, {how}",
            kind="llm_reranker",
            settings=(*settings, f"max_length={16384 if name == 'zerank' else 400}"),
            reference=by_card(card),
            source="its card's code",
        )(
            lambda folder, at=repository if not settings else "model", zerank=name == "zerank": rerankers.made(
                folder / at, chat=rerankers.CHAT if zerank else None, positions=16384
            )
        )
TRUE, YES = ("true", "false"), ("yes", "no")
for name, repository, answers, tied, settings in (
    ("by its name", "monot5-base-msmarco", TRUE, True, ()),
    ("of T5 1.1, template", "model", TRUE, False, ("template=monot5", "max_length=60")),
    ("multilingual, by its name", "mt5-base-mmarco-v2", YES, False, ()),
):
    pair_format(
        f"monoT5: {name}",
        settings=settings,
        kind="llm_reranker" if settings else None,
        source="its card's code",
        reference=lambda path, queries, passages, answers=answers, length=60 if settings else 128: (
            rerankers.monot5_card(path, list(zip(queries, passages, strict=True)), length, answers)
        ),
    )(
        lambda folder, at=repository, answers=answers, tied=tied: rerankers.answering(
            folder / at, "mt5" if at.startswith("mt5") else "t5", answers, tied=tied
        )
    )
pair_format("a decoder reranker of which nothing is known", kind="llm_reranker", refused="set template", source=BARE)(
    lambda folder: rerankers.made(folder)
)
