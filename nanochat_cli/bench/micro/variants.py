"""The architectures that are compared with each other: names, and the overrides that turn a preset into each.

Every variant has the width, depth and tokens per step of the plain model. The mixture of experts has as many active
parameters, and more in total.
"""

VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "mhc-2": ["model.mhc.streams=2"],
    "mhc-4": ["model.mhc.streams=4"],
    "hybrid": ["model.deltanet.ratio=0.5"],
    "moe": ["model.moe.enabled=true", "model.moe.experts=6", "model.moe.active=3", "model.ffn_dim=256"],
    "mtp-heads": ["mtp.enabled=true", "mtp.kind=heads", "mtp.n_tokens=3"],
    "mtp-nextn": ["mtp.enabled=true", "mtp.kind=nextn"],
}
"""For the preset quickstart, whose feed-forward is 768 wide: three active experts of 256."""
