"""What a run writes names no secret: no value of a secret-sounding key, no credentials in URLs."""

import re
from collections.abc import Mapping
from typing import Any

_SECRET_KEY = r"(?:api[_-]?key|secret|password|passwd|(?:access|auth|hf|bearer)[_-]?token|token)"
_REDACTED = "<redacted>"
_JSON_KEY = rf"[\"'](?:[\w-]*[_-])?(?:{_SECRET_KEY}|authorization)[\"']"


def redact(tree: Any, key: str = "") -> Any:
    """Nested dicts and lists without secrets: values of secret-sounding keys, credentials in URLs,
    and a key pasted where the name of an environment variable belongs."""
    if isinstance(tree, Mapping):
        return {name: redact(value, name) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(value, key) for value in tree]
    if not isinstance(tree, str) or not tree:
        return tree
    if re.search(rf"(^|_){_SECRET_KEY}$", key, re.IGNORECASE):
        return _REDACTED
    if key.endswith("_env") and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", tree):
        return _REDACTED
    return redact_text(tree)


def redact_text(text: str) -> str:
    """Text without credentials in URLs, values of `key=value` secrets and of secret-sounding JSON
    keys, and what looks like a key of a service."""
    text = re.sub(r"(?<=://)[^/\s]+@", f"{_REDACTED}@", text)  # a password may hold an @
    text = re.sub(rf"(?i)((?:^|[?&._-]){_SECRET_KEY}=)[^&\s]+", rf"\g<1>{_REDACTED}", text)
    text = re.sub(rf"(?i)({_JSON_KEY}\s*:\s*)(\"[^\"]*\"?|'[^']*'?)", rf'\g<1>"{_REDACTED}"', text)
    text = re.sub(r"(?i)\b(Bearer|Basic) [A-Za-z0-9+/=._-]{8,}", rf"\g<1> {_REDACTED}", text)
    # Directories have such names, too: hf-internal-testing, hf_qwen_instruct.
    return re.sub(r"\bhf_[A-Za-z0-9]{30,}|\bsk-(?=[\w-]*\d)[\w-]{16,}", _REDACTED, text)
