"""How many parameters a model has, by what they are for.

Each section of the configuration counts those of its component, so that `nanochat presets` needs no torch;
`ModelConfig.count_parameters` adds them up, and a test compares them with the model as built.
"""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; `total` is the sum of all but `inactive`."""

    embedding: int = 0
    head: int = 0
    """0 if the head is tied to the embedding."""
    attention: int = 0
    deltanet: int = 0
    """Projections of the DeltaNet layers."""
    feed_forward: int = 0
    """Dense feed-forwards, or all experts."""
    router: int = 0
    other: int = 0
    """What layers have besides ternary projections, such as the gates, convolution and decay of DeltaNet."""
    hyper_connections: int = 0
    norms: int = 0
    inactive: int = 0
    """The part of feed_forward that a token does not use: the experts that were not chosen."""

    def __add__(self, other: "ParameterCounts") -> "ParameterCounts":
        added = asdict(other)
        return ParameterCounts(**{name: count + added[name] for name, count in asdict(self).items()})

    @property
    def matrices(self) -> int:
        """Linear layers of the blocks, which are ternary."""
        return self.attention + self.deltanet + self.feed_forward

    @property
    def total(self) -> int:
        small = self.router + self.other + self.hyper_connections + self.norms
        return self.embedding + self.head + self.matrices + small

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return self.total - self.inactive


def format_parameters(count: int) -> str:
    """`121_930_000` -> `"121.9M"`: three or four significant digits, decimal multiples."""
    for factor, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= factor:
            value = count / factor
            return f"{value:.2f}{suffix}" if value < 10 else f"{value:.1f}{suffix}"
    return str(count)
