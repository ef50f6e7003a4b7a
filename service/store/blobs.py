"""Content-addressed blobs: bytes named by their SHA-256, published whole or not at all.

    objects/ab/abcdef...    published blobs, the folder named by the first two digits
    temporary/<random>      what is being written; its writer holds an exclusive flock

On a local folder a blob is published by: check length and hash, fsync the file, rename it, fsync
the folder. A writer that dies leaves only a temporary file, whose lock dies with it, so
`sweep_temporary` can tell dead from living at any time, beside other processes too. Publishing and
collecting exclude each other by a flock on `objects`: no collector takes what was just put again.

Any other URL that obstore knows (`s3://bucket/prefix`, `memory:///`) holds the same tree. Uploads
are then collected in a local folder first, because the name is only known at the last byte, and
put with one create call, which those stores make atomic themselves.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import obstore
from obstore.store import LocalStore, ObjectStore, from_url

from service.errors import BlobCorrupt, StoreError, UploadTooLarge
from service.store.files import fsync_folder, io_errors, make_folder, temporary_file

CHUNK_BYTES = 1 << 20
"""Bytes read or written at once; memory stays within a few of these whatever the blob's size."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BlobRef:
    """A published blob: `sha256` in 64 lower-case hex digits, `size` in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class BlobInfo:
    """A blob as listed: like `BlobRef`, and when it was last put (UTC)."""

    sha256: str
    size: int
    modified: datetime


class BlobStore:
    """Blobs in a local folder, or at a URL with `local_dir` for temporary files and a cache."""

    def __init__(self, location: str | Path, *, local_dir: Path | None = None) -> None:
        """Open the store, creating its folders; `location` is a path, `file://` URL or other URL.

        Raises ValueError when a URL that is not local comes without `local_dir`, and StoreError
        or StorageFull when the folders cannot be made.
        """
        text = str(location)
        self._root: Path | None
        if "://" in text and not text.startswith("file://"):
            if local_dir is None:
                raise ValueError("a blob store that is not local needs local_dir")
            self._root, work = None, Path(local_dir)
            self._store: ObjectStore = from_url(text)
            self._cache: Path | None = work / "cache"
        else:
            self._root = work = Path(text.removeprefix("file://")).absolute()
            self._cache = None
        self._temporary = work / "temporary"
        self._damaged: dict[str, str] = {}
        with io_errors(f"open the blob store at {work}"):
            make_folder(self._temporary)
            if self._cache is not None:
                make_folder(self._cache)
            if self._root is not None:
                make_folder(self._root / "objects")
                self._store = LocalStore(self._root)

    @property
    def damaged(self) -> dict[str, str]:
        """What was found wrong since this store was opened: a sentence for each sha256.

        A blob leaves the list when it is found whole, put again, or deleted.
        """
        return dict(self._damaged)

    def writer(self, *, max_bytes: int | None = None) -> BlobWriter:
        """A streaming writer; beyond `max_bytes` its `write` raises UploadTooLarge."""
        return BlobWriter(self, max_bytes)

    def put_file(self, path: Path) -> BlobRef:
        """Copy one local file in; the same bytes again give the same blob.

        Only a plain file: a link is not followed and a pipe not waited for, because the file may
        come from a process that is not trusted. Raises StoreError or StorageFull.
        """
        with io_errors(f"read {path.name}"):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as source, self.writer() as writer:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StoreError(f"{path.name} is not a plain file.")
            while chunk := source.read(CHUNK_BYTES):
                writer.write(chunk)
            return writer.commit()

    def exists(self, sha256: str) -> bool:
        """Whether the blob is published. Its bytes are not checked; `verify` does that."""
        try:
            obstore.head(self._store, _key(sha256))
        except FileNotFoundError:
            return False
        return True

    def size(self, sha256: str) -> int:
        """The blob's length in bytes. Raises BlobCorrupt when the store does not hold it."""
        try:
            return obstore.head(self._store, _key(sha256))["size"]
        except FileNotFoundError:
            raise self._missing(sha256) from None

    def read_chunks(self, sha256: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The blob's bytes in pieces of at least `chunk_bytes` (the last may be shorter).

        Raises BlobCorrupt at once when the store does not hold it. The hash is not checked here,
        because the first pieces are out before it could be; call `verify` first where it matters.
        """
        try:
            found = obstore.get(self._store, _key(sha256))
        except FileNotFoundError:
            raise self._missing(sha256) from None
        return (bytes(chunk) for chunk in found.stream(min_chunk_size=chunk_bytes))

    def open_path(self, sha256: str, *, verify: bool = True) -> Path:
        """A local file with the blob's bytes, for reading only; remote blobs are cached first.

        With `verify` the bytes are hashed before the path is handed out (about 1 s a gigabyte).
        Raises BlobCorrupt when the blob is absent or its bytes do not match its name.
        """
        key = _key(sha256)
        if self._root is not None:
            path = self._root / key
            if not path.is_file():
                raise self._missing(sha256)
        else:
            assert self._cache is not None
            path = self._cache / sha256
            if not path.is_file():
                self._fetch(sha256, path)
                return path
        if verify:
            try:
                with open(path, "rb") as file:
                    self._check(sha256, iter(lambda: file.read(CHUNK_BYTES), b""))
            except BlobCorrupt:
                if self._cache is not None:
                    path.unlink(missing_ok=True)  # a copy, which the next call fetches again
                raise
        return path

    def verify(self, sha256: str) -> None:
        """Read the whole blob and compare its hash. Raises BlobCorrupt when it differs."""
        self._check(sha256, self.read_chunks(sha256))

    def delete(self, sha256: str) -> bool:
        """Remove the blob; True when it was there. Deleting an absent blob is no error."""
        there = self.exists(sha256)
        with suppress(FileNotFoundError):
            obstore.delete(self._store, _key(sha256))
        if self._cache is not None:
            (self._cache / sha256).unlink(missing_ok=True)
        self._damaged.pop(sha256, None)
        return there

    def collect(self, sha256: str, put_before: datetime) -> bool:
        """`delete`, but only if the blob was last put before that moment; True when it went."""
        with self._folder_lock(fcntl.LOCK_EX):
            try:
                if obstore.head(self._store, _key(sha256))["last_modified"] >= put_before:
                    return False
            except FileNotFoundError:
                return False
            return self.delete(sha256)

    def blobs(self) -> Iterator[BlobInfo]:
        """Every published blob, in no particular order."""
        for page in obstore.list(self._store, "objects"):
            for meta in page:
                name = meta["path"].rsplit("/", 1)[-1]
                if _SHA256.fullmatch(name):
                    yield BlobInfo(name, meta["size"], meta["last_modified"])

    def temporary_files(self) -> int:
        """How many files are being written now, or were left by writers that died."""
        return sum(1 for _ in self._temporary.iterdir())

    def sweep_temporary(self) -> int:
        """Remove the temporary files that no living writer holds; returns how many."""
        swept = 0
        for path in self._temporary.iterdir():
            with suppress(FileNotFoundError), open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                path.unlink()
                swept += 1
        return swept

    def _fetch(self, sha256: str, path: Path) -> None:
        """Bring a remote blob into the cache, whole and checked.

        Of several that fetch it at once the first one's file stays: a conversion may have been
        granted that very file.
        """
        chunks = self.read_chunks(sha256)
        with io_errors("write to the cache"), temporary_file(self._temporary) as (file, name):
            self._check(sha256, _tee(chunks, file))
            file.flush()
            with suppress(FileExistsError):
                os.link(name, path)

    def _publish(self, file: BinaryIO, temporary: Path, ref: BlobRef) -> None:
        """Make a finished temporary file visible under its hash.

        An existing blob stays the file that it is, for whoever was granted that very file; its time
        is renewed so that a collector of old unreferenced blobs leaves it alone. A damaged one is
        replaced.
        """
        key = _key(ref.sha256)
        if self._root is None:
            obstore.put(self._store, key, temporary)
            if (stored := self.size(ref.sha256)) != ref.size:
                raise BlobCorrupt(f"{stored} bytes of {ref.size} reached the store.")
            temporary.unlink()
            self._damaged.pop(ref.sha256, None)
            return
        os.fsync(file.fileno())
        final = self._root / key
        whole = _identity_if_whole(final, ref)
        # Alone while the folder is new, or a second writer could use it before it is durable.
        with self._folder_lock(fcntl.LOCK_SH if final.parent.is_dir() else fcntl.LOCK_EX):
            make_folder(final.parent)
            if whole is not None and _identity(final) == whole:
                os.utime(final)
            else:
                os.replace(temporary, final)
        fsync_folder(final.parent)
        self._damaged.pop(ref.sha256, None)

    @contextmanager
    def _folder_lock(self, kind: int) -> Iterator[None]:
        """Hold the flock on `objects`; nothing where the store is not local."""
        if self._root is None:
            yield
            return
        descriptor = os.open(self._root / "objects", os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def _check(self, sha256: str, chunks: Iterator[bytes]) -> None:
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise self._found_damaged(
                sha256, f"The bytes of blob {sha256} hash to {digest.hexdigest()}."
            )
        self._damaged.pop(sha256, None)

    def _missing(self, sha256: str) -> BlobCorrupt:
        return self._found_damaged(sha256, f"The store does not hold the blob {sha256}.")

    def _found_damaged(self, sha256: str, sentence: str) -> BlobCorrupt:
        self._damaged[sha256] = sentence
        return BlobCorrupt(sentence, sha256=sha256)


class BlobWriter:
    """Writes one blob piece by piece, hashing as it goes; visible only after `commit`.

    Use it as a context manager: leaving without `commit` aborts. Calls block on the disk, so an
    async caller runs them in a thread; one writer is used by one thread at a time.
    """

    def __init__(self, store: BlobStore, max_bytes: int | None) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._size = 0
        self._open = temporary_file(store._temporary)
        with io_errors("create a temporary file"):
            self._file, self._path = self._open.__enter__()
        self._done = False

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes. Raises UploadTooLarge or StorageFull, after which nothing is left."""
        try:
            if self._done:
                raise StoreError("The writer is already closed.")
            total = self._size + len(data)
            if self._max_bytes is not None and total > self._max_bytes:
                raise UploadTooLarge(
                    f"The upload is larger than {self._max_bytes} bytes.", limit=self._max_bytes
                )
            with io_errors("write the upload"):
                self._file.write(data)
            self._hash.update(data)
            self._size = total
        except BaseException:
            self.abort()
            raise

    def commit(
        self, *, expected_sha256: str | None = None, expected_size: int | None = None
    ) -> BlobRef:
        """Publish what was written, atomically and durably, and return its reference.

        Raises BlobCorrupt when length or hash are not the expected ones or when the file system
        lost bytes, and StorageFull; nothing is published then.
        """
        if self._done:
            raise StoreError("The writer is already closed.")
        ref = BlobRef(self._hash.hexdigest(), self._size)
        try:
            with io_errors("publish the blob"):
                self._file.flush()
                on_disk = os.fstat(self._file.fileno()).st_size
                if on_disk != ref.size or expected_size not in (None, ref.size):
                    raise BlobCorrupt(
                        f"{ref.size} bytes were received, {on_disk} are on disk"
                        + (f", {expected_size} were announced." if expected_size else ".")
                    )
                if expected_sha256 not in (None, ref.sha256):
                    raise BlobCorrupt(
                        f"The bytes hash to {ref.sha256}, {expected_sha256} was announced."
                    )
                self._store._publish(self._file, self._path, ref)
        finally:
            self.abort()
        return ref

    def abort(self) -> None:
        """Drop what was written. Safe to call twice and after `commit`."""
        if not self._done:
            self._done = True
            self._open.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.abort()


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None when there is none."""
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def _identity_if_whole(path: Path, ref: BlobRef) -> tuple[int, int] | None:
    """`_identity` of a file that holds these very bytes; None when it does not."""
    with suppress(OSError), open(path, "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_size == ref.size:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return (found.st_dev, found.st_ino) if digest == ref.sha256 else None
    return None


def _key(sha256: str) -> str:
    if _SHA256.fullmatch(sha256) is None:
        raise ValueError(f"not a sha256 in lower-case hex: {sha256!r}")
    return f"objects/{sha256[:2]}/{sha256}"


def _tee(chunks: Iterator[bytes], file: BinaryIO) -> Iterator[bytes]:
    for chunk in chunks:
        file.write(chunk)
        yield chunk
