"""What training on conversations cannot be combined with. No torch: it is said before anything is loaded."""

from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError


def require_combinable(config: Config, *, chats: bool) -> None:
    """Raise ConfigError for keys that do not fit the kind of data. chats: it holds conversations, and not text."""
    data = config.data
    if not chats:
        if data.base is not None:
            raise ConfigError(
                "data.base belongs to training on conversations (nanochat tokenize --chat); several texts are mixed by "
                "data.sources"
            )
        return
    refused = {
        "mtp.enabled = true": (config.mtp.enabled, "it predicts tokens of prompts"),
        "collider.enabled = true": (config.collider.enabled, "the mask chooses the tokens that count already"),
        "distill.teacher": (config.distill.teacher is not None, "it is learned from on text"),
        "fim.rate above 0": (config.fim.rate > 0, "it moves text across the turns"),
        "loader.on_the_fly = true": (config.loader.on_the_fly, "they are packed as tokens"),
        "bigram_init.steps above 0": (config.bigram_init.steps > 0, "it begins from random weights"),
        "model.deltanet": (config.model.is_hybrid, "its state goes on from one conversation to the next in a row"),
    }
    for setting, (is_on, why) in refused.items():
        if is_on:
            raise ConfigError(
                f"{data.path or data.source} holds conversations, which {setting} does not fit: {why}; turn it off"
            )
