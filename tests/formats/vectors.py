"""Directories of models that give one vector per text, and of late interaction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.formats.format import FORMATS, a_format, change, dense, pool, put, saved, unit
from tests.helpers.tiny import tiny_tokenizer
from tests.models import reranker_cards as rerankers
from tests.models.tiny_models import tiny_model

PROMPTS = {"prompts": {"query": "query: ", "document": "passage: "}}
OLD = "sentence_transformers.models"

for name, family, mode in (
    ("MiniLM: mean, unit length", "bert", "mean"),
    ("bge: cls, unit length", "bert", "cls"),
    ("multilingual-e5: mean", "xlm-roberta", "mean"),
    ("mpnet: mean", "mpnet", "mean"),
    ("distilroberta: mean", "roberta", "mean"),
    ("electra: cls", "electra", "cls"),
    ("deberta-v2: mean", "deberta-v2", "mean"),
    ("gte-modernbert: cls", "modernbert", "cls"),
    ("SFR, Linq: mistral, last token", "mistral", "lasttoken"),
    ("Qwen3-Embedding: last token", "qwen3", "lasttoken"),
    ("gemma 2: last token", "gemma2", "lasttoken"),
    ("llama: mean", "llama", "mean"),
    ("max pooling", "bert", "max"),
    ("weighted mean pooling (SGPT)", "llama", "weightedmean"),
    ("mean over the root of the length", "bert", "mean_sqrt_len_tokens"),
):
    a_format(name)(lambda folder, family=family, mode=mode: saved(folder, family, pool(mode), unit()))


@a_format("msmarco-distilbert-dot: cls, dot product")
def _dot(folder: Path) -> str:
    return saved(folder, "distilbert", pool("cls"), similarity_fn_name="dot")


@a_format("e5: prompts")
def _prompts(folder: Path) -> str:
    return saved(folder, "bert", pool(), unit(), **PROMPTS)


@a_format("a default prompt that neither queries nor documents have")
def _default_prompt(folder: Path) -> str:
    return saved(folder, "bert", pool(), prompts={"web": "find: "}, default_prompt_name="web")


@a_format("a prompt named passage, which encode_document does not read")
def _passage_prompt(folder: Path) -> str:
    return saved(folder, "bert", pool(), prompts={"query": "query: ", "passage": "passage: "})


@a_format("LaBSE: cls, Dense, unit length")
def _labse(folder: Path) -> str:
    return saved(folder, "bert", pool("cls"), dense(32, 32), unit())


@a_format("EmbeddingGemma: mean, two Dense")
def _gemma(folder: Path) -> str:
    return saved(folder, "gemma3_text", pool(), dense(32, 48, nn.Identity()), dense(48, 32, nn.Identity()), unit())


@a_format("cls, max and mean pooling together")
def _combined(folder: Path) -> str:
    return saved(folder, "bert", pool(("cls", "max", "mean")), unit())


@a_format("several poolings of which one is the last token, then Dense")
def _combined_dense(folder: Path) -> str:
    return saved(folder, "qwen3", pool(("lasttoken", "mean")), dense(64, 16))


@a_format("LayerNorm and Dropout")
def _layer_norm(folder: Path) -> str:
    from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm

    return saved(folder, "bert", pool(), LayerNorm(32), Dropout(0.3))


for mode in ("mean", "cls", "weightedmean", "lasttoken", "max"):
    a_format(f"INSTRUCTOR: {mode} without the prompt")(
        lambda folder, mode=mode: saved(folder, "bert", pool(mode, include_prompt=False), unit(), **PROMPTS)
    )


def t5(folder: Path, family: str = "t5") -> str:
    """A T5 encoder with its decoder, and a tokenizer that ends with </s>."""
    import transformers

    path = tiny_tokenizer(folder, "unigram")
    size = len(transformers.AutoTokenizer.from_pretrained(path))
    torch.manual_seed(0)
    shape = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 3,
        "num_heads": 4,
        "vocab_size": size,
        "pad_token_id": 1,
    }
    shape |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 1}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **shape))
    model.save_pretrained(folder)
    return str(folder)


for name, family in (("sentence-t5, gtr: T5 encoder, mean, Dense", "t5"), ("multilingual T5 encoder", "mt5")):

    @a_format(name)
    def _t5(folder: Path, family: str = family) -> str:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer

        reader = Transformer(t5(folder / "origin", family), max_seq_length=64)
        modules = [reader, pool(), dense(32, 24, nn.Identity(), bias=False), unit()]
        SentenceTransformer(modules=modules).save_pretrained(str(folder / "saved"), create_model_card=False)
        return str(folder / "saved")


def static(folder: Path, *behind: nn.Module, **more: Any) -> str:
    """Token vectors, as sentence-transformers saves them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_tokenizer(folder / "origin") / "tokenizer.json"))
    torch.manual_seed(0)
    embedding = StaticEmbedding(tokenizer, torch.randn(tokenizer.get_vocab_size(), 24))
    model = SentenceTransformer(modules=[embedding, *behind], **more)
    model.save_pretrained(str(folder / "saved"), create_model_card=False)
    return str(folder / "saved")


