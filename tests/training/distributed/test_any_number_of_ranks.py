"""Both modes compute the same bits on any number of ranks: real processes over gloo, and what they have saved."""

from pathlib import Path

import pytest
from gguf import GGUFReader

from tests.training.distributed.ranks import contents, ended, latest, line, measured, resumed, start, start_two

GALORE = "optim.galore.enabled=true optim.galore.rank=16 optim.galore.update_freq=2"
COLLIDER = "collider.enabled=true collider.sparsity=0.4 collider.warmup_steps=1"
CASES = {
    "muon": "",
    "muon-int8": "optim.muon_format=int8",
    "muon-8bit": "optim.eight_bit=true",
    "normuon": "optim.muon_variance_beta=0.9 optim.weight_decay=0.1 optim.cautious_weight_decay=true",
    "galore": GALORE,
    "galore-8bit": f"{GALORE} optim.eight_bit=true",
    "adamw": "optim.matrix=adamw optim.lr=0.002 optim.weight_decay=0.1",
    "lion": "optim.other=lion",
    "float": "model.quant.enabled=false",
    "groups": "model.quant.scale=64 model.tie_embeddings=true",
    "int8": "train.forward=int8 train.backward=int8",
    "bf16": "train.dtype=bf16",
    "mtp": "mtp.enabled=true mtp.n_tokens=2",
    "mtp-fades": "mtp.enabled=true mtp.kind=nextn mtp.fade=0.4",
    "collider": COLLIDER,
    "fire": "fire.enabled=true fire.steps=[2] fire.rewarm_steps=2",
    "moe": "model.moe.enabled=true model.moe.experts=4 model.moe.balance=bias model.moe.shared=true",
    "moe-loss": "model.moe.enabled=true model.moe.experts=4 model.moe.capacity_factor=1.25 train.log_interval=2",
    "hybrid-mhc": "model.deltanet.pattern=DA model.mhc.streams=2",
    "loader": "loader.enabled=true loader.workers=1 loader.prefetch=2",
    "bigram-start": "bigram_init.steps=5",
    "pieces": "model.vocab_size=16384 optim.eight_bit=true optim.eight_bit_other=true",
}
FSDP = "distributed.mode=fsdp"
OF_FSDP = {name: f"{FSDP} {settings}" for name, settings in CASES.items() if name not in ("float", "fire")} | {
    "tensor": f"{FSDP} model.quant.scale=tensor",
    "checkpointing": f"{FSDP} train.gradient_checkpointing=true",
    "int8-forward": f"{FSDP} train.forward=int8",
}


def compare(folder: Path, names: list[str], counts: tuple[int, ...]) -> None:
    """The runs `NAME-RANKS` of each name are equal in all that they saved and logged."""
    for name in names:
        first = folder / "runs" / f"{name}-{counts[0]}"
        for count in counts[1:]:
            other = folder / "runs" / f"{name}-{count}"
            assert contents(other) == contents(first), f"{name} on {count} ranks"
            assert measured(other) == measured(first), f"{name} on {count} ranks"


def compare_with_one(folder: Path, cases: dict[str, str], count: int) -> None:
    """Train every case on one rank and on `count`, at the same time, and compare."""
    processes = [
        start(folder, ranks, [line(f"{name}-{ranks}", settings) for name, settings in cases.items()])
        for ranks in (1, count)
    ]
    for process in processes:
        ended(process)
    compare(folder, list(cases), (1, count))


def test_two_ranks_save_and_log_what_one_does(folder):
    settings = f"{CASES['mtp']} {CASES['fire']} {CASES['muon-int8']}"
    short = "train.total_steps=2 telemetry.interval=1"
    by_rows = line("b-2", f"{FSDP} {short}"), ["alone", *line("b-1", short)]
    assert ended(start_two(folder, [line("a-2", settings), ["alone", *line("a-1", settings)], *by_rows])) == ""
    compare(folder, ["a"], (1, 2))
    compare(folder, ["b"], (1, 2))
    written = sorted(file.name for file in latest(folder / "runs" / "a-2").glob("model*"))
    assert written == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert (latest(folder / "runs" / "a-1") / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_optimizer_and_method_gives_the_same_bits(folder, count):
    compare_with_one(folder, CASES, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_mode_fsdp_gives_the_bits_of_one_process(folder, count):
    compare_with_one(folder, OF_FSDP, count)


@pytest.mark.slow
def test_modes_and_numbers_of_ranks_may_change_at_a_resume(folder):
    ended(start(folder, 1, [line("run-1", "train.total_steps=6")]))
    ended(start(folder, 4, [line("run-4", f"{FSDP} train.total_steps=6 checkpoint.keep_last=9")]))
    run, parts = folder / "runs" / "run-4", ("model", "optimizer", "random", "telemetry")
    whole = contents(folder / "runs" / "run-1")
    for step, ranks, mode in ((2, 2, "owned"), (4, 2, "fsdp"), (4, 1, "owned")):
        (run / "checkpoints" / "latest").write_text(f"step-{step:06d}\n")
        ended(start(folder, ranks, [resumed("run-4", f"distributed.mode={mode}")]))
        found = contents(run)
        assert [found[part] for part in parts] == [whole[part] for part in parts], f"{mode} on {ranks} ranks"


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(folder):
    ended(start(folder, 1, [line("run-1", "train.total_steps=6")]))
    ended(start(folder, 4, [line("run-4", "train.total_steps=6 checkpoint.keep_last=9")]))
    run = folder / "runs" / "run-4"
    for step, ranks in ((2, 2), (4, 3)):
        (run / "checkpoints" / "latest").write_text(f"step-{step:06d}\n")
        ended(start(folder, ranks, [resumed("run-4", "train.grad_accum=4")]))
    compare(folder, ["run"], (1, 4))


@pytest.mark.slow
def test_export_reads_what_ranks_wrote_as_what_one_process_wrote(folder):
    files = [str(folder / f"{ranks}.gguf") for ranks in (1, 3)]
    settings = "model.tie_embeddings=true model.dim=256 model.ffn_dim=256"
    ended(start(folder, 3, [line("run-3", settings)]))
    exports = [["export", f"runs/run-{ranks}", "--gguf", "--out", f"{ranks}.gguf", "--quiet"] for ranks in (1, 3)]
    ended(start(folder, 1, [line("run-1", settings), *exports]))
    tensors = [{t.name: t.data.tobytes() for t in GGUFReader(file).tensors} for file in files]
    assert tensors[0] == tensors[1]
