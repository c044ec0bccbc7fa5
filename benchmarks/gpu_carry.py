"""Collect in build/gpu what `benchmarks/gpu.py` needs on a machine without a network, and that may not be there.

    python benchmarks/gpu_carry.py [--rust CRATES] [--python 3.11 3.12 3.13]

Run it in the environment that the project is installed in, then copy the checkout with build/gpu. It holds

    site/      the packages that nanochat imports and that do not come with torch, triton and tokenizers, in the
               versions of this environment, for x86-64 Linux and every Python named (one folder: compiled files carry
               the version in their names)
    rust/      with --rust: tokens of the .rs files below CRATES, such as unpacked librust-*-dev packages of Debian, at
               most 20 MB, with the vocabulary of profile `gpu` of `nanochat bench e3`
    tree.json  the commit, and a digest of its files, so that results of a copy name it
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from benchmarks.gpu_sections.task import TREE, digest
from nanochat_cli.report.environment import git_state

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions", "tomlkit", "packaging"),
    *("typer", "shellingham", "annotated-doc", "rich", "markdown-it-py", "mdurl", "pygments"),
    *("gguf", "tqdm", "pyyaml", "safetensors"),
)
PLATFORMS = "manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"
VOCABULARY = 16384
TEXT_BYTES = 16_000_000
MOST_TOKEN_BYTES = 20_000_000
NO_CODE = "docs/", "tests/", "benchmarks/results/"


def carry_packages(site: Path, pythons: list[str]) -> None:
    shutil.rmtree(site, ignore_errors=True)
    wanted = [f"{name}=={version(name)}" for name in PACKAGES]
    for python in pythons:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--implementation", "cp", "--python-version", python, "--dest", folder]
            command += [word for platform in PLATFORMS for word in ("--platform", platform)]
            subprocess.run([*command, *wanted], check=True)
            for wheel in sorted(Path(folder).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)


def carry_tokens(crates: Path, out: Path) -> None:
    overrides = [f"data.max_bytes={TEXT_BYTES}", f"model.vocab_size={VOCABULARY}"]
    command = [sys.executable, "-m", "nanochat_cli", "tokenize", "--source", str(crates), "--glob", "**/*.rs"]
    command += ["--out", str(out), "--force", *(word for text in overrides for word in ("--set", text))]
    subprocess.run(command, cwd=ROOT, check=True)
    if (size := bytes_of(out)) > MOST_TOKEN_BYTES:
        raise SystemExit(f"error: {out} has {size / 1e6:.1f} MB: lower TEXT_BYTES")


def carry_tree(file: Path) -> None:
    git = git_state(ROOT / "nanochat_cli")
    if git is None:
        raise SystemExit(f"error: {ROOT} is not a checkout with git, so results could not name their commit")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [name for name in listed.splitlines() if not name.startswith(NO_CODE)]
    file.write_text(json.dumps({**git, "files": files, "digest": digest(ROOT, files)}), encoding="utf-8")


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rust", type=Path, metavar="CRATES")
    parser.add_argument("--python", nargs="+", default=["3.11", "3.12", "3.13"])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    carry_packages(out / "site", arguments.python)
    if arguments.rust is not None:
        carry_tokens(arguments.rust, out / "rust")
    carry_tree(out / TREE)
    print(f"{out}: {bytes_of(out) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
