"""The experience library: rollouts that did better than their group, kept on disk and shown to later rollouts.

Training-free GRPO (arXiv:2510.08191): the policy improves through what it is shown, not through its weights. The file
has one JSON object per line and is shared by any number of processes: every access holds a lock, appends are synced,
pruning replaces the file whole, and a last line that a crash left unfinished is dropped. `rewards` judges rollouts.
"""

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_cli.atomic_write import append_synced, write_atomically
from nanochat_cli.errors import DataError
from nanochat_cli.nesting import parse_json

KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "response": (str,),
    "reward": (int, float),
    "advantage": (int, float),
    "created_at": (int, float),
    "metadata": (dict,),
}


@dataclass(frozen=True)
class Experience:
    """One rollout. Raises ValueError when a number is not finite."""

    prompt: str
    response: str
    reward: float
    advantage: float
    created_at: float
    """Seconds since 1970."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: the problem's name, the terms of the reward, …"""

    def __post_init__(self) -> None:
        for name in ("reward", "advantage", "created_at"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)} is not finite")


@dataclass(frozen=True)
class LibraryStatistics:
    """The numbers after `prompts` are None for an empty library; times are seconds since 1970."""

    experiences: int
    prompts: int
    mean_reward: float | None = None
    best_reward: float | None = None
    mean_advantage: float | None = None
    oldest: float | None = None
    newest: float | None = None


class ExperienceLibrary:
    """The experiences of one file; `clock` gives the time of new ones in seconds since 1970.

    `dropped_bytes` counts the bytes of unfinished lines that were cut off. Raises DataError, here and later, when the
    file cannot be read or written, or has a line that is not an experience.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self.dropped_bytes = 0
        self._clock = clock
        self._experiences: list[Experience] = []
        self._version: tuple[int, int, int] | None = None
        with self._locked():
            self._load()

    def __len__(self) -> int:
        return len(self.experiences)

    @property
    def experiences(self) -> tuple[Experience, ...]:
        """All experiences, those of other processes included, oldest line first."""
        if self._version != self._version_on_disk():
            with self._locked():
                self._load()
        return tuple(self._experiences)

    def add(self, experiences: Iterable[Experience]) -> None:
        """Append experiences as adjacent lines. If that fails, none of them is kept."""
        added = list(experiences)
        if not added:
            return
        content = "".join(_line(experience) for experience in added).encode()
        with self._locked():
            self._mend()
            known = self._version == self._version_on_disk()
            self._append(content)
            if known:  # otherwise the next reader loads what others wrote too
                self._experiences += added
                self._version = self._version_on_disk()

    def add_group(
        self,
        prompt: str,
        responses: Sequence[str],
        rewards: Sequence[float],
        *,
        threshold: float = 0.0,
        standardise: bool = False,
        metadata: Sequence[Mapping[str, Any]] = (),
    ) -> list[Experience]:
        """Keep the rollouts of a prompt whose advantage within the group is above `threshold`; returns those kept.

        metadata: nothing, or one per response. Raises ValueError when lengths differ, for fewer than two responses
        and for rewards that are not finite.
        """
        import torch

        from nanochat_cli.rl.advantages import group_advantages

        metadata = metadata or [{}] * len(responses)
        values = torch.tensor(rewards, dtype=torch.float64)
        advantages = group_advantages(values, standardise=standardise).tolist()
        now = self._clock()
        kept = [
            Experience(prompt, response, float(reward), advantage, now, data)
            for response, reward, advantage, data in zip(responses, rewards, advantages, metadata, strict=True)
            if advantage > threshold
        ]
        self.add(kept)
        return kept

    def without(self, prompts: Sequence[str]) -> list[Experience]:
        """The experiences of all other prompts; prompts are compared without trailing white space."""
        excluded = {prompt.rstrip() for prompt in prompts}
        return [experience for experience in self.experiences if experience.prompt.rstrip() not in excluded]

    def sample(
        self, count: int, random: np.random.Generator, *, temperature: float = 1.0, exclude_prompt: str | None = None
    ) -> list[Experience]:
        """Draw up to `count` without replacement, each in turn with probability ∝ exp(advantage / temperature).

        exclude_prompt: leaves out experiences of this prompt, whose answers a rollout must not see. No pair of prompt
        and response is drawn twice. Raises ValueError for a temperature that is not above 0.
        """
        pool = self.without([] if exclude_prompt is None else [exclude_prompt])
        if not pool or count <= 0:
            return []
        # The largest of log p + Gumbel noise are a draw without replacement (arXiv:1903.06059, §2.2).
        keys = log_probabilities([e.advantage for e in pool], temperature) + random.gumbel(size=len(pool))
        order = sorted(range(len(pool)), key=lambda index: (keys[index], pool[index].advantage), reverse=True)
        drawn: dict[tuple[str, str], Experience] = {}
        for index in order:
            drawn.setdefault((pool[index].prompt, pool[index].response), pool[index])
            if len(drawn) == count:
                break
        return list(drawn.values())

    def prune(self, *, max_age: float | None = None, max_size: int | None = None) -> int:
        """Drop experiences older than `max_age` seconds, then all but the `max_size` with the largest advantage.

        Ties keep the larger reward, then the newer experience. Lines keep their order. Returns how many were dropped.
        """
        with self._locked():
            self._load()
            before = len(self._experiences)
            kept = list(enumerate(self._experiences))
            if max_age is not None:
                oldest = self._clock() - max_age
                kept = [(index, experience) for index, experience in kept if experience.created_at >= oldest]
            if max_size is not None:
                kept.sort(key=lambda pair: (pair[1].advantage, pair[1].reward, pair[1].created_at), reverse=True)
                kept = sorted(kept[: max(max_size, 0)], key=lambda pair: pair[0])
            remaining = [experience for _, experience in kept]
            if len(remaining) < before:
                with self._explained("write"):
                    write_atomically(self.path, "".join(map(_line, remaining)).encode())
                self._experiences = remaining
                self._version = self._version_on_disk()
        return before - len(remaining)

    def statistics(self) -> LibraryStatistics:
        """Counts, means and extremes of all experiences."""
        all_ = self.experiences
        if not all_:
            return LibraryStatistics(0, 0)
        rewards, times = [e.reward for e in all_], [e.created_at for e in all_]
        return LibraryStatistics(
            experiences=len(all_),
            prompts=len({experience.prompt for experience in all_}),
            mean_reward=math.fsum(rewards) / len(all_),
            best_reward=max(rewards),
            mean_advantage=math.fsum(experience.advantage for experience in all_) / len(all_),
            oldest=min(times),
            newest=max(times),
        )

    # -- the file --------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process or thread at a time; the system drops the lock when its holder dies."""
        with self._explained("open"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A separate file: pruning replaces the library's, and a lock on the old one would guard nothing.
            lock = self.path.with_name(f".{self.path.name}.lock").open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _load(self) -> None:
        """Read the file if another process has changed it. The caller holds the lock."""
        if self._version is not None and self._version == self._version_on_disk():
            return
        self._mend()
        with self._explained("read"):
            content = self.path.read_bytes() if self.path.exists() else b""
        lines = enumerate(content.split(b"\n"), 1)
        self._experiences = [self._parse(number, line) for number, line in lines if line.strip()]
        self._version = self._version_on_disk()

    def _mend(self) -> None:
        """Terminate the last line if it is whole, else drop it. The caller holds the lock."""
        size = self._version_on_disk()[1]
        if size == 0:
            return
        with self._explained("repair"), self.path.open("r+b") as file:
            file.seek(size - 1)
            if file.read() == b"\n":
                return
            file.seek(0)
            content = file.read()
            start = content.rfind(b"\n") + 1
            try:
                self._parse(content.count(b"\n") + 1, content[start:])
            except DataError:
                file.truncate(start)
                self.dropped_bytes += size - start
            else:
                file.write(b"\n")

    def _append(self, content: bytes) -> None:
        with self._explained("write"):
            append_synced(self.path, content)

    def _version_on_disk(self) -> tuple[int, int, int]:
        """Changes with every write: (inode, bytes, nanoseconds); zeros when there is no file."""
        with self._explained("read"):
            try:
                status = self.path.stat()
            except FileNotFoundError:
                return 0, 0, 0
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _parse(self, number: int, line: bytes) -> Experience:
        try:
            values = parse_json(line)
            if not isinstance(values, dict) or values.keys() != KINDS.keys():
                raise ValueError("its keys must be " + ", ".join(KINDS))
            for name, kinds in KINDS.items():
                if not isinstance(values[name], kinds) or isinstance(values[name], bool):
                    raise ValueError(f"{name} has the wrong type")
            if not _is_finite(values["metadata"]):  # JSON has no such numbers, and pruning writes the line again
                raise ValueError("a number in metadata is not finite")
            return Experience(**values)
        except (ValueError, OverflowError) as error:
            message = "not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else error
            raise DataError(f"{self.path}:{number}: not an experience ({message}); fix or remove the line") from None

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.path}: cannot {doing} the experience library: {error.strerror}") from error


