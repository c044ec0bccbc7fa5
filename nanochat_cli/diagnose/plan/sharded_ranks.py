"""What mode `fsdp` asks of W ranks, which compute a unit each in every one of A turns, as `plan.ranks` of `owned`.

Of C numbers in matrices that are cut into rows, rank r owns C_r. It keeps D / W of the D bytes of all rows, and owns
what D_r are made of. Of the other R numbers it owns R_r, which take B_r of B bytes on the wire. In a step

    codes       r receives D · (1 − 1 / W) for the forward passes of a turn, and again for the backward passes
    gradients   r sends 4 · C · (1 − 1 / W) + 4 · (R − R_r) bytes in a turn, and 4 · (C − C_r) / W after the last;
                it receives 4 · C · (1 − 1 / W) + 4 · R_r · (W − 1) in a turn, and 4 · C_r · (1 − 1 / W) after the last
    weights     r receives (D − D_r) / W of rows and B − B_r of the rest

and likewise the ranks of a machine together.
"""

from collections.abc import Iterable

from nanochat_cli.config.schema import Config
from nanochat_cli.diagnose.plan.memory import Memory
from nanochat_cli.diagnose.plan.ranks import Exchange, OwnedPlan, RankMemory
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.training.distributed.sharded import Sharded
from nanochat_cli.training.distributed.tree import Node, TreeSum
from nanochat_cli.training.distributed.weight_bytes import row_bytes


class ShardedPlan(OwnedPlan):
    """By owner: numbers in matrices that are cut, bytes of their rows, and the other numbers."""

    def __init__(self, config: Config, ranks: int) -> None:
        super().__init__(config, ranks)
        assert isinstance(self._owned, Sharded)
        self._sharded = self._owned
        self.turns = config.train.grad_accum // ranks
        of_owners = [self._layers(names) for names in self._sharded.cut]
        self.cut = [_numbers(layers) for layers in of_owners]
        self.rows = [_bytes(layers) for layers in of_owners]
        self.rest = [numbers - cut for numbers, cut in zip(self.numbers, self.cut, strict=True)]

    def memory_of(self, rank: int, whole: Memory) -> RankMemory:
        owned, layers, kept = super().memory_of(rank, whole), self._sharded.layers, sum(self.cut) // self.ranks
        cut = [name for name in layers if self._sharded.is_cut(name)]
        blocks = [self._layers(n for n in cut if n.split(".")[1] == str(i)) for i in range(len(self._model.blocks))]
        largest = max(blocks, key=_numbers)
        held_whole = _numbers(largest) + _numbers(layers[name] for name in layers if name not in cut)
        rest, received = sum(self.rest), self.rest[rank] * self.ranks
        return RankMemory(
            latents=owned.latents,
            # a block is unpacked while what it was gathered in, what came, and what comes for the next are there
            quantised=sum(self.rows) // self.ranks
            + 3 * _bytes(largest)
            + whole.quantised * held_whole // _numbers(layers.values()),
            optimizer=owned.optimizer,
            earlier_gradients=4 * self._most_sums(rank) * (kept + self.rest[rank]),
            # those of a block and of the one after it, which are being sent
            gradients=4 * (kept + rest + 2 * _numbers(largest)),
            activations=whole.activations,
            logits=whole.logits,
            exchange=4 * (kept + 2 * max(rest + received // 2, kept + self.numbers[rank])),
            step=owned.step,
        )

    def _most_sums(self, rank: int) -> int:
        tree: TreeSum[None] = TreeSum(self.config.train.grad_accum, lambda left, right: None)
        level, held = self.ranks.bit_length() - 1, []
        for turn in range(self.turns):
            held.append(len(tree.nodes))
            tree.put(Node(level, turn), None)
        return max(held)

    def exchange(self, here: range, around: range) -> Exchange:
        own, share = slice(here.start, here.stop), len(here) / self.ranks
        cut, rest, rows = (sum(of[own]) for of in (self.cut, self.rest, self.rows))
        others = slice(around.start, around.stop)
        to_rows = (len(around) - len(here)) / self.ranks * sum(self.cut) * len(here) * self.turns
        sent = (
            to_rows + self.turns * len(here) * (sum(self.rest[others]) - rest) + share * (sum(self.cut[others]) - cut)
        )
        received = to_rows + (len(around) - len(here)) * (self.turns * rest + cut / self.ranks)
        gathered = 2 * self.turns * (1 - share) * sum(self.rows)
        weights = gathered + share * (sum(self.rows[others]) - rows) + sum(self.weights) - sum(self.weights[own])
        return Exchange(round(4 * sent), round(4 * received), round(weights))

    def _layers(self, names: Iterable[str]) -> list[BitLinear]:
        return [self._sharded.layers[name] for name in names]


def _numbers(layers: Iterable[BitLinear]) -> int:
    return sum(layer.weight.numel() for layer in layers)


def _bytes(layers: Iterable[BitLinear]) -> int:
    return sum(layer.out_features * row_bytes(layer) for layer in layers)
