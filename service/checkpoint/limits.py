"""The limits of the reader. Each is checked before anything of that size is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import (
    ArchiveBomb,
    HeaderTooLarge,
    LimitExceeded,
    NestingTooDeep,
    PickleBomb,
)


@dataclass(frozen=True)
class ReadLimits:
    """What an uploaded file may be at most; every breach raises LimitExceeded naming the field.

    The service's settings carry the same names with the prefix `FOLDSERVE_READER_`, except that
    `file_bytes` is `FOLDSERVE_MAX_UPLOAD_BYTES`.

    Attributes:
        file_bytes: length of the file, bytes.
        archive_entries: entries of a zip archive, count.
        archive_expansion: sum of the entries' lengths over the file's length, ratio. torch.save
            stores without compression, so an honest file stays just below 1.
        header_bytes: JSON header of a safetensors file, or one JSON document of a torch.export
            archive, bytes.
        nesting: tuples and lists inside one another in a pickle, levels.
        pickle_bytes: the pickle of a torch file without its tensors, bytes.
        pickle_operations: instructions of that pickle, count. They are walked in Python at about
            half a million a second; a tensor takes about 40. The elements that its calls copy
            count likewise.
        tensors: tensors in the file, count.
        tensor_expansion: sum of the tensors' elements in bytes over the file's length, ratio.
            Above 1 only where tensors share storage, as tied weights do.
        key_characters: length of one key, characters.
        graph_values: brackets, braces and commas of one JSON header or document, count. Parsed,
            each may take some 150 bytes.
        graph_nodes: operator calls of its graph, count; each takes about 0.2 ms to check.
        graph_constant_bytes: tensors that the graph makes from nothing, all together, bytes.
        graph_value_bytes: one intermediate value of the graph for three samples, bytes.
    """

    file_bytes: int = 8 << 30
    archive_entries: int = 100_000
    archive_expansion: float = 1.05
    header_bytes: int = 32 << 20
    pickle_bytes: int = 32 << 20
    pickle_operations: int = 2_000_000
    tensors: int = 50_000
    tensor_expansion: float = 2.0
    key_characters: int = 512
    nesting: int = 100
    graph_values: int = 1_000_000
    graph_nodes: int = 20_000
    graph_constant_bytes: int = 64 << 20
    graph_value_bytes: int = 8 << 30


_KINDS: dict[str, type[LimitExceeded]] = {
    "archive_entries": ArchiveBomb,
    "archive_expansion": ArchiveBomb,
    "header_bytes": HeaderTooLarge,
    "graph_values": HeaderTooLarge,
    "pickle_bytes": PickleBomb,
    "pickle_operations": PickleBomb,
    "nesting": NestingTooDeep,
}


def exceeded(
    limits: ReadLimits, name: str, found: str, kind: type[LimitExceeded] | None = None
) -> LimitExceeded:
    """The error for a breach of the field `name`; `found` says what the file has."""
    limit = getattr(limits, name)
    setting = "MAX_UPLOAD_BYTES" if name == "file_bytes" else f"READER_{name.upper()}"
    kind = kind or _KINDS.get(name, LimitExceeded)
    return kind(
        f"{found}; the limit {name} is {limit}.",
        remedy=f"If the file is legitimate, raise FOLDSERVE_{setting}.",
        limit=name,
        value=limit,
    )
