"""The card of a data set: what it holds and what was left out, as Markdown. All of it is in the manifest.

Others may read the card: of a path it has only the last name.
"""

from collections.abc import Iterable

from nanochat_cli.config.source_parts import parts_without_folders
from nanochat_cli.data.contamination import RUN_WORDS
from nanochat_cli.data.manifest import SPLITS, Manifest, OriginInfo
from nanochat_cli.data.scan import COPY, NEAR
from nanochat_cli.report.quantities import format_quantity
from nanochat_cli.report.reporter import Reporter

MOST_LANGUAGES, SAID = 12, 6
"""The languages that the card names, and the command."""


def card(manifest: Manifest) -> str:
    """The card, in sections of a table or a few sentences."""
    sides = [
        (name, f"{side.documents:,}", f"{side.bytes:,}", f"{side.tokens:,}", f"{side.bytes / max(side.tokens, 1):.2f}")
        for name, side in ((name, manifest.split(name)) for name in SPLITS)
    ]
    for part in manifest.parts:
        sides += [
            (f"{name}, {part.name}", f"{side.documents:,}", f"{side.bytes:,}", f"{side.tokens:,}", "")
            for name, side in ((name, part.side(name)) for name in SPLITS)
        ]
    settings = [
        (f"`{key}`", f"`{parts_without_folders(value) if isinstance(value, str) else value}`")
        for key, value in sorted(manifest.settings.items())
        if value is not None
    ]
    parts = [
        f"# Data set: {parts_without_folders(manifest.source)}",
        _table(("split", "documents", "bytes", "tokens", "bytes per token"), sides),
        f"The tokenizer has {manifest.tokenizer.vocab_size:,} entries ({manifest.tokenizer.pre}).",
        *([] if manifest.chat is None else [_counted("Conversations by form", manifest.chat.forms)]),
        *_origin(manifest),
        "## Left out",
        _table(("reason", "count"), [(reason, f"{count:,}") for reason, count in manifest.skipped.items()])
        if manifest.skipped
        else "Nothing.",
        *_found(manifest),
        "## Settings",
        _table(("key", "value"), settings),
    ]
    return "\n\n".join(parts) + "\n"


def announce(manifest: Manifest, reporter: Reporter) -> None:
    """Say the main points of the card: languages, licences, duplicates, secrets, and what gives away problems."""
    source = manifest.source
    if (origin := manifest.origin) is not None:
        total = sum(size for _, size in origin.languages.values())
        shares = [f"{name} {100 * size / total:.1f} %" for name, (_, size) in _ranked(origin)[:SAID]]
        reporter.info(f"{source}: {', '.join(shares)}{', …' if len(origin.languages) > SAID else ''}")
        if origin.licence_files or origin.licence_tags:
            reporter.info(f"{source}: {_counted('licence files', origin.licence_files)} {_tags(origin)}")
    if (chat := manifest.chat) is not None:
        trained = (chat.train + chat.val) / (manifest.train.tokens + manifest.val.tokens)
        reporter.info(f"{source}: {_counted('conversations', chat.forms)} {trained:.0%} of the tokens are trained")
    copies, near = (manifest.skipped.get(reason, 0) for reason in (COPY, NEAR))
    if copies or near:
        largest = ", ".join(f"{count} like {name}" for count, name in manifest.families)
        reporter.info(
            f"{source}: left out {copies:,} copies and {near:,} near-duplicates of other documents: {largest}"
        )
    if manifest.secrets:
        what = "masked" if manifest.settings.get("data.secrets") == "mask" else "still in the text"
        reporter.warn(f"{source}: {_counted(f'secrets, {what}', manifest.secrets)}")
    info = manifest.contamination
    if info is not None and info.first:
        what = "left out" if info.left_out else "used (data.contamination=remove leaves them out)"
        counts = _counted(f"documents with {RUN_WORDS} words in a row of a built-in problem", info.documents)
        reporter.info(f"{source}: {counts} {what}: {', '.join(info.first)}")


def _origin(manifest: Manifest) -> Iterable[str]:
    origin = manifest.origin
    if origin is None:
        return
    yield "## Languages"
    total = sum(size for _, size in origin.languages.values())
    ranked = _ranked(origin)
    shown, rest = ranked[:MOST_LANGUAGES], ranked[MOST_LANGUAGES:]
    if rest:
        shown.append((f"{len(rest)} others", (sum(n for _, (n, _) in rest), sum(size for _, (_, size) in rest))))
    rows = [(name, f"{n:,}", format_quantity(size, "B"), f"{100 * size / total:.1f} %") for name, (n, size) in shown]
    yield _table(("by extension", "documents", "bytes", "share"), rows)
    yield "## Licences"
    yield _counted("Licence files", origin.licence_files)
    yield _tags(origin)
    yield "Whether a licence permits what you do with the data is for you to judge."


def _ranked(origin: OriginInfo) -> list[tuple[str, tuple[int, int]]]:
    return sorted(origin.languages.items(), key=lambda item: (-item[1][1], item[0]))


def _tags(origin: OriginInfo) -> str:
    return _counted("SPDX tags, in documents", origin.licence_tags)


def _found(manifest: Manifest) -> Iterable[str]:
    if manifest.near_duplicates is not None:
        found = manifest.near_duplicates
        yield f"{found.documents:,} documents of what was read are in {found.clusters:,} clusters of near-duplicates."
    if manifest.families:
        yield _counted("Most stand for", {name: count for count, name in manifest.families})
    if (info := manifest.contamination) is not None:
        what = "left out" if info.left_out else "not left out"
        yield _counted(f"Documents with {RUN_WORDS} words in a row of a built-in problem, {what}", info.documents)
    if "data.secrets" in manifest.settings or manifest.secrets:
        what = "masked" if manifest.settings.get("data.secrets") == "mask" else "left in the text"
        yield _counted(f"Secrets, {what}", manifest.secrets)


def _counted(what: str, counts: dict[str, int]) -> str:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"{what}: {', '.join(f'{count:,} {name}' for name, count in ranked) or 'none'}."


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(columns)
    lines = [heads, ["---"] * len(heads), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
