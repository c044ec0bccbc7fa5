"""Do two checkouts compute the same bits on this machine? `python tests/golden.py A B [--only WORD]`

A and B are checkouts, or files that `python tests/golden.py A --out FILE` wrote. Prints every hash that differs, and
ends with 1 when one does. A single checkout: prints its hashes as JSON. Hashed are: logits and gradients of every
architecture, packed logits with and without fused norms, token by token too; losses, metrics, weights and state of 20
training steps for each method and optimizer, also resumed in the middle; GRPO; GGUF files; tokenizers and shards.

Not collected by pytest: hashes of floats hold on one machine only, so they are compared and never committed. Uses what
stays when code moves: the command line, files on disk, and the few names in `NAMES`.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

NAMES = {
    "ExportConfig": ("nanochat_cli.config.sections.export", "nanochat_cli.config.schema"),
    "KVCache": ("nanochat_cli.model.cache", "nanochat_cli.inference.kv_cache"),
    "PackedTransformer": ("nanochat_cli.inference.packed_model",),
    "SamplingConfig": ("nanochat_cli.inference.sampling",),
    "Tokenizer": ("nanochat_cli.data.tokenizer",),
    "build": ("tests.architectures",),
    "export_gguf": ("nanochat_cli.formats.gguf.write", "nanochat_cli.export.gguf"),
    "generate_tokens": ("nanochat_cli.inference.generate",),
    "load_gguf": ("nanochat_cli.formats.gguf.read", "nanochat_cli.inference.load_gguf"),
    "main": ("nanochat_cli.cli.app",),
}
"""What is used of a checkout, and the modules where it may be, the newest first."""

VOCAB = 300
STEPS, MIDDLE = 20, 10
BASE = f"""
model.vocab_size={VOCAB} model.dim=128 model.n_layers=2 model.n_heads=2 model.n_kv_heads=1 model.ffn_dim=128
model.max_seq_len=64 train.time_budget=none train.total_steps={STEPS} train.batch_size=4 train.seq_len=32
train.compile=off train.log_interval=1 optim.warmup_steps=4 bigram_init.steps=0 eval.interval=10 eval.max_tokens=512
checkpoint.interval={MIDDLE} checkpoint.keep_best=false telemetry.interval=5 telemetry.tensorboard=false
train.backward=exact train.attention=torch optim.muon_format=fp32
"""
GALORE = "optim.galore.enabled=true optim.galore.rank=16 optim.galore.update_freq=6"
COLLIDER = "collider.enabled=true collider.sparsity=0.4 collider.warmup_steps=3"
TRAINING: dict[str, str] = {
    "plain": "",
    "llama": "model.qk_norm=false",
    "bitnet": "model.qk_norm=false model.sub_norm=true model.tie_embeddings=true model.quant.scale=tensor",
    "gated": "model.attention_gate=true",
    "float": "model.quant.enabled=false",
    "float-activations": "model.quant.activations=false",
    "groups": "model.quant.scale=64",
    "int8": "train.forward=int8",
    "products-in-float": "train.forward=float",
    "bf16": "train.dtype=bf16",
    "bigram-start": "bigram_init.steps=5",
    "grad-accum": "train.grad_accum=2 train.batch_size=2",
    "recomputed": "train.gradient_checkpointing=true",
    "loss-terms": "train.label_smoothing=0.1 train.z_loss=0.001 train.entropy_weight=0.01",
    "mtp-heads": "mtp.enabled=true mtp.n_tokens=2",
    "mtp-shared": "mtp.enabled=true mtp.n_tokens=2 mtp.kind=shared",
    "mtp-nextn": "mtp.enabled=true mtp.kind=nextn",
    "collider": COLLIDER,
    "collider-entropy": f"{COLLIDER} collider.score=entropy",
    "collider-excess": f"{COLLIDER} collider.score=excess collider.reference=runs/plain",
    "collider-scores": f"{COLLIDER} collider.scores=scores.safetensors",
    "collider-mtp": f"{COLLIDER} mtp.enabled=true train.grad_accum=2",
    "fire": "fire.enabled=true fire.steps=[8] fire.rewarm_steps=5",
    "fire-isometry": "fire.enabled=true fire.trigger=isometry fire.interval=6 fire.isometry_deviation=0.01",
    "fire-dormant": "fire.enabled=true fire.trigger=dormant fire.interval=6 fire.dormant_threshold=0.9",
    "moe": "model.moe.enabled=true model.moe.experts=4",
    "moe-bias": "model.moe.enabled=true model.moe.experts=4 model.moe.balance=bias model.moe.shared=true",
    "moe-capacity": "model.moe.enabled=true model.moe.experts=4 model.moe.capacity_factor=1.25",
    "mhc-2": "model.mhc.streams=2",
    "mhc-4-static": "model.mhc.streams=4 model.mhc.dynamic=false model.mhc.init=high-entropy",
    "hybrid": "model.deltanet.pattern=DA",
    "hybrid-moe-mhc": "model.deltanet.pattern=DA model.moe.enabled=true model.moe.experts=4 model.mhc.streams=2",
    "loader": "loader.enabled=true loader.workers=2 loader.prefetch=3",
    "on-the-fly": "loader.enabled=true loader.workers=2 loader.on_the_fly=true",
    "muon-variants": "optim.muon_nesterov=false optim.muon_coefficients=polar-express optim.muon_equilibrate=true",
    "normuon": "optim.muon_variance_beta=0.9 optim.weight_decay=0.1 optim.cautious_weight_decay=true",
    "muon-warmup": "optim.muon_momentum_start=0.8 optim.muon_momentum_warmup=10 optim.schedule=cosine",
    "adamw": "optim.matrix=adamw optim.lr=0.002 optim.weight_decay=0.1 optim.schedule=two_stage",
    "lion": "optim.other=lion optim.lion_weight_decay=0.1 optim.decay_shape=sqrt",
    "eight-bit": "optim.eight_bit=true",
    "eight-bit-matrices": "optim.eight_bit=true optim.eight_bit_other=false optim.matrix=adamw optim.lr=0.002",
    "galore": GALORE,
    "galore-adamw": f"{GALORE} optim.matrix=adamw optim.lr=0.002",
    "galore-gum": f"{GALORE} optim.galore.unbiased=true",
    "galore-eight-bit": f"{GALORE} optim.eight_bit=true",
    "galore-released": f"{GALORE} optim.galore.release_gradients=true train.grad_clip=0",
    "everything": f"{COLLIDER} {GALORE} optim.eight_bit=true mtp.enabled=true model.mhc.streams=2 loader.enabled=true "
    "loader.workers=2 fire.enabled=true fire.steps=[12] train.grad_accum=2",
}
"""20 steps each: what is set beside BASE."""
RESUMED = {
    "plain": "",
    "mtp-nextn": "",
    "moe-bias": "",
    "fire": "",
    "everything": "",
    "galore-gum": "train.total_steps=24",
    "lion": "train.batch_size=3",
}
"""Goes on from the checkpoint in the middle, with these changes."""
COMBINATIONS = [
    f"{residual}+{mixing}+{feed_forward}+{head}"
    for residual in ("plain", "mhc-2", "mhc-4")
    for mixing in ("attention", "hybrid")
    for feed_forward in ("dense", "moe")
    for head in ("tied", "untied")
]
VARIANTS: dict[str, dict[str, object]] = {
    **{name: {} for name in COMBINATIONS},
    "plain+attention+dense+untied qk-norm": {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 50000.0},
    "plain+attention+dense+untied gate": {"attention_gate": True},
    "plain+attention+dense+tied sub-norm": {"sub_norm": True, "quant": {"scale": "tensor"}},
    "plain+attention+dense+untied scale 64": {"quant": {"scale": 64}},
    "plain+attention+dense+untied scale 256": {"quant": {"scale": 256}},
    "plain+attention+dense+untied float": {"quant": {"enabled": False}},
    "plain+attention+dense+untied float activations": {"quant": {"activations": False}},
    "plain+attention+dense+untied head 96": {"head_dim": 96, "ffn_dim": 320},
    "plain+attention+moe+untied shared": {"moe": {"enabled": True, "experts": 4, "shared": True, "balance": "bias"}},
    "mhc-4+attention+dense+tied static": {"mhc": {"streams": 4, "dynamic": False, "init": "high-entropy"}},
}
GRPO = """
grpo.max_tokens=20 grpo.eval_samples=2 grpo.batch_size=8 grpo.lr_factor=1.0 grpo.held_out=0.34 grpo.workers=2
"""
TIMED = ("seconds", "created_at", "tokens_per_second", "utilisation", "peak_flops", "throughput/", "time/")
"""Beginnings and ends of the names of what a clock decides."""
ELSEWHERE = "environment", "fingerprint"
"""Names of what says where and when: the commit, times of files."""

Found = dict[str, str]


def named(name: str) -> Any:
    """What a checkout calls `name`, wherever it is there."""
    for module in NAMES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError) as error:
            failure = error
    raise failure


# -- hashes ------------------------------------------------------------------------------------------------------------


def digest(*values: Any) -> str:
    """Of bytes, tensors (dtype, shape and bits) and plain values, in their order."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, bytes):
            found.update(value)
        elif hasattr(value, "untyped_storage"):
            tensor = value.detach().cpu().contiguous()
            found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            found.update(tensor.reshape(-1).view(importlib.import_module("torch").uint8).numpy().tobytes())
        else:
            found.update(json.dumps(value, sort_keys=True, default=str).replace(str(Path.cwd()), "@").encode())
    return found.hexdigest()[:16]


