"""Look-alikes of models that people have on the hub, with the keys of their configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors
from torch import nn

from tests.formats.format import a_format, change, dense, pool, put, saved, unit
from tests.formats.pairs import BARE, classifier, pair_format
from tests.formats.vectors import pylate, static, with_code
from tests.models import reranker_cards as rerankers

SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
NONE: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
LFM2 = NONE | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48}
LFM2 |= {"block_auto_adjust_ff_dim": False, "conv_L_cache": 3}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ENDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)


@a_format("EmbeddingGemma: attention both ways, prompts of many tasks")
def _embedding_gemma(folder: Path) -> str:
    prompts = {
        "query": "task: search result | query: ",
        "document": "title: none | text: ",
        "STS": "task: same | query: ",
    }
    behind = [pool(), dense(32, 48, nn.Identity(), bias=False), dense(48, 32, nn.Identity(), bias=False), unit()]
    shape = {"use_bidirectional_attention": True, "layer_types": ["sliding_attention", "full_attention"]}
    return saved(folder, "gemma3_text", *behind, shape=shape, prompts=prompts)


@a_format("Qwen3-Embedding: EOS by its tokenizer, padded on the left, a chat template that is not used")
def _qwen3_embedding(folder: Path) -> str:
    path = saved(folder, "qwen3", pool("lasttoken"), unit(), prompts={"query": SEARCH, "document": ""})
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    end = [("<|endoftext|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", pair="$A <|endoftext|> $B <|endoftext|>", special_tokens=end
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    (Path(path) / "sentence_bert_config.json").unlink()  # as its repository has none
    return path


NATIVE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nomic-embed-text, its native class: mean": ("nomic_bert", "mean", {}),
    "jina-embeddings-v3, its native class: mean": ("jina_embeddings_v3", "mean", {"pad_token_id": 0}),
    "gte-multilingual, arctic-embed-m-v2, their native class: cls": ("gte", "cls", {"pad_token_id": 0}),
    "EuroBERT, jina-embeddings-v5-nano: last token": ("eurobert", "lasttoken", NONE),
    "ettin, a decoder: last token": ("modernbert-decoder", "lasttoken", ENDS),
    "LFM2: last token": ("lfm2", "lasttoken", LFM2),
    "a decoder of experts: last token": (
        "qwen3_moe",
        "lasttoken",
        NONE | {"num_key_value_heads": 2, "head_dim": 8} | EXPERTS,
    ),
    "a decoder that reads both ways (is_causal: false): mean": (
        "qwen3",
        "mean",
        {"is_causal": False},
    ),
}
for name, (family, mode, shape) in NATIVE.items():
    a_format(name)(
        lambda folder, family=family, mode=mode, shape=shape: saved(folder, family, pool(mode), unit(), shape=shape)
    )


@a_format("arctic-embed-l-v2: xlm-roberta, cls, a query prompt")
def _arctic(folder: Path) -> str:
    return saved(folder, "xlm-roberta", pool("cls"), unit(), prompts={"query": "query: ", "document": ""})


@a_format("bge-m3: its dense head, the other two beside it")
def _bge_m3(folder: Path) -> str:
    path = saved(folder, "xlm-roberta", pool("cls"), unit())
    for name, width in (("colbert_linear.pt", 32), ("sparse_linear.pt", 1)):
        torch.save(nn.Linear(32, width).state_dict(), Path(path) / name)
    return path


@a_format("mdbr-leaf: mean, Dense to the teacher's width, unit length, no similarity named")
def _leaf(folder: Path) -> str:
    path = saved(folder, "bert", pool(), dense(32, 64, nn.Identity()), unit(), prompts={"query": SEARCH})
    return change(path, "config_sentence_transformers.json", similarity_fn_name=None)


@a_format("potion: model2vec with its own keys, saved as a StaticEmbedding", source="model2vec")
def _potion(folder: Path) -> str:
    path = static(folder, unit())
    inside = json.loads((Path(path) / "modules.json").read_text())[0]["path"]
    keys = {"apply_pca": 256, "sif_coefficient": 1e-4, "hidden_dim": 24, "seq_length": 1000000, "normalize": True}
    return put(
        Path(path) / inside, "config.json", {"model_type": "model2vec", "architectures": ["StaticModel"], **keys}
    )


@a_format("GTE-ModernColBERT: PyLate over ModernBERT", source="PyLate, by hand")
def _modern(folder: Path) -> str:
    return pylate(folder, family="modernbert", query_prefix="[Q] ", document_prefix="[D] ")


@a_format("LFM2-ColBERT: PyLate over a decoder with convolutions", source="PyLate, by hand")
def _lfm2(folder: Path) -> str:
    path = pylate(
        folder, family="lfm2", shape=dict(LFM2), query_prefix="[Q] ", document_prefix="[D] ", do_query_expansion=False
    )
    return change(path, "tokenizer_config.json", pad_token="<|endoftext|>")


@a_format("mxbai-edge-colbert: PyLate with two Dense, one with a residual", source="PyLate, by hand")
def _edge(folder: Path) -> str:
    from safetensors.torch import save_file

    path = pylate(folder)
    modules = json.loads((folder / "modules.json").read_text())
    put(path, "modules.json", [*modules, {**modules[1], "idx": 2, "name": "2", "path": "2_Dense"}])
    shape = {"in_features": 16, "out_features": 8, "bias": False, "use_residual": True}
    put(path, "2_Dense/config.json", shape | {"activation_function": "torch.nn.modules.linear.Identity"})
    generator = torch.Generator().manual_seed(4)
    weights = {"linear.weight": torch.randn(8, 16, generator=generator)}
    weights["residual.weight"] = torch.randn(8, 16, generator=generator)
    save_file(weights, folder / "2_Dense/model.safetensors")
    return path


@a_format(
    "jina-colbert-v2: ColBERT with code of its own",
    refused="set trust_remote_code|holds a colbert",
    source="remote code",
)
def _jina_colbert(folder: Path) -> str:
    path = pylate(folder)
    return change(path, "config.json", auto_map={"AutoModel": "jinaai/xlm-roberta-flash--modeling.XLMRobertaModel"})


@a_format("llama-embed-nemotron: code that reads both ways, read as native", refused="set trust_remote_code")
def _nemotron(folder: Path) -> str:
    path = saved(folder, "llama", pool(), unit())
    return change(path, "config.json", auto_map={"AutoModel": "llama_bidirectional_model.LlamaBidirectionalModel"})


@a_format(
    "jina-embeddings-v4: code that gives a record of its own",
    settings=("trust_remote_code=true",),
    source="remote code",
    refused="gives no states of tokens",
)
def _jina_four(folder: Path) -> str:
    return with_code(folder, 'return {"single_vec_emb": super().forward(*args, **more).last_hidden_state[:, 0]}')


@a_format("T5Gemma, its encoder", refused="is an encoder-decoder")
def _t5gemma(folder: Path) -> str:
    return change(saved(folder, "bert", pool()), "config.json", model_type="t5gemma")


for pooling in ("cls", "mean"):
    pair_format(f"gte-reranker-modernbert, granite-reranker: {pooling}", source=BARE)(
        lambda folder, pooling=pooling: classifier(folder, "modernbert", classifier_pooling=pooling)
    )
for pooling in ("bos", "mean"):
    pair_format(f"cross-encoder: eurobert, {pooling}", source=BARE)(
        lambda folder, pooling=pooling: padded(folder, "eurobert", classifier_pooling=pooling, **NONE)
    )
for family in ("nomic_bert", "gte"):
    pair_format(f"cross-encoder: {family}", source=BARE)(
        lambda folder, family=family: classifier(folder, family, pad_token_id=0, type_vocab_size=2)
    )
pair_format("cross-encoder: ettin, a decoder", source=BARE)(lambda folder: padded(folder, "modernbert-decoder", **ENDS))


@pair_format(
    "cross-encoder: eurobert, each token's score and then their mean", source=BARE, refused="scoring head of a eurobert"
)
def _late_scores(folder: Path) -> str:
    return classifier(folder, "eurobert", classifier_pooling="late", **NONE)


def padded(folder: Path, family: str, **shape: Any) -> str:
    """A classifier whose tokenizer has a token to pad with."""
    return change(classifier(folder, family, **shape), "tokenizer_config.json", pad_token="<|endoftext|>")


def scored_by_code(folder: Path, forward: str) -> str:
    """A classifier whose directory brings a class of its own."""
    path = classifier(folder, "bert")
    body = f"        found = super().forward(*args, **more)\n        {forward}\n        return found\n"
    code = "import transformers\n\n\nclass Own(transformers.BertForSequenceClassification):\n"
    (Path(path) / "own_code.py").write_text(f"{code}    def forward(self, *args, **more):\n{body}")
    return change(path, "config.json", auto_map={"AutoModelForSequenceClassification": "own_code.Own"})


OWN: dict[str, Any] = {"settings": ("trust_remote_code=true",), "source": "remote code"}


@pair_format("jina-reranker-v2: a classifier with code of its own", **OWN)
def _jina_reranker(folder: Path) -> str:
    return scored_by_code(folder, "pass")


@pair_format("a classifier whose own code changes its scores", refused="computes its scores in another way", **OWN)
def _own_scores(folder: Path) -> str:
    return scored_by_code(folder, "found.logits = found.logits * 2")


@pair_format(
    "a decoder reranker that scales its logits",
    kind="llm_reranker",
    settings=("template=pair", "trust_remote_code=true"),
    refused="computes its scores in another way",
    source=BARE,
)
def _scaled(folder: Path) -> str:
    path = rerankers.made(folder)
    code = "import transformers\n\n\nclass Own(transformers.Qwen3ForCausalLM):\n    def forward(self, *args, **more):\n"
    code += "        found = super().forward(*args, **more)\n        found.logits = found.logits * 0.5\n        return found\n"
    (Path(path) / "own_code.py").write_text(code)
    return change(path, "config.json", auto_map={"AutoModelForCausalLM": "own_code.Own"})
