"""A process that adds experiences to a shared library and sometimes prunes it; started by test_experience.py."""

import sys
from pathlib import Path

from nanochat_cli.rl.experience import Experience, ExperienceLibrary

NOW = 1e6


def main(path: str, name: str, count: int) -> None:
    library = ExperienceLibrary(Path(path), clock=lambda: NOW)
    print("ready", flush=True)
    sys.stdin.readline()
    for index in range(count):
        text = f"{name} {index} " + "x" * (index * 37 % 5000)
        library.add([Experience("prompt", text, 1.0, 0.5, NOW)])
        if index % 5 == 4:
            library.add([Experience("prompt", "old", 1.0, 0.5, 0.0)])
            library.prune(max_age=NOW / 2)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
