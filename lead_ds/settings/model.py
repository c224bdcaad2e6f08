"""Settings that every model has: where it is, how its text is read, how its relevance is computed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lead_ds.settings.base import BITS, PACE, PLACE, Place, Positive, Section


class ModelConfig(Section):
    """What a model of any kind is set by: where it is, how its text is read and how its relevance is computed.

    Each kind has a subclass, its `Settings`, with the fields that it alone reads.
    """

    kind: str
    path: Annotated[Place, PLACE] = Field(
        description="a Hugging Face directory or hub name, or a sentence-transformers directory"
    )
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: build from config.json alone, for speed and memory measurements"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="auto: a frozen teacher in 16 bits: on a CPU bf16; on a GPU too where it was published in that and the GPU "
        "has it, else fp16. A student on a CPU in fp32; on a GPU in bf16 where it has that, else fp16",
    )
    scale: Literal["none", "cosine", "standard"] = Field(
        "none",
        description="of layer relevance, and of a teacher's final one: as the model gives it, cosines, or z-scores per query. "
        "A student's final relevance is what it will serve: see normalize",
    )
    query_prompt: str | None = Field(None, description="null: from the model's own sentence-transformers configuration")
    passage_prompt: str | None = None
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"], BITS] = Field(
        "auto",
        description="auto: sdpa; of a student in bf16 on a CPU, eager where rows have at most 128 tokens, which halves its "
        "backward pass; on a GPU with flash-attn installed and a 16-bit dtype, the fastest of sdpa, "
        "flash_attention_2 and (Hopper, flash-attn-3) flash_attention_3, measured on the run's first batch",
    )
    passes: Annotated[Positive | Literal["auto", "packed"] | None, BITS] = Field(
        "auto",
        description="forwards per micro-batch of the student, per window of the teacher. Texts are sorted by length, so that "
        "short ones are not padded to the longest, and queries share a pass with passages. auto: up to 4, where they save a "
        "twentieth of the tokens; of a sharded model, two of texts and one of pairs (on a CPU the process may then hold a fifth "
        "more). 1 under zero3 gathers the model once, not twice; 2 to 4 save padding. packed does both: one forward over rows in "
        "which texts stand side by side, none seeing another (decoders, BERT and its kin; checked at start; not colbert). null: "
        "one for queries, one for passages (or one for pairs)",
    )
    allow_pickle: Annotated[bool, PACE] = Field(
        False, description="allow weights that come as pickle (pytorch_model.bin) only"
    )
    trust_remote_code: bool | None = Field(
        None,
        description="run Python code that comes with the model: only if you read it. false: read it with transformers' own code. "
        "null: refuse a model that comes with code",
    )


class TextConfig(ModelConfig):
    """Of kinds that read a text alone, queries apart from passages."""

    instead: ClassVar[dict[str, str]] = {"max_length": "set query_length and passage_length"}

    query_length: Positive | None = Field(
        None, description="tokens of a query, its prompt among them; null: as many as the model's files say"
    )
    passage_length: Positive | None = Field(None, description="tokens of a passage, likewise")


class PairConfig(ModelConfig):
    """Of kinds that read a query and a passage as one text."""

    instead: ClassVar[dict[str, str]] = {
        "query_length": "set max_length, of the two together",
        "passage_length": "set max_length, of the two together",
        "pooling": "take it out: its head decides which state is read",
        "normalize": "take it out: a score has no length; scale: standard takes z-scores",
    }

    max_length: Positive | None = Field(
        None,
        description="tokens of a query-passage pair, its prompt among them; null: as many as the model's files say",
    )
    template: str | None = Field(
        None,
        description="how a frozen model is given a pair: a prompt with {query}, {passage} and perhaps {instruction}, of which "
        "the passage is cut. Or that of published models and their code, cut as there: qwen3, bge_gemma, mxbai, zerank, "
        "rankllama, monot5, monomt5. plain: a general one. pair: the tokenizer's own. null: as the model's files or its name say",
    )
    instruction: str | None = Field(
        None, description="the task, stated in the prompt. null: as the model's files or its template have it"
    )
