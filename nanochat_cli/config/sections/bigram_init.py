"""`[bigram_init]`: embedding and head fitted to the corpus' bigram counts before training."""

from pydantic import Field, NonNegativeInt, PositiveFloat

from nanochat_cli.config.sections.section import Section


class BigramInitConfig(Section):
    steps: NonNegativeInt = Field(default=0, description="gradient steps, each over the whole corpus; 0: off")
    embedding_lr: PositiveFloat = Field(default=0.2, description="Adam's learning rate of the embedding")
    head_lr: PositiveFloat = Field(default=0.02, description="Adam's learning rate of the head")
