"""Names that come from outside: model names are checked, upload file names are cleaned."""

from __future__ import annotations

import re
import unicodedata

from service.errors import NameInvalid

_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MAX_FILENAME_CHARACTERS = 255


def check_model_name(name: str) -> str:
    """Return `name` when it is 1 to 63 characters of `[a-z0-9._-]` and starts with `[a-z0-9]`.

    Raises NameInvalid otherwise. The pattern leaves no room for path separators, NUL or
    look-alike characters, so a name may stand in a URL, a log line and a metric label as it is.
    """
    if _MODEL_NAME.fullmatch(name) is None:
        raise NameInvalid(f"{name[:80]!r} is not a model name.")
    return name


def clean_filename(name: str | None) -> str | None:
    """The last path component of an uploader's file name without invisible characters, or None.

    The name is only ever shown and offered as a download name, never opened. Control and format
    characters (NUL, bidirectional overrides, ...) are dropped, and at most
    `MAX_FILENAME_CHARACTERS` characters are kept, the end of the name first because it holds the
    suffix.
    """
    if name is None:
        return None
    last = re.split(r"[/\\]", name)[-1]
    shown = "".join(c for c in last if not unicodedata.category(c).startswith("C")).strip()
    return shown[-MAX_FILENAME_CHARACTERS:] if shown.strip(".") else None
