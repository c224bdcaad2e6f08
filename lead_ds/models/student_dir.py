"""Saving a student so that others' tools load it: sentence-transformers, PyLate, transformers."""

from __future__ import annotations

import json
import os
import shutil
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lead_ds.models.backbone import quiet
from lead_ds.models.dense import Dense
from lead_ds.models.kinds.colbert import ColBERT
from lead_ds.models.kinds.cross_encoder import CrossEncoder
from lead_ds.models.kinds.dual_encoder import DualEncoder
from lead_ds.models.layout import RECORD
from lead_ds.models.own import OwnEncoder
from lead_ds.models.scorer import Scorer
from lead_ds.report.card import USES, front_matter

if TYPE_CHECKING:
    from lead_ds.data.tokens.encoder import TextEncoder

_POOLING = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}


def save_student(
    scorer: Scorer,
    encoder: TextEncoder,
    folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    card: str | None = None,
) -> Path:
    """Write a student's directory, whole or not at all, and return it.

    Dual encoder: `SentenceTransformer(folder)` gives the same vectors. ColBERT: PyLate's layout. Cross-encoder: what
    AutoModelForSequenceClassification and sentence-transformers' CrossEncoder read. `state_dict`: of the scorer, where its
    own parameters are sharded. `card`: the text of README.md. An existing directory is replaced only when all is written.
    """
    if not isinstance(scorer, (DualEncoder, ColBERT, CrossEncoder)):
        raise TypeError(f"a {scorer.kind} is no student")
    with whole_folder(Path(folder)) as made:
        state = state_dict or scorer.state_dict()
        if isinstance(scorer, OwnEncoder):
            _json(made / RECORD, scorer.save(made, encoder, state))
            (made / "README.md").write_text(scorer.card(), encoding="utf-8")
        else:
            write_student(scorer, encoder, made, state, card)
    return Path(folder)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes `folder`'s place when the block ends well; else nothing of it is left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield made
        made.chmod(0o755)  # mkdtemp's is private
        _sync(made)
        _put(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_student(
    scorer: DualEncoder | ColBERT | CrossEncoder,
    encoder: TextEncoder,
    folder: Path,
    state: dict[str, Tensor],
    card: str | None,
) -> None:
    """Fill a student's directory; arguments as `save_student`."""
    if isinstance(scorer, CrossEncoder):
        # Scores as they are trained and measured here; sentence-transformers would put a sigmoid on one label.
        scorer.model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    own = {key.removeprefix("model."): x for key, x in state.items() if key.startswith("model.")}
    with quiet():
        scorer.model.save_pretrained(folder, state_dict=own)
    encoder.tokenizer.save_pretrained(folder)
    record: dict[str, Any] = {"kind": scorer.kind, "scale": scorer.config.scale}
    if isinstance(scorer, CrossEncoder):
        record["max_length"] = encoder.max_length
        record["prompts"] = {"query": encoder.query_prompt, "document": encoder.passage_prompt}
    else:
        record |= {"query_length": encoder.query_length, "passage_length": encoder.passage_length}
        record["normalize"] = scorer.normalize
        dense = {str(i): module for i, module in enumerate(scorer.dense) if isinstance(module, Dense)}
        weights = {i: _under(state, f"dense.{i}.") for i in dense}
        if isinstance(scorer, DualEncoder):
            _sentence_transformers(scorer, encoder, folder, dense, weights)
        else:
            _pylate(scorer, encoder, folder, dense, weights)
    _json(folder / RECORD, record)
    (folder / "README.md").write_text(card or _card(scorer, encoder), encoding="utf-8")


def _sentence_transformers(
    scorer: DualEncoder,
    encoder: TextEncoder,
    folder: Path,
    dense: dict[str, Dense],
    weights: dict[str, dict[str, Tensor]],
) -> None:
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    pooling = {name: mode == scorer.pooling for mode, name in _POOLING.items()}
    _json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": scorer.width, **pooling, "include_prompt": True},
    )
    for i, module in dense.items():
        name = f"{len(modules)}_Dense"
        _save_dense(folder / name, module, weights[i])
        modules.append(("Dense", name))
    if scorer.normalize:
        name = f"{len(modules)}_Normalize"
        (folder / name).mkdir()
        modules.append(("Normalize", name))
    _modules(folder, [(f"sentence_transformers.models.{kind}", path) for kind, path in modules])
    _lengths(folder, encoder)
    _json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"query": encoder.query_prompt, "document": encoder.passage_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if scorer.normalize else "dot",
        },
    )


def _pylate(
    scorer: ColBERT, encoder: TextEncoder, folder: Path, dense: dict[str, Dense], weights: dict[str, dict[str, Tensor]]
) -> None:
    modules = [("sentence_transformers.models.Transformer", "")]
    for i, module in dense.items():
        name = f"{len(modules)}_Dense"
        _save_dense(folder / name, module, weights[i])
        modules.append(("pylate.models.Dense.Dense", name))
    _modules(folder, modules)
    _lengths(folder, encoder)
    _json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"query": encoder.query_prompt, "document": encoder.passage_prompt},
            "similarity_fn_name": "MaxSim",
            "query_prefix": encoder.query_prompt,
            "document_prefix": encoder.passage_prompt,
            "query_length": encoder.query_length,
            "document_length": encoder.passage_length,
            "do_query_expansion": encoder.query_expansion,
            "attend_to_expansion_tokens": False,
            "skiplist_words": list(string.punctuation) if encoder.skip_tokens else [],
        },
    )


def _save_dense(folder: Path, dense: Dense, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    _json(folder / "config.json", dense.settings)
    save_file({key: x.contiguous() for key, x in weights.items()}, folder / "model.safetensors")


def _modules(folder: Path, modules: list[tuple[str, str]]) -> None:
    tree = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)]
    _json(folder / "modules.json", tree)


def _lengths(folder: Path, encoder: TextEncoder) -> None:
    longest = max(encoder.query_length, encoder.passage_length)
    _json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})


def _card(scorer: DualEncoder | ColBERT | CrossEncoder, encoder: TextEncoder) -> str:
    use = USES[scorer.kind]
    facts = [f"layers: {scorer.num_layers}", f"hidden size: {scorer.width}"]
    if isinstance(scorer, DualEncoder):
        facts += [f"pooling: {scorer.pooling}", f"vector width: {scorer.vector_width}"]
    if isinstance(scorer, CrossEncoder):
        facts.append(f"longest pair: {encoder.max_length} tokens")
    else:
        facts.append(f"unit-length vectors: {'yes' if scorer.normalize else 'no'}")
        facts.append(f"longest query: {encoder.query_length} tokens; longest passage: {encoder.passage_length}")
    lines = [*front_matter(scorer.kind), f"# A {use.name} trained with lead-ds", "", *(f"- {fact}" for fact in facts)]
    return "\n".join([*lines, "", "```python", use.example, "```", ""])


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


def _json(file: Path, tree: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`; what stood there is moved aside first, and back again if that fails."""
    if not folder.exists():
        os.replace(made, folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.replace(folder, aside / "old")
    try:
        os.replace(made, folder)
    except OSError:
        os.replace(aside / "old", folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
