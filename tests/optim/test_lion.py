"""Lion against Algorithm 2 of arXiv:2302.06675, written out with scalars."""

import torch

from nanochat_cli.optim.lion import Lion


def test_three_steps_equal_the_written_out_algorithm():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(7, generator=generator))
    weights, momentum = parameter.tolist(), [0.0] * 7
    lion = Lion([("w", parameter)], betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(3):
        gradient = torch.randn(7, generator=generator)
        parameter.grad = gradient.clone()
        lion.step(0.01)
        for i, g in enumerate(gradient.tolist()):
            c = 0.9 * momentum[i] + 0.1 * g
            weights[i] -= 0.01 * ((c > 0) - (c < 0) + 0.1 * weights[i])
            momentum[i] = 0.99 * momentum[i] + 0.01 * g
    torch.testing.assert_close(parameter.detach(), torch.tensor(weights), rtol=1e-6, atol=1e-6)
