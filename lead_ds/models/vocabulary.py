"""Whether a model has an embedding for every token that its tokenizer may give it, and weights that are numbers."""

from __future__ import annotations

from typing import Any

from torch import nn

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError
from lead_ds.io.notes import say_once


def check_vocabulary(model: nn.Module, encoder: TextEncoder | None, path: str) -> None:
    """Raise InputError where padding or a special token has no embedding; say once where another token has none.

    `encoder` then refuses a text that holds such a token, which would end in an index error, on a GPU in one that names no
    line. None, or one without a tokenizer: nothing is checked.
    """
    beyond = tokens_beyond(model, encoder)
    if not beyond or encoder is None:
        return
    rows, tokenizer = embedding_rows(model), encoder.tokenizer
    special = {tokenizer.pad_token, *tokenizer.all_special_tokens} & beyond.keys()
    listed = ", ".join(
        f"{token!r} is {beyond[token]}" for token in sorted(special or beyond, key=beyond.__getitem__)[:3]
    )
    if special:
        remedy = "use the tokenizer that belongs to the model, or one whose pad token is among its words"
        raise InputError(path, f"has {rows} embeddings, its tokenizer's token {listed}", remedy)
    encoder.words = rows
    say_once(f"{path}: has {rows} embeddings, its tokenizer's token {listed}: a text that holds it cannot be read")


def tokens_beyond(model: nn.Module, encoder: TextEncoder | None) -> dict[str, int]:
    """The tokens of a model's tokenizer that have no embedding, and their ids."""
    rows, tokenizer = embedding_rows(model), getattr(encoder, "tokenizer", None)
    if rows is None or tokenizer is None:
        return {}
    return {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}


def check_weights(model: nn.Module, encoder: TextEncoder, path: str) -> None:
    """Raise InputError for a weight that is not finite, naming it, and of the table of words the first token.

    Texts without that token, such as those that a model is tried on, would not show it.
    """
    check_finite(model, path, encoder.tokenizer)


def check_finite(model: nn.Module, path: str, tokenizer: Any = None) -> None:
    """See `check_weights`; tokens are named where there is a tokenizer."""
    rows = embedding_rows(model)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or (finite := weight.float().isfinite()).all():
            continue
        at = (~finite).nonzero()[0].tolist()
        word = tokenizer is not None and finite.dim() == 2 and len(finite) == rows
        which = f", such as the row of token {tokenizer.convert_ids_to_tokens(at[0])!r}" if word else ""
        what = f"{int((~finite).sum())} of {finite.numel()} numbers of its weight {name} are not finite{which}"
        raise InputError(path, what, "take the model from where it came from again")


def embedding_rows(model: nn.Module) -> int | None:
    """The rows of the table of words; None where there is none to be seen."""
    for module in model.modules():
        asked: Any = getattr(module, "get_input_embeddings", None)
        if asked is not None:
            try:
                table = asked()
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(table, nn.Embedding):
                return table.num_embeddings
    return None