def of_tensors(file: Path) -> str:
    """Of a safetensors file, whatever the order of its tensors."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    return digest(*(part for name in sorted(tensors) for part in (name, tensors[name])))


def untimed(value: Any) -> Any:
    """Without what a clock decides, or the place."""
    if isinstance(value, Mapping):
        kept = (k for k in value if not k.startswith(TIMED) and not k.endswith(TIMED) and k not in ELSEWHERE)
        return {k: untimed(value[k]) for k in kept}
    return [untimed(one) for one in value] if isinstance(value, list) else value


def of_run(run: Path) -> Found:
    """What a run has on disk: metrics, the latest checkpoint, configuration, and what was found out at its end."""
    lines = [untimed(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [{k: v for k, v in line.items() if k == "step" or k.startswith("loss/")} for line in lines]
    metrics = [{k: v for k, v in line.items() if not k.startswith("loss/")} for line in lines]
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    document = json.loads((checkpoint / "state.json").read_text())
    state = {key: value for key, value in document["state"].items() if key != "config"}
    configuration = tomllib.loads((run / "config.toml").read_text())  # comments are words, which may change
    found = {"losses": digest(losses), "metrics": digest(metrics), "configuration": digest(configuration)}
    found |= {"state": digest(untimed(state)), "structure": digest(document["structure"])}
    found |= {file.stem: of_tensors(file) for file in checkpoint.glob("*.safetensors")}
    for name, sections in (("results", ("results", "parameters", "ternary", "samples")), ("grpo", None)):
        if (file := run / f"{name}.json").is_file():
            values = json.loads(file.read_text())
            found[name] = digest(untimed({key: values.get(key) for key in sections or values}))
    return found


# -- models ------------------------------------------------------------------------------------------------------------


def model_of(variant: str) -> Any:
    combination, _, _ = variant.partition(" ")
    return named("build")(combination, vocab_size=VOCAB, **VARIANTS[variant])


def models(variant: str) -> Found:
    """Logits of one architecture in every way that computes them, and the gradients of training."""
    import torch

    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    model = model_of(variant).train()
    logits = model.logits(model(tokens[:, :-1]))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
    found = {"training": digest(logits), "gradients": digest(*gradients)}
    model = model_of(variant)
    runs = {"model": model} | {
        f"packed {name}": named("PackedTransformer").from_model(model, backend, fused=fused)
        for name, backend, fused in (("fused", None, True), ("unfused", None, False), ("reference", "reference", True))
        if backend is None or variant in VARIANTS.keys() - set(COMBINATIONS)
    }
    sampling = named("SamplingConfig")(max_tokens=12, temperature=0.8, top_p=0.9, seed=5)
    with torch.no_grad():
        for name, run in runs.items():
            found[name] = digest(run.logits(run(tokens)))
            cache, alone = (named("KVCache")(model.config, rows, 32) for rows in (2, 1))
            found[f"{name}, incremental"] = digest(
                *(run.next_logits(part, cache) for part in tokens.split([9, 1, 1, 6, 1, 1, 5], dim=1))
            )
            parts = tokens[:1].split([6] + [1] * 18, dim=1)
            found[f"{name}, one token"] = digest(*(run.next_logits(part, alone) for part in parts))
            found[f"{name}, drawn"] = digest(list(named("generate_tokens")(run, tokens[:, :8].tolist(), sampling)))
    return found


def exports(variant: str) -> Found:
    """GGUF files of an architecture, bit for bit, and the logits of what is read back."""
    import torch

    model, tokenizer = model_of(variant), named("Tokenizer").load(Path("data/tokenizer.json"))
    tokens = torch.randint(VOCAB, (1, 16), generator=torch.Generator().manual_seed(4))
    found: Found = {}
    for kind in ("auto", "f16", "f32", "tq1_0", "q2_0", "q4_0") if variant == COMBINATIONS[0] else ("auto", "f32"):
        path = Path(f"{kind}.gguf")
        named("export_gguf")(model, tokenizer, path, named("ExportConfig")(type=kind), {"run": "golden", "step": 1})
        found[kind] = digest(path.read_bytes())
        loaded, _ = named("load_gguf")(path)
        with torch.no_grad():
            found[f"{kind}, read back"] = digest(loaded.logits(loaded(tokens)))
    return found


# -- commands ----------------------------------------------------------------------------------------------------------


def nanochat(*line: str) -> dict[str, Any]:
    """One command line in this process; what it wrote as JSON."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = named("main")([*line, "--json", "found.json"])
    if code:
        raise RuntimeError(f"nanochat {' '.join(line)}: exit code {code}: {said.getvalue()[-2000:]}")
    return json.loads(Path("found.json").read_text())


