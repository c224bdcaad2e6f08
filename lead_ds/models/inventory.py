"""Every key of every file of a model's directory: honoured, known not to matter, or refused by name.

A key in none of these lists may change how a model is read. It is refused, unless its value is empty (null, false, "", [], {}).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lead_ds.errors import InputError
from lead_ds.io.json_text import parse_json
from lead_ds.io.located import find_file
from lead_ds.models.files import family_of, read_json, saved_modules, transformer_folder

_EMPTY: tuple[Any, ...] = (None, False, "", [], {})


@dataclass(frozen=True)
class Keys:
    """The keys of one file. honoured: read here, or by the library that reads the file. idle, refused: each with its reason."""

    honoured: frozenset[str]
    idle: dict[str, str]
    refused: dict[str, str]

    @property
    def known(self) -> set[str]:
        """All of them."""
        return {*self.honoured, *self.idle, *self.refused}


def _keys(honoured: str = "", idle: dict[str, str] | None = None, refused: dict[str, str] | None = None) -> Keys:
    return Keys(frozenset(honoured.split()), idle or {}, refused or {})


def _alike(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


_BACKEND = "chooses how the model is computed, which the program's own settings do"
_PARTS = {
    "Pooling": _keys(
        "embedding_dimension word_embedding_dimension pooling_mode include_prompt pooling_mode_cls_token pooling_mode_max_tokens "
        "pooling_mode_mean_tokens pooling_mode_mean_sqrt_len_tokens pooling_mode_weightedmean_tokens pooling_mode_lasttoken"
    ),
    "Dense": _keys(
        "in_features out_features bias activation_function module_input_name module_output_name use_residual "
        "input_keys output_keys"
    ),
    "SpladePooling": _keys(
        "pooling_strategy activation_function embedding_dimension word_embedding_dimension",
        {"chunk_size": "splits the work alone"},
    ),
    "Normalize": _keys("module_input_name module_output_name"),
    "LayerNorm": _keys("dimension"),
    "Dropout": _keys(idle={"dropout": "acts in training alone, where it is honoured"}),
    "MultiVectorMask": _keys("skiplist_words skiplist_tasks keep_only_token_ids"),
    "LogitScore": _keys("true_token_id false_token_id module_input_name"),
    "StaticEmbedding": _keys(
        "normalize model_type",
        {
            "architectures": "names the class of model2vec",
            "tokenizer_name": "says where the tokenizer came from",
            **_alike("apply_pca apply_zipf pca_dims sif_coefficient", "says how the vectors were made"),
            "hidden_dim": "is the width of the weights",
            "seq_length": "is read by model2vec's own encode alone",
            "embedding_dtype": "is the dtype of the weights",
            "vocabulary_quantization": "is in the weights (mapping)",
        },
    ),
}
MODULES = _PARTS
"""By class, of sentence-transformers' modules that are read."""

_ROOT = _keys(
    "model_type prompts default_prompt_name similarity_fn_name truncate_dim query_prefix document_prefix query_length "
    "document_length do_query_expansion attend_to_expansion_tokens attend_to_mask_tokens skiplist_words max_active_dims",
    {
        "__version__": "says which version saved it",
        "activation_fn": "puts a monotone function on scores, which here are logits",
        "keep_in_fp32_modules": "changes rounding alone",
        "requirements": "is checked by sentence-transformers as it loads the directory",
        "query_prefix_id": "is the token of query_prefix",
        "document_prefix_id": "is the token of document_prefix",
    },
)
_READER = _keys(
    "max_seq_length do_lower_case transformer_task modality_config module_output_name processing_kwargs query_length "
    "document_length query_expansion processor_kwargs tokenizer_args",
    {
        "unpad_inputs": _BACKEND,
        "backend": _BACKEND,
        **_alike("model_args model_kwargs config_args config_kwargs", "its keys are checked one by one"),
    },
    {"tokenizer_name_or_path": "its tokenizer lies elsewhere"},
)
_LOADING = _keys(
    idle=_alike(
        "torch_dtype dtype attn_implementation device_map use_safetensors low_cpu_mem_usage use_cache trust_remote_code",
        _BACKEND,
    )
)
_TOKENS = _keys(
    "model_max_length", {"padding_side": "texts are padded on the right, and positions follow", "use_fast": _BACKEND}
)
_METADATA = _keys(
    "query_maxlen doc_maxlen dim query_token_id doc_token_id mask_punctuation attend_to_mask_tokens similarity",
    {
        **_alike("query_token doc_token", "is the name of query_token_id, doc_token_id"),
        **_alike(
            "checkpoint collection queries triples root experiment name overwrite index_path rank nranks amp gpus "
            "total_visible_gpus avoid_fork_if_possible index_root index_name bsize accumsteps lr maxsteps save_every "
            "warmup warmup_bert relu nway use_ib_negatives reranker distillation_alpha ignore_scores model_name "
            "index_bsize nbits kmeans_niters resume ncells centroid_score_threshold ndocs load_index_with_mmap interaction "
            "meta quant_dtype pool_factor clustering_mode protected_tokens",
            "is of its training or of an index",
        ),
    },
)
_RECORD = _keys(
    "kind scale query_length passage_length max_length prompts normalize dims dim",
    {"class": "names the class that wrote it"},
)
_ENTRY = _keys(
    "type path",
    {
        "idx": "the list has the order",
        "name": "names nothing that is read",
        "kwargs": "allows arguments that nobody passes",
    },
)

