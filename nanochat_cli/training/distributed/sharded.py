"""Mode `fsdp`: mode `owned`, but a rank has only some rows of each matrix's codes and gradients.

    unit of each rank → [block by block: codes of all rows gathered; gradients of a rank's rows added] → rows to the
    owner, which steps the whole matrix → codes of rows to the ranks that keep them

Ranks compute neighbouring units at the same time, one each, so that what they add in a block is a node of the tree
over the units: the bits are those of mode `owned`. A power of two of ranks has such nodes. What has no ternary rows of
equal number (embedding, head, norms) is as in mode `owned`, but its gradients travel after every unit.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanochat_cli.config.sections.train import TrainConfig
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.distributed.group import Group
from nanochat_cli.training.distributed.owned import Gradients, Owned, add_all
from nanochat_cli.training.distributed.row_shards import Shard, added, shard_blocks
from nanochat_cli.training.distributed.tree import Node, TreeSum
from nanochat_cli.training.distributed.weight_bytes import row_bytes, to_rows
from nanochat_kernels import ternarize


class Sharded(Owned):
    """What a rank owns, and which rows it keeps. model: whose blocks are cut, from the first `publish` on."""

    lockstep = True

    def __init__(
        self,
        group: Group,
        parameters: Mapping[str, nn.Parameter],
        linears: Mapping[str, BitLinear],
        train: TrainConfig,
        model: Transformer,
    ) -> None:
        super().__init__(group, parameters, linears, train)
        self.units = range(group.rank, self._n_units, group.size)
        self._model = model
        self.cut = [[name for name in names if self.is_cut(name)] for names in self.names]
        """Of the matrices of each owner those that are cut."""
        self.shards: dict[str, Shard] = {}
        """What this rank keeps of each matrix that is cut, in the order of the model."""
        self._row_sums: TreeSum[Gradients] = TreeSum(self._n_units, add_all)
        self._level = group.size.bit_length() - 1
        """In the tree, of the sum over the units that ranks compute at one time."""

    def is_cut(self, name: str) -> bool:
        """Matrices of the model's blocks whose rows can be shared out evenly."""
        layer = self.layers.get(name)
        return layer is not None and name.startswith("blocks.") and layer.out_features % self.group.size == 0

    # -- gradients ---------------------------------------------------------------------------------------------

    def begin(self, counters: Sequence[Tensor]) -> None:
        super().begin(counters)
        self._row_sums = TreeSum(self._n_units, add_all)

    def collect(self, unit: int, metrics: Mapping[str, Tensor]) -> None:
        """Send gradients of what is whole to the owners, and keep those of rows, which FSDP has added."""
        node = Node(self._level, unit // self.group.size)
        self._row_sums.put(node, [_taken_rows(shard.layer) for shard in self.shards.values()])
        width = self._numbers(self.whole[self.group.rank])
        received = self.group.exchange(self._for_owners([self._taken()]), [width] * self.group.size)
        self._sums.put(node, [added(received).clone()])  # a copy: the sum is a part of all that came
        self._metrics[unit] = metrics

    def _to_owners(self) -> dict[str, Tensor]:
        rank, size = self.group.rank, self.group.size
        (total,), rows = self._sums.total, dict(zip(self.shards, self._row_sums.total, strict=True))
        self._row_sums = TreeSum(self._n_units, add_all)
        nothing = torch.zeros(0, device=self.group.device)
        parts = [torch.cat([rows[name].view(-1) for name in names] or [nothing]) for names in self.cut]
        del rows
        counts = [self.parameters[name].numel() // size for name in self.cut[rank]]
        received = [part.split(counts) for part in self.group.exchange(parts, [sum(counts)] * size)]
        whole = {
            name: torch.cat([of[place] for of in received]).view_as(self.parameters[name])
            for place, name in enumerate(self.cut[rank])
        }
        return whole | self._by_name(total, self.whole[rank])

    # -- weights -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def publish(self) -> None:
        """After a step: quantise what this rank owns, and give all ranks their rows, and the whole of the rest."""
        kept = self._kept_rows()
        if self.shards:
            for name, rows in kept.items():
                self.shards[name].rows = rows
        else:
            self.shards = {name: Shard(self.layers[name], rows) for name, rows in kept.items()}
            shard_blocks(self._model, self.shards.values(), self.group)
        super().publish()

    def _kept_rows(self) -> dict[str, Tensor]:
        """The rows of this rank, from the owners, in the order of the model: uint8 [N / ranks, bytes of a row]."""
        size, names = self.group.size, self.cut[self.group.rank]
        nothing = torch.zeros(0, dtype=torch.uint8, device=self.group.device)
        sent: list[list[Tensor]] = [[nothing] for _ in range(size)]
        for name in names:
            layer = self.layers[name]
            rows = to_rows(ternarize(self.parameters[name], layer.quant.scale), layer)
            for part, of_rank in zip(rows.chunk(size), sent, strict=True):
                of_rank.append(part.reshape(-1))
        shapes = [[self._rows_shape(name) for name in of_owner] for of_owner in self.cut]
        counts = [[n * width for n, width in of_owner] for of_owner in shapes]
        received = self.group.exchange([torch.cat(parts) for parts in sent], [sum(of_owner) for of_owner in counts])
        kept = {
            name: part.view(shape)
            for of_owner, data in zip(zip(self.cut, counts, shapes, strict=True), received, strict=True)
            for name, part, shape in zip(of_owner[0], data.split(of_owner[1]), of_owner[2], strict=True)
        }
        return {name: kept[name] for name in self.layers if name in kept}

    def _rows_shape(self, name: str) -> tuple[int, int]:
        layer = self.layers[name]
        return layer.out_features // self.group.size, row_bytes(layer)


def _taken_rows(layer: BitLinear) -> Tensor:
    """The gradient of this rank's rows, float32 [N / ranks, K], which the layer forgets."""
    gradient, layer.weight.grad = layer.weight.grad, None
    assert isinstance(gradient, DTensor)
    return gradient.to_local()