def settings(text: str) -> list[str]:
    return [word for setting in text.split() for word in ("--set", setting)]


def trained(name: str) -> Path:
    """The run of a case of TRAINING, trained when it is first needed."""
    run = Path("runs") / name
    if not run.is_dir():
        if "reference=runs/plain" in TRAINING[name]:
            trained("plain")
        if "scores=scores.safetensors" in TRAINING[name]:
            nanochat("score", str(trained("plain")), "--out", "scores.safetensors")
        presets = ["--preset", "quickstart", "--preset", "cpu"]
        nanochat("train", *presets, *settings(f"{BASE} data.path=data {TRAINING[name]}"), "--name", name)
    return run


def resumed(name: str) -> Found:
    run = Path("runs") / f"{name}-resumed"
    shutil.copytree(trained(name), run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:06d}")
    (run / "checkpoints" / "latest").write_text(f"step-{MIDDLE:06d}\n")
    nanochat("train", "--resume", str(run), *settings(RESUMED[name]))
    found = of_run(run)
    if not RESUMED[name]:
        whole = of_run(Path("runs") / name)
        parts = found.keys() - {"configuration"}
        found["as the undisturbed run"] = str([part for part in sorted(parts) if found[part] != whole[part]] or "yes")
    return found


def data(pre: str) -> Found:
    """A tokenizer and the shards of a small corpus, and the same text in other pieces."""
    folder = prepared(pre)
    tokenizer = named("Tokenizer").load(folder / "tokenizer.json")
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {file.name: digest(file.read_bytes()) for file in folder.glob("*.safetensors")}
    found |= {"tokenizer": digest((folder / "tokenizer.json").read_bytes()), "manifest": digest(untimed(manifest))}
    texts = ["def f(x):\n\treturn x['a'] + 12345\n", "naïve café 日本 👩‍💻 <|endoftext|>", "\r\n\n  \u0000"]
    return found | {"encoded": digest([tokenizer.encode(text) for text in texts])}


