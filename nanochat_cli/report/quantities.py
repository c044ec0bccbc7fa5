"""Quantities as people read them: counts, bytes, rates and durations on one short line."""


def format_quantity(value: float, unit: str) -> str:
    """`(1_234_567, "tokens")` -> `"1.23M tokens"`; unit "B" is bytes: `"1.23 MB"`."""
    for factor, suffix in ((1e9, "G" if unit == "B" else "B"), (1e6, "M"), (1e3, "K" if unit != "B" else "k")):
        if abs(value) >= 10 * factor or (abs(value) >= factor and factor > 1e3):
            scaled = value / factor
            number = f"{scaled:.2f}" if scaled < 10 else f"{scaled:.1f}"
            return f"{number} {suffix}B" if unit == "B" else f"{number}{suffix} {unit}".rstrip()
    number = f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.2g}"
    return f"{number} {unit}".rstrip()


def counted(n: int, noun: str) -> str:
    """`(1, "document")` -> `"1 document"`, `(1730, "document")` -> `"1,730 documents"`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


_DAY = 86_400
_YEAR = 365.25 * _DAY


def format_duration(seconds: float) -> str:
    """A time as a clock shows it, up to days: `75` -> `"1:15"`, `3700` -> `"1:01:40"`, `200_000` -> `"2.3 days"`."""
    if seconds >= 2 * _DAY:
        return format_span(seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_span(seconds: float) -> str:
    """A time in its most readable unit: `0.3` -> `"0.3 s"`, `300` -> `"5 min"`, up to years."""
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    if seconds < 3570:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * _DAY:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02} min"
    number, unit = (seconds / _DAY, "days") if seconds < 2 * _YEAR else (seconds / _YEAR, "years")
    return f"{number:.1f} {unit}" if number < 1000 else f"{number:,.0f} {unit}"