a_format("StaticEmbedding")(static)
a_format("StaticEmbedding, Dense, unit length, prompts")(
    lambda folder: static(folder, dense(24, 16), unit(), **PROMPTS)
)


@a_format("model2vec: with its weights and mapping", source="model2vec")
def _model2vec(folder: Path) -> str:
    from safetensors.torch import save_file

    tiny_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    weights = {"embeddings": torch.randn(50, 24, generator=generator), "weights": torch.rand(400, generator=generator)}
    save_file(weights | {"mapping": torch.randint(50, (400,), generator=generator)}, folder / "model.safetensors")
    put(folder, "config.json", {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": True})
    modules = [(".", "StaticEmbedding"), ("1_Normalize", "Normalize")]
    put(folder / "1_Normalize", "config.json", {})
    tree = [{"idx": i, "name": str(i), "path": at, "type": f"{OLD}.{kind}"} for i, (at, kind) in enumerate(modules)]
    return put(folder, "modules.json", tree)


def by_hand(
    folder: Path, *, inside: str = "", transformer: Any = None, pooling: Any = None, family: str = "bert"
) -> str:
    """A directory as sentence-transformers before 6 wrote it. inside: the folder of its transformer."""
    tiny_model(folder / inside if inside else folder, family, layers=2)
    tree = [(inside, "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    put(
        folder,
        "modules.json",
        [{"idx": i, "name": str(i), "path": at, "type": f"{OLD}.{kind}"} for i, (at, kind) in enumerate(tree)],
    )
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    old = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes} | {"word_embedding_dimension": 32}
    put(folder, "1_Pooling/config.json", old if pooling is None else pooling)
    (folder / "2_Normalize").mkdir()
    if transformer is not None:
        put(folder / inside, "sentence_bert_config.json", transformer)
    put(folder, "config_sentence_transformers.json", {"__version__": {"sentence_transformers": "2.2.2"}})
    return str(folder)


FIVE = "sentence-transformers 5 or older, by hand"
OLDER: dict[str, dict[str, Any]] = {
    "max_seq_length of 24": {"transformer": {"max_seq_length": 24, "do_lower_case": False}},
    "the transformer in 0_Transformer": {
        "inside": "0_Transformer",
        "transformer": {"max_seq_length": 40, "do_lower_case": False},
    },
    "no sentence_bert_config.json": {},
    "do_lower_case": {"transformer": {"max_seq_length": 60, "do_lower_case": True}},
    "max_seq_length: null": {"transformer": {"max_seq_length": None, "do_lower_case": False}},
    "two poolings by booleans": {
        "pooling": {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
        "transformer": {"max_seq_length": 50},
    },
    "pooling that names no mode (mean)": {"pooling": {"word_embedding_dimension": 32}},
    "xlm-roberta, all its positions": {"family": "xlm-roberta", "transformer": {"max_seq_length": 128}},
}
for name, more in OLDER.items():
    a_format(name, source=FIVE)(lambda folder, more=more: by_hand(folder, **more))


@a_format("sharded weights in bfloat16")
def _sharded(folder: Path) -> str:
    import transformers

    path = saved(folder, "qwen3", pool("lasttoken"), unit())
    model = transformers.AutoModel.from_pretrained(path).to(torch.bfloat16)
    (Path(path) / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="30KB")
    return path


@a_format("code of its own (auto_map), named", settings=("trust_remote_code=true",), source="remote code")
def _code(folder: Path) -> str:
    return with_code(folder)


@a_format("code of its own that gives a dictionary", settings=("trust_remote_code=true",), source="remote code")
def _code_tuple(folder: Path) -> str:
    return with_code(folder, 'return {"last_hidden_state": super().forward(*args, **more).last_hidden_state * 2}')


@a_format("code of its own beside a native architecture", refused="set trust_remote_code", source="remote code")
def _code_unnamed(folder: Path) -> str:
    return with_code(folder)


_OWN = {"settings": ("trust_remote_code=true",), "source": "its card's code", "not_as_student": True}
_OWN |= {"refused": "is a frozen teacher only"}


def finished(path: str, texts: list[str], _: list[str]) -> torch.Tensor:
    """What a model's own code gives for each text, at length 1; states are averaged."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    found = []
    for text in texts:
        said = model(**tokenizer(text, truncation=True, return_tensors="pt"))["sentence_embeddings"]
        found.append(said.reshape(-1, said.shape[-1]).mean(0))
    return nn.functional.normalize(torch.stack(found), dim=-1)


_FINISHED = "super().forward(*args, **more).last_hidden_state"


@a_format("NV-Embed: code that gives finished vectors", reference=finished, **_OWN)
def _code_vectors(folder: Path) -> str:
    return with_code(folder, f'return {{"sentence_embeddings": {_FINISHED}[:, 0, :16]}}')


@a_format("NV-Embed: code that gives finished states", reference=finished, **_OWN)
def _code_states(folder: Path) -> str:
    return with_code(folder, f'return {{"sentence_embeddings": {_FINISHED}.tanh()}}')


@a_format("code of its own, finished vectors named in modality_config", **(_OWN | {"source": "remote code"}))
def _code_named(folder: Path) -> str:
    path = with_code(folder, f'return {{"vector": {_FINISHED}[:, 0]}}')
    modules = json.loads((Path(path) / "modules.json").read_text())
    put(path, "modules.json", [module for module in modules if not module["type"].endswith("Pooling")])
    read = {"method": "forward", "method_output_name": "vector"}
    named = {"modality_config": {"text": read}, "module_output_name": "sentence_embedding"}
    return change(path, "sentence_bert_config.json", **named)


@a_format("the pooler's output in place of states of tokens", refused="reads another output than")
def _pooler(folder: Path) -> str:
    path = saved(folder, "bert", unit())
    read = {"method": "forward", "method_output_name": "pooler_output"}
    named = {"modality_config": {"text": read}, "module_output_name": "sentence_embedding"}
    return change(path, "sentence_bert_config.json", **named)


_MIXED = "found = super().forward(*args, **more); found.last_hidden_state = found.last_hidden_state * 2; return found"


def with_code(folder: Path, forward: str = _MIXED) -> str:
    """A native architecture whose directory brings a class of its own, which gives something else."""
    path = saved(folder, "bert", pool(), unit())
    body = f"        {forward}"
    code = (
        f"import transformers\n\n\nclass Own(transformers.BertModel):\n    def forward(self, *args, **more):\n{body}\n"
    )
    (Path(path) / "own_code.py").write_text(code)
    return change(path, "config.json", auto_map={"AutoModel": "own_code.Own"})


@a_format("a decoder with a chat template, which sentence-transformers puts texts to")
def _message(folder: Path) -> str:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    origin = rerankers.made(folder / "origin", "base", rerankers.CHAT, positions=130)
    modules = [Transformer(origin), pool("lasttoken"), unit()]
    model = SentenceTransformer(modules=modules, prompts={"query": "Find it.", "document": ""})
    assert "message" in model[0].modality_config
    model.save_pretrained(str(folder / "saved"), create_model_card=False)
    return str(folder / "saved")


def late(folder: Path, **more: Any) -> str:
    """A late-interaction model, as sentence-transformers saves it."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    reader = Transformer(tiny_model(folder / "origin", "bert", layers=2), **more.pop("reader", {}))
    token = "token_embeddings"
    parts = [dense(32, 16, nn.Identity(), bias=False, module_input_name=token), Normalize(token)]
    mask = MultiVectorMask(**more.pop("mask", {}))
    MultiVectorEncoder(modules=[reader, parts[0], mask, parts[1]], **more).save_pretrained(
        str(folder / "saved"), create_model_card=False
    )
    return str(folder / "saved")


EXPANDED = {"strategy": "fixed", "length": 20, "attend": False}
LATE: dict[str, dict[str, Any]] = {
    "late interaction": {},
    "ColBERT: fixed expansion, skiplist, prompts": {
        "reader": {"query_expansion": EXPANDED, "document_length": 60},
        "mask": {"skiplist_words": list("!?.,:;")},
        "prompts": {"query": "[unused0] ", "document": "[unused1] "},
    },
    "late interaction: least expansion that is attended to": {
        "reader": {"query_expansion": EXPANDED | {"strategy": "min", "attend": True}, "query_length": 40}
    },
    "late interaction: a skiplist of queries as well": {
        "mask": {"skiplist_words": ["the", "."], "skiplist_tasks": ["query", "document"]}
    },
}
for name, more in LATE.items():
    a_format(name)(lambda folder, more=more: late(folder, **{key: dict(value) for key, value in more.items()}))


@a_format("ColBERT of Stanford: linear.weight, artifact.metadata", source="Stanford's ColBERT, by hand")
def _stanford(folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    path = tiny_model(folder, "bert", layers=2)
    weights = {f"bert.{key}": x for key, x in load_file(folder / "model.safetensors").items()}
    weights["linear.weight"] = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change(path, "config.json", architectures=["HF_ColBERT"])
    kept = {"query_maxlen": 24, "doc_maxlen": 60, "dim": 16, "query_token_id": "[unused0]", "doc_token_id": "[unused1]"}
    return put(
        path,
        "artifact.metadata",
        kept | {"mask_punctuation": True, "attend_to_mask_tokens": False, "similarity": "cosine"},
    )


def pylate(folder: Path, **keys: Any) -> str:
    """A directory as PyLate writes it."""
    from safetensors.torch import save_file

    path = tiny_model(folder, keys.pop("family", "bert"), layers=2, **keys.pop("shape", {}))
    tree = [("", f"{OLD}.Transformer"), ("1_Dense", "pylate.models.Dense.Dense")]
    put(
        path,
        "modules.json",
        [{"idx": i, "name": str(i), "path": at, "type": kind} for i, (at, kind) in enumerate(tree)],
    )
    shape = {"in_features": 32, "out_features": 16, "bias": False}
    put(path, "1_Dense/config.json", shape | {"activation_function": "torch.nn.modules.linear.Identity"})
    save_file(
        {"linear.weight": torch.randn(16, 32, generator=torch.Generator().manual_seed(3))},
        folder / "1_Dense/model.safetensors",
    )
    put(path, "sentence_bert_config.json", {"max_seq_length": 100, "do_lower_case": False})
    said = {
        "model_type": "ColBERT",
        "query_prefix": "[unused0]",
        "document_prefix": "[unused1]",
        "similarity_fn_name": "MaxSim",
    }
    said |= {
        "query_length": 24,
        "document_length": 60,
        "attend_to_expansion_tokens": False,
        "skiplist_words": list("!?.,"),
    }
    return put(path, "config_sentence_transformers.json", {k: v for k, v in (said | keys).items() if v is not None})


PYLATE: dict[str, dict[str, Any]] = {
    "PyLate: expansion as it is by default": {},
    "PyLate: no expansion": {"do_query_expansion": False},
    "PyLate: expansion that is attended to": {"do_query_expansion": True, "attend_to_expansion_tokens": True},
    "PyLate: no skiplist": {"skiplist_words": []},
}
for name, keys in PYLATE.items():
    a_format(name, source="PyLate, by hand")(lambda folder, keys=keys: pylate(folder, **keys))


def plain_copy(folder: Path, **keys: Any) -> str:
    """A saved model whose config.json is changed."""
    return change(saved(folder, "bert", pool()), "config.json", **keys)


REFUSED: dict[str, tuple[str, Any]] = {
    "vision and language in one": (
        "images or sound",
        lambda f: plain_copy(f, model_type="qwen2_vl", vision_config={"depth": 1}),
    ),
    "CLIP": ("images or sound|not supported", lambda f: plain_copy(f, model_type="clip")),
    "an encoder-decoder that is no T5": ("is an encoder-decoder", lambda f: plain_copy(f, model_type="bart")),
    "4 bits without bitsandbytes": (
        r"quantised \(bitsandbytes\)",
        lambda f: plain_copy(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ),
    "GPTQ without its package": (
        r"quantised \(gptq\)",
        lambda f: plain_copy(f, quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    "a language model, its kind not named": ("is a language model", lambda f: tiny_model(f, "llama", "causal")),
    "an architecture that transformers does not know": ("cannot be loaded", lambda f: tiny_model_of_type(f, "no-such")),
}
for name, (refused, write) in REFUSED.items():
    a_format(name, refused=refused)(write)


def tiny_model_of_type(folder: Path, kind: str) -> str:
    """A bare model that says to be of another type."""
    return change(tiny_model(folder, "bert", layers=2), "config.json", model_type=kind)


@a_format("word vectors and an LSTM", refused="is not supported", source=FIVE)
def _lstm(folder: Path) -> str:
    path = by_hand(folder)
    tree = [{"idx": 0, "name": "0", "path": "", "type": f"{OLD}.WordEmbeddings"}]
    return put(path, "modules.json", tree)


@a_format("modules that are code of their own (jina)", refused="is code of its own", source="remote code")
def _modules(folder: Path) -> str:
    path = by_hand(folder)
    return put(path, "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "custom_st.Transformer"}])


@a_format("weights as pickle alone", refused="come as pickle only", source=FIVE)
def _pickled(folder: Path) -> str:
    import transformers

    path = by_hand(folder)
    torch.save(transformers.AutoModel.from_pretrained(path).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return path


def _splade(folder: Path, family: str, pooling: Any, **more: Any) -> str:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    path = tiny_model(folder / "origin", family, "masked", layers=2)
    modules = [Transformer(path, transformer_task="fill-mask"), SpladePooling(**pooling)]
    SparseEncoder(modules=modules, device="cpu", **more).save_pretrained(str(folder / "saved"), create_model_card=False)
    return str(folder / "saved")


@a_format("SPLADE: maximum, prompts")
def _splade_max(folder: Path) -> str:
    return _splade(folder, "bert", {}, prompts={"query": "ask: ", "document": "said: "})


@a_format("SPLADE: sum, log twice, of DistilBERT, as version 5 names it", source=FIVE)
def _splade_sum(folder: Path) -> str:
    path = _splade(folder, "distilbert", {"pooling_strategy": "sum", "activation_function": "log1p_relu"})
    modules = json.loads((Path(path) / "modules.json").read_text())
    for module, name in zip(modules, ("MLMTransformer", "SpladePooling"), strict=True):
        module["type"] = f"sentence_transformers.sparse_encoder.models.{name}"
    return put(path, "modules.json", modules)


@a_format("SPLADE: a cosine", refused="compares sparse vectors by cosine")
def _splade_cosine(folder: Path) -> str:
    return _splade(folder, "bert", {}, similarity_fn_name="cosine")


assert len(FORMATS) > 45
