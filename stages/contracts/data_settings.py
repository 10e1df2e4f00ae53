"""Where the data come from: one source, or several, for training and for the held-out sets."""

from typing import Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from megatron_core_impl.data.conversations import keys_of
from stages.contracts.settings import NOT_IN_KEY, Frozen

Format = Literal["text", "messages", "sharegpt", "alpaca", "question-answer", "tokenized"]


class SourceOptions(Frozen):
    """How a source is read."""

    revision: str = Field("main", min_length=1, description="branch, tag or commit of a Hub dataset")
    subset: str | None = Field(None, description="configuration name of a Hub dataset")
    data_dir: str | None = Field(None, description="folder inside a Hub dataset, e.g. julia")
    split: str = Field("train", description="split of a Hub dataset, or of one that was saved to disk")
    format: Format = Field(
        "text",
        description="text: each record is a document; else conversations: messages as OpenAI writes them, sharegpt "
        "(conversations of from and value), alpaca (instruction, input, output), question-answer; or tokenized: Megatron's "
        "files of either, taken as they are",
    )
    text_column: str | tuple[str, ...] = Field(
        "text",
        description="text: column, or key of a JSON line, that holds the text; of a list of them each is a document, in turn",
    )  # fmt: skip
    columns: dict[str, str] = Field(
        {}, description="conversations: columns that are named otherwise, e.g. {question: prompt, answer: response}"
    )
    include: tuple[str, ...] = Field(("**/*",), min_length=1, description="folder: glob patterns of the files to read")
    exclude: tuple[str, ...] = Field((), description="folder: glob patterns of the files to leave out")

    @model_validator(mode="after")
    def _columns_fit_format(self) -> Self:
        if self.format != "text" and self.format != "tokenized":
            keys_of(self.format, self.columns)
        elif self.columns:
            raise ValueError("columns is for conversations; where the text has another name, set text_column")
        return self

    @field_validator("text_column", mode="before")
    @classmethod
    def _names_columns(cls, value: object) -> object:
        names = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise ValueError("must be a name, or a list of names that differ")
        return value if isinstance(value, str) else names  # a tuple even where a list is none, in strict mode

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.text_column,) if isinstance(self.text_column, str) else self.text_column

    @property
    def content(self) -> Literal["text", "conversations"] | None:
        """None: tokenized, and only the files say it."""
        return None if self.format == "tokenized" else "text" if self.format == "text" else "conversations"


class SourceSettings(SourceOptions):
    """One of several sources."""

    source: str = Field(min_length=1, description="a Hub dataset id, a local file, folder or glob, as of data.source")
    weight: float = Field(
        1.0, gt=0, description="its share of the samples, in proportion to the other sources'", json_schema_extra=NOT_IN_KEY
    )


class NamedSource(NamedTuple):
    """A source, and what its data are for: split into train, valid and test by train.split, or one of them as a whole."""

    name: str  # of its files
    key: str  # in the configuration
    role: Literal["all", "train", "valid", "test"]
    settings: SourceSettings


class DataSettings(SourceOptions):
    """Where the text, or the conversations, come from: one source, or several that are blended."""

    source: str | None = Field(
        None, min_length=1,
        description="Hub dataset id; a local .jsonl, .json or .parquet file (.gz, .zst); a folder or glob of these; "
        "a folder of source files; a folder that `datasets` saved; tokenized: the path of .bin and .idx, without these",
    )  # fmt: skip
    blend: tuple[SourceSettings, ...] = Field((), description="instead of source: several, each with a weight")
    valid: tuple[SourceSettings, ...] = Field(
        (), description="held-out data of its own; then all of source or blend is for training, and train.split is not used"
    )
    test: tuple[SourceSettings, ...] = Field((), description="with valid: data for the last evaluation")

    @model_validator(mode="after")
    def _sources_fit_together(self) -> Self:
        if (self.source is None) == (not self.blend):
            raise ValueError("data needs either source, for one, or blend, for several")
        if self.test and not self.valid:
            raise ValueError("test needs valid: without it, train.split cuts all three out of the same data")
        contents = {named.settings.content for named in self.sources()} - {None}
        if len(contents) > 1:
            raise ValueError("the sources hold text and conversations; a model is trained on one of them. See format")
        return self

    def sources(self) -> tuple[NamedSource, ...]:
        """All sources, those for training first."""
        if self.source is not None:
            options = {name: getattr(self, name) for name in SourceOptions.model_fields}
            mine = [("data", "data", SourceSettings(source=self.source, **options))]
        else:
            mine = [(f"data-{i}", f"data.blend[{i}]", settings) for i, settings in enumerate(self.blend)]
        return (
            *(NamedSource(name, key, "train" if self.valid else "all", settings) for name, key, settings in mine),
            *(NamedSource(f"valid-{i}", f"data.valid[{i}]", "valid", settings) for i, settings in enumerate(self.valid)),
            *(NamedSource(f"test-{i}", f"data.test[{i}]", "test", settings) for i, settings in enumerate(self.test)),
        )