def prepared(pre: str) -> Path:
    folder = Path("data" if pre == "gpt-2" else f"data-{pre}")
    if not folder.is_dir():
        write_corpus(Path("corpus"))
        line = settings(f"data.val_fraction=0.1 tokenizer.pre={pre}")
        nanochat("tokenize", "--source", "corpus", "--out", str(folder), "--vocab-size", str(VOCAB), *line)
    return folder


def write_corpus(folder: Path) -> None:
    """Sources of the standard library, which are those of the one interpreter that runs both checkouts."""
    import ast
    import bisect
    import heapq
    import textwrap

    if folder.is_dir():
        return
    folder.mkdir()
    for module in (bisect, heapq, textwrap):
        functions = [n for n in ast.parse(Path(module.__file__).read_text()).body if isinstance(n, ast.FunctionDef)]
        for function in functions:
            (folder / f"{module.__name__}_{function.name}.py").write_text(ast.unparse(function) + "\n")


def exported(name: str) -> Found:
    """The GGUF file of a run, but for the words in its metadata that name the commit and the configuration."""
    import gguf

    nanochat("export", str(trained(name)), "--no-verify", "--out", "run.gguf")
    reader = gguf.GGUFReader("run.gguf")
    words = "nanochat.git", "nanochat.config"
    fields = {key: field.contents() for key, field in reader.fields.items() if key not in words}
    described = ((t.name, t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors)
    found = {"metadata": digest(fields), "tensors": digest(*(part for tensor in described for part in tensor))}
    sidecar = Path("run.mhc")
    if sidecar.is_file():
        found["sidecar"] = digest(sidecar.read_bytes())
        sidecar.unlink()
    return found


def used(name: str) -> Found:
    """What commands find out about a run: text that is drawn, held-out figures, scores of tokens."""
    run, prompt = str(trained(name)), ["-p", "def ", "--max-tokens", "24"]
    found = {"drawn": digest(nanochat("generate", run, *prompt, "--seed", "3")["text"])}
    if "mtp.enabled" in TRAINING[name]:
        drafted = nanochat("generate", run, *prompt, "--temperature", "0", "--speculate", "1")
        found["drafted"] = digest(drafted["text"], drafted["acceptance_rate"])
    found["held out"] = digest(untimed({k: v for k, v in nanochat("eval", run).items() if k != "run"}))
    nanochat("score", run, "--out", "scored.safetensors")
    return found | {"scores": of_tensors(Path("scored.safetensors"))}


# -- GRPO --------------------------------------------------------------------------------------------------------------


def practising() -> Path:
    """A run that has read right and wrong answers to the problems of `problems.jsonl`, and gives both."""
    run = Path("runs/source")
    if run.is_dir():
        return run
    numbers = range(2, 8)
    pieces = [f"def add_{n}(x):\n    return x {sign} {n}\n\n" for n in numbers for sign in "+-"]
    texts = ["".join(random.Random(seed).sample(pieces, 6)) for seed in range(60)]
    Path("answers.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    problems = [
        {
            "id": f"add-{n}",
            "language": "python",
            "level": 1,
            "prompt": f"def add_{n}(x):\n",
            "tests": [{"call": f"add_{n}({x})", "expected": str(x + n)} for x in (0, 5)],
            "stop": ["\ndef "],
        }
        for n in numbers
    ]
    Path("problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    nanochat("tokenize", "--source", "answers.jsonl", "--out", "answers", "--vocab-size", str(VOCAB))
    line = settings(f"{BASE} data.path=answers train.total_steps=120 train.batch_size=8 mtp.enabled=true")
    nanochat("train", "--preset", "quickstart", "--preset", "cpu", *line, "--name", run.name)
    return run


def grpo(mode: str) -> Found:
    """Two rounds in the sandbox, and a third after a resume."""
    run = Path("runs") / mode
    more = "grpo.kl_weight=0.05 grpo.max_divergence=1.0" if mode == "policy" else ""
    line = ["--task", "problems.jsonl", "--mode", mode, "--rounds", "2", "--group", "4", *settings(GRPO + more)]
    nanochat("grpo", str(practising()), *line, "--out", str(run))
    found = of_run(run)
    nanochat("grpo", "--resume", str(run), "--rounds", "3")
    return found | {f"{part}, round 3": value for part, value in of_run(run).items()}


def cases() -> Iterator[tuple[str, Callable[[], Found]]]:
    """Every name and what finds its hashes, in the order in which they are found."""
    yield from ((f"data/{pre}", partial(data, pre)) for pre in ("gpt-2", "llama3", "qwen2"))
    yield from ((f"models/{variant}", partial(models, variant)) for variant in VARIANTS)
    yield from ((f"exports/{variant}", partial(exports, variant)) for variant in VARIANTS)
    yield from ((f"training/{name}", partial(lambda n: of_run(trained(n)), name)) for name in TRAINING)
    yield from ((f"resumed/{name}", partial(resumed, name)) for name in RESUMED)
    yield from ((f"exported/{name}", partial(exported, name)) for name in ("plain", "bitnet", "mhc-4-static", "groups"))
    yield from ((f"used/{name}", partial(used, name)) for name in ("plain", "mtp-heads", "mtp-nextn", "hybrid-moe-mhc"))
    yield from ((f"grpo/{mode}", partial(grpo, mode)) for mode in ("policy", "rft", "training-free"))


# -- checkouts ---------------------------------------------------------------------------------------------------------


def work(checkout: Path, only: str, out: Path) -> None:
    """In a process of its own, in an empty folder: every hash of the checkout that PYTHONPATH names, into `out`."""
    import nanochat_cli
    import nanochat_kernels

    for package in (nanochat_cli, nanochat_kernels):
        assert checkout in Path(package.__file__).parents, f"{package.__file__} is not of {checkout}"
    found: Found = {}
    prepared("gpt-2")
    for name, case in cases():
        if only not in name:
            continue
        started = time.perf_counter()
        try:
            found |= {f"{name}: {part}": value for part, value in case().items()}
        except Exception as error:  # noqa: BLE001 - what fails in one checkout is a difference to the other
            found[name] = f"{type(error).__name__}: {error}"
        print(f"{checkout.name}: {name}, {time.perf_counter() - started:.1f} s", file=sys.stderr)
    out.write_text(json.dumps(found, indent=1) + "\n")


@contextlib.contextmanager
def started(checkout: Path, only: str) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """The process that hashes a checkout, and the file that it will write."""
    paths = os.pathsep.join(map(str, (checkout, checkout / "kernels")))
    environment = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hashes.json"
        line = [sys.executable, "-P", str(Path(__file__).resolve()), str(checkout), "--only", only, "--out", str(out)]
        (Path(folder) / "work").mkdir()
        with subprocess.Popen(
            [*line, "--work"], cwd=Path(folder) / "work", env={**os.environ, **environment}
        ) as process:
            yield process, out


def hashes(targets: Iterable[Path], only: str) -> list[Found]:
    """Of checkouts, side by side, and of files that hold them already."""
    with contextlib.ExitStack() as running:
        processes = [running.enter_context(started(one.resolve(), only)) if one.is_dir() else one for one in targets]
        found = []
        for one in processes:
            if isinstance(one, Path):
                kept = json.loads(one.read_text())
                found.append({name: value for name, value in kept.items() if only in name})
                continue
            process, out = one
            if process.wait():
                raise SystemExit(f"exit code {process.returncode} of {process.args}")
            found.append(json.loads(out.read_text()))
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="+", help="one or two: a checkout, or a file of hashes")
    parser.add_argument("--only", default="", metavar="WORD", help="only the cases with WORD in their name")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the hashes of a single checkout there")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.checkouts[0], given.only, given.out)
        return 0
    found = hashes(given.checkouts, given.only)
    if len(found) == 1:
        text = json.dumps(found[0], indent=1) + "\n"
        print(text, end="") if given.out is None else given.out.write_text(text)
        return 0
    one, other = found
    different = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    failed = [name for name in one if ": " not in name and name not in different]
    for name in different:
        print(f"differs  {name}: {one.get(name)} | {other.get(name)}")
    for name in failed:
        print(f"fails in both  {name}: {one[name]}")
    print(f"{len(one.keys() | other.keys())} hashes, {len(different)} differ, {len(failed)} cases fail in both")
    return 1 if different or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
