"""The announcement before the first step describes the run and its length."""

from nanochat_cli.report.reporter import PlainReporter
from nanochat_cli.training.announcement import announcement
from nanochat_cli.training.progress import Progress
from nanochat_cli.training.trainer import Trainer
from tests.training.synthetic import SyntheticData, tiny_config


def lines(config, progress=None, peak=1e9):
    progress = progress or Progress(config.train.total_steps)
    return announcement(config, progress, "cpu, fp32, 2 threads", flops_per_token=1e6, peak_flops=peak)


def test_a_run_of_steps_has_its_tokens_and_an_expected_time(tmp_path):
    model, training = lines(tiny_config(tmp_path, train={"total_steps": 1000}))
    assert model.endswith("2 layers of width 64, 2 heads (1 of keys), 64 tokens, ternary; on cpu, fp32, 2 threads")
    # 1,000 steps of 2 × 4 × 16 tokens, 1e6 FLOPs each, at 0.4e9 FLOP/s: 320 s.
    assert training.startswith("training: 1,000 steps of 128 tokens, 128.0K tokens, expected to take about 5 min")


def test_a_time_budget_is_the_expected_time(tmp_path):
    config = tiny_config(tmp_path, train={"total_steps": 20_000, "time_budget": 300})
    fresh = Progress(20_000, total_is_final=False)
    assert "up to 20,000 steps of 128 tokens, 2.56M tokens, or what fits 5 min of training" in lines(config, fresh)[1]
    resumed = Progress(20_000, step=100, seconds=180.0, total_is_final=False)
    assert "or what fits 2 min of training (train.time_budget)" in lines(config, resumed)[1]


def test_it_is_printed_before_the_first_step(tmp_path, capsys):
    (tmp_path / "tiny").mkdir()
    Trainer(tiny_config(tmp_path), SyntheticData(8, 16), tmp_path / "tiny", PlainReporter())
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["eager", "model", "training"]
