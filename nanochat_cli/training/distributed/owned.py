"""Mode `owned`: every parameter has one owner, which alone keeps its latent and its optimizer state and steps it.

    units of a rank → gradients to their owners → the owner adds, clips, steps, quantises → weights to all

Gradients are added by one tree over the units of a step (`tree`), the norm from one float64 sum per parameter in the
order of the names, losses by the same tree: the bits do not depend on the number of ranks. Ternary weights travel as
codes and scales; a latent that is not owned is NaN, so that nothing can use it unnoticed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_cli.config.sections.train import TrainConfig
from nanochat_cli.model.bitlinear import BitLinear, requantize
from nanochat_cli.training.distributed.group import Group
from nanochat_cli.training.distributed.ownership import owners
from nanochat_cli.training.distributed.pieces import Pieces
from nanochat_cli.training.distributed.ranks import units_of
from nanochat_cli.training.distributed.tree import Node, TreeSum, nodes_of
from nanochat_cli.training.distributed.weight_bytes import byte_count, from_bytes, to_bytes
from nanochat_kernels import ternarize

Gradients = list[Tensor]
OF_OWNERS = ("telemetry",)
"""Parts of a checkpoint of which a rank has what belongs to its own parameters, beside the optimizer's."""


class Owned:
    """What a rank computes and owns. parameters: all that are trained, by name; linears: of which these are latents.

    units: those of this rank, numbers of micro-batches of a step. rows: of the batch of a step.
    """

    lockstep = False
    """Ranks meet within every block: none may evaluate alone, and none starts a step again."""

    def __init__(
        self,
        group: Group,
        parameters: Mapping[str, nn.Parameter],
        linears: Mapping[str, BitLinear],
        train: TrainConfig,
    ) -> None:
        self.group, self._batch_size = group, train.batch_size
        self._n_units, self.rows = train.grad_accum, train.grad_accum * train.batch_size
        self.units: Sequence[int] = units_of(group.rank, group.size, self._n_units)
        self._pieces = Pieces(parameters)
        self.parameters = self._pieces.parameters
        self.layers = {f"{name}.weight": layer for name, layer in linears.items() if layer.quant.enabled}
        self.owner = owners({name: tuple(p.shape) for name, p in self.parameters.items()}, group.size)
        self._writer = self.owner | self._pieces.writers(self.owner)
        self.names = [[n for n in self.parameters if self.owner[n] == rank] for rank in range(group.size)]
        """Of the parameters of each rank, in the order of the model."""
        self.uncut = [name for name in self.parameters if not self.is_cut(name)]
        """Those of which every rank computes the whole gradient, and holds the whole value or all codes."""
        whole = frozenset(self.uncut)
        self.whole = [[name for name in names if name in whole] for names in self.names]
        self.weight_bytes = [sum(self._byte_count(name) for name in names) for names in self.whole]
        """What each rank sends to every other after a step."""
        self.stop_here: Callable[[], bool] = lambda: False
        self.stop = False
        """Whether, at the last step, some rank had been told to stop."""
        self._has_others = True
        """Latents that are not owned are here too."""
        self._squares = torch.zeros(0)
        self._sums: TreeSum[Gradients] = TreeSum(self._n_units, add_all)
        self._metrics: dict[int, Mapping[str, Tensor]] = {}

    @property
    def mine(self) -> Sequence[str]:
        """Names of the parameters that this rank owns."""
        return self.names[self.group.rank]

    @property
    def stepped(self) -> dict[str, nn.Parameter]:
        """The parameters that this rank owns."""
        return {name: self.parameters[name] for name in self.mine}

    def is_cut(self, name: str) -> bool:
        """Whether a rank has some rows of it only."""
        return False

    # -- gradients ---------------------------------------------------------------------------------------------

    def begin(self, counters: Sequence[Tensor]) -> None:
        """Before the first unit. counters: what the units add to, equal on all ranks."""
        self._sums, self._metrics = TreeSum(self._n_units, add_all), {}
        if not self.group.is_first:
            for counter in counters:
                counter.zero_()

    def rows_of(self, unit: int) -> slice:
        """Of the rows that this rank reads."""
        start = self.units.index(unit) * self._batch_size
        return slice(start, start + self._batch_size)

    def collect(self, unit: int, metrics: Mapping[str, Tensor]) -> None:
        """Take the gradients of a unit, and what it adds to each metric, 0-dim."""
        self._sums.put(Node(0, unit), self._taken())
        self._metrics[unit] = metrics

    def _taken(self) -> Gradients:
        """The whole gradients of a unit, which their parameters forget."""
        self._pieces.take_gradients()
        gradients = []
        for parameter in map(self.parameters.__getitem__, self.uncut):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                gradient = torch.zeros(parameter.shape, device=self.group.device)
            gradients.append(gradient.contiguous())  # as those are that have travelled
        return gradients

    @torch.no_grad()
    def finish(self, counters: Sequence[Tensor]) -> dict[str, Tensor]:
        """After the last unit: the gradients of the step in the owners' `.grad`; the metrics of the step, on all ranks.

        Two collectives: gradients to their owners, and all that is a few numbers.
        """
        for name, gradient in self._to_owners().items():
            self.parameters[name].grad = gradient
        names = list(self._metrics[self.units[0]])
        units = torch.zeros(self._n_units, len(names), dtype=torch.float64, device=self.group.device)
        for unit, metrics in self._metrics.items():
            units[unit] = torch.stack([metrics[name].double() for name in names])
        squares = units.new_zeros(len(self.parameters))
        for place, name in enumerate(sorted(self.parameters)):
            if (gradient := self.parameters[name].grad) is not None:
                squares[place] = gradient.double().square().sum()
        parts = [units, squares, *(counter.double() for counter in counters), units.new_tensor([self.stop_here()])]
        whole = self.group.add(torch.cat([part.view(-1) for part in parts]))
        units, self._squares, *counted, stop = (
            values.view(part.shape) for part, values in zip(parts, whole.split([p.numel() for p in parts]), strict=True)
        )
        for counter, value in zip(counters, counted, strict=True):
            counter.copy_(value)
        self.stop = bool(stop)
        sums: TreeSum[Tensor] = TreeSum(self._n_units, torch.add)
        for unit, values in enumerate(units.float()):
            sums.put(Node(0, unit), values)
        self._metrics = {}
        return dict(zip(names, sums.total, strict=True))

    def _to_owners(self) -> dict[str, Tensor]:
        """The whole gradients of this rank's parameters; forgets those of the units."""
        local, size = self._sums.nodes, self.group.size
        self._sums = TreeSum(self._n_units, add_all)
        if size == 1:
            ((_, gradients),) = local
            return dict(zip(self.parameters, gradients, strict=True))
        parts = self._for_owners([gradients for _, gradients in local])
        del local
        width = self._numbers(self.whole[self.group.rank])
        nodes = [nodes_of(units_of(rank, size, self._n_units), self._n_units) for rank in range(size)]
        received = self.group.exchange(parts, [width * len(of_rank) for of_rank in nodes])
        whole: TreeSum[Gradients] = TreeSum(self._n_units, add_all)
        for of_rank, values in zip(nodes, received, strict=True):
            for node, value in zip(of_rank, values.view(len(of_rank), width), strict=True):
                whole.put(node, [value])
        (total,) = whole.total
        return self._by_name(total, self.whole[self.group.rank])

    def _for_owners(self, sums: Sequence[Gradients]) -> list[Tensor]:
        """What is sent to each rank: of each sum the gradients of its parameters, flat."""
        place, nothing = {name: i for i, name in enumerate(self.uncut)}, torch.zeros(0, device=self.group.device)
        return [
            torch.cat([one[place[name]].reshape(-1) for one in sums for name in names] or [nothing])
            for names in self.whole
        ]

    def _numbers(self, names: Sequence[str]) -> int:
        return sum(self.parameters[name].numel() for name in names)

    def _by_name(self, flat: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        shapes = [self.parameters[name].shape for name in names]
        parts = flat.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """As `Optimizers.clip_grad_norm`: the norm before it, float64, 0-dim."""
        norm = self._squares.sum().sqrt()
        if max_norm > 0:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
            for name in self.mine:
                gradient = self.parameters[name].grad
                assert gradient is not None
                gradient.mul_(factor)
        return norm

    # -- weights -----------------------------------------------------------------------------------------------

    def _byte_count(self, name: str) -> int:
        return byte_count(self.parameters[name], self.layers.get(name))

    @torch.no_grad()
    def publish(self) -> None:
        """After a step: quantise what this rank owns, and give all ranks the weights of all owners."""
        if self.group.size == 1:
            requantize(self.layers.values())
            return
        sent = []
        for name in self.whole[self.group.rank]:
            ternary = None
            if (layer := self.layers.get(name)) is not None:
                layer.hold(ternary := layer.ternary())
            sent.append(to_bytes(self.parameters[name], ternary))
        buffers = [torch.empty(n, dtype=torch.uint8, device=self.group.device) for n in self.weight_bytes]
        if sent:
            torch.cat(sent, out=buffers[self.group.rank])
        self.group.gather(buffers)
        for rank, (names, buffer) in enumerate(zip(self.whole, buffers, strict=True)):
            if rank != self.group.rank:
                for name, data in zip(names, buffer.split([self._byte_count(n) for n in names]), strict=True):
                    self._receive(name, data)
        self.forget()

    def _receive(self, name: str, data: Tensor) -> None:
        if (layer := self.layers.get(name)) is not None:
            layer.follow(from_bytes(data, layer))
        else:
            parameter = self.parameters[name]
            parameter.copy_(data.clone().view(torch.float32).view(parameter.shape))

    @torch.no_grad()
    def forget(self) -> None:
        """Latents that are not owned need no memory. They are NaN."""
        for name in self.layers if self._has_others else ():
            if self.owner[name] != self.group.rank:
                parameter = self.parameters[name]
                parameter.data = torch.full((), torch.nan, device=parameter.device).expand(parameter.shape)
        self._has_others = False

    @torch.no_grad()
    def fetch_latents(self) -> None:
        """Give all ranks the latents of all owners, until `forget`."""
        self._has_others = True
        for name in sorted(self.layers):
            parameter, source = self.parameters[name], self.owner[name]
            if source != self.group.rank:
                parameter.data = torch.empty(parameter.shape, device=parameter.device)
            self.group.send(parameter.data, source)

    def own_layers(self, named: Mapping[str, BitLinear]) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Of ternary layers those whose latents are here: name, codes int8 [N, K], latent [N, K], scales."""
        for name, layer in named.items():
            if self.owner[f"{name}.weight"] == self.group.rank:
                latent = self.parameters[f"{name}.weight"].detach()
                ternary = ternarize(latent, layer.quant.scale)
                yield name, ternary.codes, latent, ternary.scales

    # -- checkpoints -------------------------------------------------------------------------------------------

    def share_of(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Of the tensors of a checkpoint those that this rank writes: what it owns, on rank 0 also what nobody owns.

        tensors: as `TrainState.tensors` of one process; the optimizer has the state of this rank's parameters only.
        """
        share: dict[str, Any] = {}
        for part, tree in tensors.items():
            if part == "optimizer":
                share[part] = self._pieces.joined(tree, self.owner, self.group)
            elif part in OF_OWNERS:
                share[part] = tree
            elif isinstance(tree, Mapping):
                prefix = "" if part == "model" else f"{part}."
                share[part] = {
                    key: self.parameters[name].detach() if (name := f"{prefix}{key}") in self.parameters else value
                    for key, value in tree.items()
                    if self._writer.get(f"{prefix}{key}", 0) == self.group.rank
                }
            elif self.group.is_first:
                share[part] = tree
        return share

    def own_state(self, states: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer's part of a checkpoint, by the names of the parameters here."""
        return self._pieces.divided(states)


def add_all(left: Gradients, right: Gradients) -> Gradients:
    """The sums, in place of the first."""
    for one, other in zip(left, right, strict=True):
        one.add_(other)
    return left
