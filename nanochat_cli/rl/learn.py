"""`nanochat grpo` from configuration to finished run: chooses the folder, the problems and the judge.

Problems are read before torch is imported, so that a bad file fails at once.
"""

from pathlib import Path

from nanochat_cli.config.paths import anchor
from nanochat_cli.config.schema import Config
from nanochat_cli.formats.run.create import TRAINS, create_run, run_folder, write_config
from nanochat_cli.report.reporter import Reporter


def learn_from_rewards(config: Config, resume: Path | None, reporter: Reporter, stem: str = "grpo") -> None:
    """Learn from rewards: from `grpo.source` into the new run `run.dir/run.name`, or continue `resume`.

    stem: the first part of the name of a run without one. A run that was stopped before its first checkpoint starts
    from the beginning.
    """
    from nanochat_cli.rl.problem_split import load_split

    problems = load_split(config.grpo, reporter)

    from nanochat_cli.formats.run.checkpoints import is_empty
    from nanochat_cli.formats.run.dataset import read_record
    from nanochat_cli.rl.judging import open_judge
    from nanochat_cli.rl.run_grpo import GRPORun, Start

    anchor(config, source=False)
    source = config.grpo.source
    assert source is not None, "the caller names the source"
    with (
        run_folder(config, resume, TRAINS, stem) as run_dir,
        open_judge(config.grpo, problems.languages, reporter) as judge,
    ):
        if resume is not None and not is_empty(run_dir):
            run = GRPORun(config, run_dir, problems, judge, reporter, Start.of_run(run_dir, config))
            write_config(config, run_dir)
        else:
            record = read_record(source)
            run = GRPORun(config, run_dir, problems, judge, reporter, Start.of_source(source, config))
            create_run(run_dir, config, run.tokenizer, record)
        run.run()
    if run.learned:
        reporter.info(f"next: nanochat eval {run_dir}   or: nanochat export {run_dir} --gguf")
