"""`[loader]`: how batches reach the trainer; their content does not depend on it."""

from pydantic import Field, PositiveInt

from nanochat_cli.config.sections.section import Section


class LoaderConfig(Section):
    enabled: bool = Field(default=False, description="read batches ahead in separate processes; false: in the trainer")
    workers: PositiveInt = Field(default=4, description="processes that read ahead")
    prefetch: PositiveInt = Field(default=8, description="most batches ready or in progress, 16 bytes per token each")
    on_the_fly: bool = Field(default=False, description="tokenise text while training instead of reading shards")

    def held(self) -> dict[str, object]:
        return {"on_the_fly": self.on_the_fly}
