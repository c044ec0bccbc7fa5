"""Keys and tokens in text, recognised by their form alone: long random strings are left alone, most are no secrets.

The forms are those that their issuers document. Knows bytes.
"""

import re
from collections import Counter

_FORMS = {
    "private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[^-]{20,20000}"
    rb"-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "AWS key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "GitHub token": rb"\b(?:gh[oprsu]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{82})\b",
    "GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20,}",
    "Slack token": rb"\bxox[abeoprs]-[0-9]{6,}-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/T\w{6,}/B\w{6,}/\w{16,}",
    "Google key": rb"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    "Stripe key": rb"\b[rs]k_live_[A-Za-z0-9]{20,}\b",
    "npm token": rb"\bnpm_[A-Za-z0-9]{36}\b",
    "PyPI token": rb"\bpypi-AgE[A-Za-z0-9_-]{50,}",
    "Hugging Face token": rb"\bhf_[A-Za-z]{34}\b",
    "OpenAI key": rb"\bsk-(?:proj-|svcacct-)?[A-Za-z0-9_-]{20,}T3BlbkFJ[A-Za-z0-9_-]{20,}",
    "Anthropic key": rb"\bsk-ant-[A-Za-z0-9_-]{80,}",
    "JSON web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
}
KINDS = tuple(_FORMS)
_ANY = re.compile(b"|".join(b"(%s)" % form for form in _FORMS.values()))


def masked(content: bytes, found: Counter[str]) -> bytes:
    """The text with `<secret: KIND>` for each secret; counts them by kind in `found`."""

    def mask(match: re.Match[bytes]) -> bytes:
        kind = KINDS[(match.lastindex or 1) - 1]
        found[kind] += 1
        return b"<secret: %s>" % kind.encode()

    return _ANY.sub(mask, content)