FILES: dict[str, Keys] = {
    "config_sentence_transformers.json": _ROOT,
    "sentence_bert_config.json": _READER,
    "artifact.metadata": _METADATA,
    "lead_ds.json": _RECORD,
    "modules.json": _ENTRY,
}
"""Of files with keys of their own; config.json and tokenizer_config.json are read by transformers, key by key."""

_OLDER = tuple(
    f"sentence_{name}_config.json" for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Of transformers' configurations: what no class declares, and what changes nothing of what is read.
_OF_NO_CLASS = _keys(
    "_name_or_path transformers_version torch_dtype dtype architectures model_type auto_map sentence_transformers "
    "sbert_ce_default_activation_function quantization_config gradient_checkpointing output_past _num_labels "
    "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type "
    "position_embedding_type classifier_dropout adapters unsloth_version language name _attn_implementation_autoset "
    "model_name finetuning_task tokenizer_class n_positions id2label label2id num_labels problem_type use_cache "
    "layer_types rope_scaling rope_theta"
).known


def check_keys(path: str) -> None:
    """Raise InputError for a key of a model's files that is refused, or that may change the reading and is not known here."""
    family = family_of(path)
    if family not in (None, "SentenceTransformer", "CrossEncoder", "MultiVectorEncoder", "SparseEncoder"):
        raise InputError(path, f"a {family} of sentence-transformers is not supported", "use a model of dense vectors")
    folder = transformer_folder(path)
    for name, keys in FILES.items():
        if name in ("modules.json", "lead_ds.json"):  # a list, below; and what a kind of another package may add to
            continue
        inside = f"{folder}/{name}".lstrip("/") if name == "sentence_bert_config.json" else name
        _check(path, inside, read_json(path, inside), keys)
    for name in _OLDER:
        inside = f"{folder}/{name}".lstrip("/")
        _check(path, inside, read_json(path, inside), _READER)
    for kind, at in saved_modules(path):
        if kind not in ("Transformer", "MLMTransformer"):
            name = f"{at.strip('./')}/config.json".lstrip("/")
            _check(path, name, read_json(path, name), MODULES[kind])
    own = read_json(path, f"{folder}/sentence_bert_config.json".lstrip("/"))
    if own.get("processing_kwargs") and "message" not in own.get("modality_config", {}):
        what = "processing_kwargs change how texts are tokenised, which is read of chat templates alone"
        raise InputError(f"{path}/sentence_bert_config.json", what, "save it without")
    for name, keys in (("model", _LOADING), ("config", _LOADING), ("processor", _TOKENS), ("tokenizer", _TOKENS)):
        for key in (f"{name}_kwargs", f"{name}_args"):
            _check(path, f"sentence_bert_config.json: {key}", own.get(key) or {}, keys)
    modules = find_file(path, "modules.json")
    for entry in parse_json(modules.read_text("utf-8")) if modules is not None else ():
        _check(path, "modules.json", entry, _ENTRY)


def unread(path: str, shape: Any) -> list[str]:
    """Keys of config.json that the architecture's configuration does not declare: what they say is not read."""
    tree = read_json(path, f"{transformer_folder(path)}/config.json".lstrip("/"))
    declared = {*vars(type(shape)()), *type(shape)().to_dict(), *getattr(shape, "attribute_map", {}), *_OF_NO_CLASS}
    return sorted(key for key, value in tree.items() if key not in declared and value not in _EMPTY)


def _check(path: str, file: str, tree: dict[str, Any], keys: Keys) -> None:
    for key, value in tree.items():
        if key in keys.refused and value not in _EMPTY:
            raise InputError(f"{path}/{file}", f"{key}: {keys.refused[key]}, which is not supported", "save it without")
        if key not in keys.known and value not in _EMPTY:
            what = f"the key {key} is not known here, and may change how the model is read"
            raise InputError(f"{path}/{file}", what, "take it out if it does not matter, or use a newer lead-ds")