def log_probabilities(advantages: Sequence[float], temperature: float) -> np.ndarray:
    """log softmax(advantages / temperature), float64 [N]; no temperature above 0 overflows.

    Raises ValueError for a temperature that is not above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature} must be above 0 and finite")
    values = np.asarray(advantages, dtype=np.float64)
    with np.errstate(over="ignore"):  # too large a difference becomes −∞, which is never drawn
        scaled = (values - values.max()) / temperature
    return scaled - np.log(np.exp(scaled).sum())


def few_shot_prompt(
    experiences: Sequence[Experience], prompt: str, *, fits: Callable[[str], bool] = lambda _: True
) -> str:
    """The prompt after experiences, each as prompt and response, separated by blank lines, the best one last.

    fits: whether a whole text fits the context; the experiences with the smallest advantage are left out until it
    does. The prompt itself is never cut.
    """
    best_first = sorted(experiences, key=lambda experience: experience.advantage, reverse=True)
    text = prompt
    examples = ""
    for experience in best_first:
        examples = f"{experience.prompt}{experience.response.rstrip()}\n\n{examples}"
        if not fits(examples + prompt):
            break
        text = examples + prompt
    return text


def _is_finite(value: Any) -> bool:
    """Of every number in a JSON value."""
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _line(experience: Experience) -> str:
    """One line of the file. Raises ValueError for metadata that JSON cannot represent."""
    try:
        # ASCII only, so that no character of a response can be taken for the end of a line.
        return json.dumps(asdict(experience), allow_nan=False) + "\n"
    except TypeError as error:
        raise ValueError(f"metadata must be JSON values: {error}") from None
