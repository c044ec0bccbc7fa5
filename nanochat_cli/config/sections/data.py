"""`[data]` and `[tokenizer]`: the text that is trained on, and its byte-level BPE of `model.vocab_size` entries."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from nanochat_cli.config.sections.section import Section
from nanochat_cli.config.source_parts import Part, parts_of

TokenFormat = Literal["nanotron", "megatron", "nanogpt", "llmc"]
"""Files of token ids that other programs write (see `data.token_files`)."""


class DataConfig(Section):
    path: Path | None = Field(default=None, description="folder of shards written by `nanochat tokenize`")
    source: str = Field(default="stdlib", description="corpus to tokenise into the cache if data.path is not set")
    sources: tuple[str, ...] = Field(
        default=(),
        description="several in place of data.source, NAME=SOURCE:WEIGHT each; batches draw by weight",
    )
    glob: str = Field(default="**/*", description="which files of a source folder are read")
    text_field: str = Field(default="text", description="field of a record that holds its text; dots for a nested one")
    format: Literal["auto", TokenFormat] = Field(
        default="auto", description="format of a source of token ids; auto: recognised by suffix and content"
    )
    eot_id: NonNegativeInt | None = Field(
        default=None, description="id between the documents of token files; default: the tokenizer's end of text"
    )
    chat: bool = Field(default=False, description="records are conversations or instructions: answers are trained")
    base: Path | None = Field(
        default=None,
        description="data set of text, beside conversations: for train.mix, and measured to see forgetting",
    )
    streaming: bool = Field(default=False, description="read an hf: source without storing it first")
    gitignore: bool = Field(default=True, description="leave out what the .gitignore files of a folder name")
    max_file_bytes: PositiveInt | None = Field(default=None, description="leave out larger files")
    generated: Literal["keep", "remove"] = Field(
        default="keep", description="files that programs wrote, by their marks, or minified: leave them out or not"
    )
    secrets: Literal["off", "report", "mask"] = Field(
        default="off", description="keys and tokens of known forms: not sought, counted, replaced in the text"
    )
    functions: bool = Field(
        default=False, description="take only short free functions of Python and Rust files, each as a document"
    )
    dedup: Literal["none", "exact", "near"] = Field(
        default="near", description="leave out copies of a document, or near-duplicates of one that is kept, too"
    )
    contamination: Literal["off", "count", "remove"] = Field(
        default="count",
        description="documents with ten words in a row of a built-in problem: not sought, counted, left out",
    )
    max_bytes: PositiveInt | None = Field(default=None, description="stop after this many bytes of documents")
    val_fraction: float = Field(default=0.02, gt=0, lt=0.5, description="share held out, by cluster of near-duplicates")
    workers: PositiveInt | None = Field(default=None, description="encoding processes; default: one per core")

    @field_validator("sources")
    @classmethod
    def _are_parts(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(str, parts_of(sources)))

    @model_validator(mode="after")
    def _chat_fits(self) -> Self:
        others = {
            "sources = []": bool(self.sources),
            "functions = false": self.functions,
            'secrets other than "mask"': self.secrets == "mask",
            'format = "auto"': self.format != "auto",
            'generated = "keep"': self.generated == "remove",
            "max_file_bytes = none": self.max_file_bytes is not None,
        }
        if self.chat and (wrong := [name for name, is_on in others.items() if is_on]):
            raise ValueError(f"chat = true reads conversations from one source; it needs {', '.join(wrong)}")
        return self

    @property
    def parts(self) -> list[Part]:
        """The sources of a mixture; none for a single source."""
        return parts_of(self.sources)

    @property
    def named_source(self) -> str:
        """The source, or all of them, in one text."""
        return ", ".join(self.sources) or self.source


class TokenizerConfig(Section):
    pre: Literal["gpt-2", "llama3", "qwen2"] = Field(default="gpt-2", description="pre-tokenizer, named by llama.cpp")
    max_token_length: PositiveInt = Field(default=24, le=32, description="longest token, in bytes")
    train_bytes: PositiveInt = Field(default=32_000_000, description="bytes of the corpus that BPE training reads")
    path: Path | None = Field(default=None, description="an existing tokenizer.json to use instead of training one")
