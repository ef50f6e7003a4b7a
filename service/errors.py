"""Everything that can go wrong, as one tree; `service.api.problems` alone maps it to HTTP.

FoldserveError
├── CheckpointError          the uploaded file itself
│   ├── EmptyFile
│   ├── NotACheckpoint
│   │   ├── PolyglotFile
│   │   ├── DuplicateKey
│   │   ├── OverlappingTensors
│   │   ├── ChecksumMismatch
│   │   └── UnsafeName
│   ├── TruncatedFile
│   ├── TensorOutOfRange
│   ├── UnsafePickle
│   │   └── WholeModulePickle
│   ├── UnsupportedContainer
│   │   ├── TorchScriptArchive
│   │   ├── CompressedArchive
│   │   ├── ExternalReference
│   │   └── FilteredDataset
│   ├── LimitExceeded
│   │   ├── ArchiveBomb
│   │   ├── HeaderTooLarge
│   │   ├── PickleBomb
│   │   ├── NestingTooDeep
│   │   ├── StrideBomb
│   │   └── AliasBomb
│   ├── NoStateDict
│   │   └── OptimizerOnly
│   ├── NonFiniteWeights
│   └── NegativeVariance
├── RecognitionError         the state dict inside it
│   ├── UnknownArchitecture
│   │   └── LanguageModel
│   ├── MissingKeys
│   ├── UnexpectedKeys
│   ├── ShapeMismatch
│   ├── MixedForm
│   └── InvalidConfig
│       └── UnsafeLabel
├── GraphError               a program
│   ├── UnsupportedOperator
│   └── InvalidProgram
│       ├── PickledTensor
│       └── UnexpectedEntry
├── FusionError              the engine
│   └── CertificateFailed
├── ExportError              the deploy form for another engine
│   ├── FormatNotInstalled
│   └── ExportFailed
├── ConversionError          the child process that converts
│   ├── ConversionTimeout
│   ├── ConversionOutOfMemory
│   ├── ConversionCrashed
│   └── ConversionInterrupted
├── StoreError               models, versions and blobs
│   ├── ModelNotFound
│   ├── VersionNotFound
│   ├── NameInvalid
│   ├── VersionNotReady
│   ├── ModelUnloaded
│   ├── Conflict
│   ├── FormNotAvailable
│   ├── NotServable
│   ├── UploadTooLarge
│   ├── StorageFull
│   └── BlobCorrupt
├── AccessError              who asks, from where, and how often
│   ├── Unauthorized
│   ├── Forbidden
│   ├── RateLimited
│   ├── HostNotAllowed
│   ├── OriginNotAllowed
│   ├── UrlTooLong
│   ├── HeadTooLarge
│   └── KeyNotFound
└── ServingError             one request
    ├── BadInput
    ├── UnsupportedMediaType
    ├── ImageTooLarge
    ├── RequestStalled
    ├── QueueFull
    ├── DeadlineExceeded
    ├── BackendFailed
    ├── ModelFaulty
    │   └── DeviceLost
    └── NotLoaded

An error is a sentence for a person (`detail`), what that person can do (`remedy`), a stable `code`
for programs, and any further facts by name. It survives JSON both ways, because conversions fail in
a child process and are remembered in the catalog.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar


class FoldserveError(Exception):
    """Base of every error that Foldserve raises on purpose."""

    title: ClassVar[str] = "Foldserve could not do that"
    remedy: str = "Read the detail; if it does not help, report it together with the request."

    def __init__(self, detail: str, *, remedy: str | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra
        if remedy is not None:
            self.remedy = remedy

    @classmethod
    def code(cls) -> str:
        """The stable name for programs: the class name in snake case, as in `queue_full`."""
        return _snake_case(cls.__name__)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form that `from_dict` turns back into an equal error of the same class."""
        return {
            "code": self.code(),
            "title": self.title,
            "detail": self.detail,
            "remedy": self.remedy,
            **self.extra,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> FoldserveError:
        """Rebuild an error from `to_dict`; an unknown code becomes the base class."""
        extra = {k: v for k, v in data.items() if k not in {"code", "title", "detail", "remedy"}}
        kind = _BY_CODE.get(str(data.get("code")), FoldserveError)
        return kind(str(data.get("detail", "")), remedy=data.get("remedy"), **extra)

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldserveError.from_dict, (self.to_dict(),)


@cache
def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


class CheckpointError(FoldserveError):
    """Base of what is wrong with an uploaded file itself, whatever network it may hold."""

    title = "The file is not a checkpoint that can be read"
    remedy = "Upload a state dict saved by torch.save or as safetensors."


class EmptyFile(CheckpointError):
    """The upload has no bytes at all."""

    title = "The file is empty"
    remedy = "Check the path that was uploaded; the file has no bytes."


class NotACheckpoint(CheckpointError):
    """Another format's bytes, or a structure that no library of the file's own format writes."""

    title = "The file is not a checkpoint"
    remedy = "Upload a .safetensors file, or a .pth/.pt/.pth.tar written by torch.save(state_dict)."


class PolyglotFile(NotACheckpoint):
    """Bytes that belong to no part of the format: another file before, behind or between them."""

    title = "The file is more than one file"
    remedy = "Upload the checkpoint as it was saved, with nothing before, after or inside it."


class DuplicateKey(NotACheckpoint):
    """An archive entry, a JSON key or a tensor's key stands twice: readers could differ on it."""

    title = "The file names something twice"
    remedy = "Save the checkpoint again; no library writes a name twice."


class OverlappingTensors(NotACheckpoint):
    """Two tensors of a safetensors header claim the same bytes of the file."""

    title = "Tensors of the file overlap"
    remedy = "Save the file again with the safetensors library, which gives each tensor its bytes."


class ChecksumMismatch(NotACheckpoint):
    """A zip entry's bytes do not give the CRC-32 that the archive's directory states for it."""

    title = "The file was damaged on its way"
    remedy = "Copy the file again from where it was saved."


class UnsafeName(NotACheckpoint):
    """A tensor's key or an archive entry cannot be shown as it is, or leads out of its folder."""

    title = "A name in the file is not safe to show or to use"
    remedy = (
        "Rename it: no control or text-direction characters, no backslashes, no path that leaves "
        "its folder."
    )


class TruncatedFile(CheckpointError):
    """The file ends before the place up to which its own directory, header or pickle reaches."""

    title = "The file ends too early"
    remedy = (
        "The transfer or the copy was cut short; compare sizes with the original and upload again."
    )


class TensorOutOfRange(CheckpointError):
    """A tensor's shape, strides or place do not fit the bytes that the file holds for it."""

    title = "A tensor lies outside the bytes that the file has for it"
    remedy = "The file is damaged or forged; upload the original."


class UnsafePickle(CheckpointError):
    """A pickle names globals outside the allow-list; `globals` are the first eight of them."""

    title = "The pickle asks for code that is never run here"
    remedy = "Save the weights alone: torch.save(model.state_dict(), path), or use safetensors."


class WholeModulePickle(UnsafePickle):
    """A refused pickle that holds an nn.Module's `_modules` and `_parameters`."""

    title = "The file is a pickled module, not a state dict"
    remedy = (
        "Save model.state_dict() instead of the model, or pack the module with `foldserve pack`."
    )


class UnsupportedContainer(CheckpointError):
    """A format of weights, or a kind of tensor, without a reader; `container` may name it."""

    title = "This file format is not read"
    remedy = "Convert it to safetensors or to a torch.save state dict."


class TorchScriptArchive(UnsupportedContainer):
    """A zip archive with TorchScript's `code/` or `constants.pkl` among its entries' names."""

    title = "The file is a TorchScript archive, which holds code"
    remedy = (
        "Load it where you trust it and save the weights alone: "
        "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')."
    )


class CompressedArchive(UnsupportedContainer):
    """A zip entry is compressed or encrypted, which torch.save never does."""

    title = "The archive is compressed or encrypted"
    remedy = "Upload the file as torch.save wrote it."


class ExternalReference(UnsupportedContainer):
    """An HDF5 link, external dataset or virtual dataset: its bytes are somewhere else."""

    title = "The file refers to other files"
    remedy = "Write each array into the file itself."


class FilteredDataset(UnsupportedContainer):
    """An HDF5 dataset is stored in chunks or through filters, not as one run of plain bytes."""

    title = "A dataset of the file is chunked or filtered"
    remedy = "Write each array plainly: file.create_dataset(name, data=array), nothing else."


class LimitExceeded(CheckpointError):
    """Reading or running it would exceed a limit: `limit` is its name, `value` what it allows.

    The few limits that no setting raises are named in the detail alone.
    """

    title = "The file exceeds a limit of the reader"
    remedy = "If the file is legitimate, raise the setting that the detail names."


class ArchiveBomb(LimitExceeded):
    """A zip archive of too many entries, or more bytes in them than `archive_expansion` allows."""

    title = "The archive expands beyond its own size"


class HeaderTooLarge(LimitExceeded):
    """A JSON header or document with more bytes or values than may be parsed."""

    title = "The file's header is too large"


class PickleBomb(LimitExceeded):
    """A pickle with too many bytes, instructions or calls, or with keys that take long to hash."""

    title = "The pickle asks for too much work or memory"


class NestingTooDeep(LimitExceeded):
    """Containers, JSON values or HDF5 groups too deep in one another, or a group inside itself."""

    title = "The file is nested too deeply"
    remedy = "Save a flat state dict: names to tensors."


class StrideBomb(LimitExceeded):
    """The tensors exceed `tensor_expansion` times the file, mostly by repeating their own elements.

    For a torch.export archive it stands for either cause.
    """

    title = "A tensor repeats its elements beyond the limit"
    remedy = (
        "Save the tensor's elements once: tensor.contiguous(), or the part that is not repeated."
    )


class AliasBomb(LimitExceeded):
    """The tensors exceed `tensor_expansion` times the file: several lie over the same bytes."""

    title = "Tensors share their bytes beyond the limit"
    remedy = "Save each tensor with bytes of its own: {key: t.clone() for key, t in state.items()}."


class NoStateDict(CheckpointError):
    """No tensors were found by name; `keys`, if given, are the first of the outermost mapping."""

    title = "No state dict was found in the file"
    remedy = "Save a mapping from names to tensors, bare or under `state_dict`, `model` or `ema`."


class OptimizerOnly(NoStateDict):
    """A mapping with `param_groups` or `optimizer` in it, and no weights; `keys` are its first."""

    title = "The file holds an optimizer's state and no weights"
    remedy = "Upload the model's own state dict: torch.save(model.state_dict(), path)."


class NonFiniteWeights(CheckpointError):
    """`keys` are the tensors with a NaN or an infinity, at most ten."""

    title = "The weights hold NaN or infinity"
    remedy = "The training run diverged or the file is damaged; upload an earlier checkpoint."


class NegativeVariance(CheckpointError):
    """`keys` are the `running_var` tensors with an element below zero, at most ten."""

    title = "A batch-norm running variance is negative"
    remedy = "The statistics are damaged; recompute them or upload an earlier checkpoint."


class RecognitionError(FoldserveError):
    """Base of what is wrong with a state dict, or with what `config` says of it."""

    title = "The network was not recognised"
    remedy = "Name the architecture in `config`, or upload a bundle made by `foldserve pack`."


class UnknownArchitecture(RecognitionError):
    """No family's signature is among the keys; `keys` are the first fifty of them."""

    title = "No known architecture has these keys"


class LanguageModel(UnknownArchitecture):
    """Unknown keys, among them word vectors and attention or a head over words."""

    title = "The weights are a language model's"
    remedy = "Serve it elsewhere: convolutional networks with branches to fold are converted here."


class MissingKeys(RecognitionError):
    """`keys` are those that the file lacks, `unexpected`, if given, those in their place."""

    title = "Keys of the architecture are missing"
    remedy = "Upload the complete state dict, saved before any conversion."


class UnexpectedKeys(RecognitionError):
    """Nothing is missing, but the file also holds `keys` (at most fifty are listed)."""

    title = "The file holds keys that the architecture does not have"
    remedy = "Remove the named keys, or name the right architecture in `config`."


class ShapeMismatch(RecognitionError):
    """`keys` are the tensors at fault; `expected` and `found`, if given, the first one's shapes."""

    title = "A tensor has a shape that the architecture cannot have"
    remedy = (
        "Check that the file belongs to the architecture; name it in `config` if it was misread."
    )


class MixedForm(RecognitionError):
    """Some `keys` exist in the training form alone and some in the deploy form alone."""

    title = "The file is half converted"
    remedy = "Upload the training checkpoint from before the conversion, or a wholly converted one."


class InvalidConfig(RecognitionError):
    """A value of `config` is impossible or contradicts the weights; `field`, if given, names it."""

    title = "The config is not valid"
    remedy = "Correct the named field; the OpenAPI page lists what config may hold."


class UnsafeLabel(InvalidConfig):
    """A label with control, line-separating or text-direction characters; `field` says which."""

    title = "A label is not safe to show"
    remedy = "Write labels without control or text-direction characters."


class GraphError(FoldserveError):
    """Base of what is wrong with a program: a bundle, a .pt2 archive, or a traced module."""

    title = "The program cannot be used"
    remedy = "Make it again with `foldserve pack` of this version."


class UnsupportedOperator(GraphError):
    """`operator` is a call that the allow-list does not have, or not with these arguments."""

    title = "The program uses an operator that is not allowed"
    remedy = (
        "Rewrite that part of the network with allowed operators; the detail names the operator."
    )


class InvalidProgram(GraphError):
    """The parts of a program contradict each other, or a module cannot be traced into one."""

    title = "The program is malformed"


class PickledTensor(InvalidProgram):
    """A tensor of a .pt2 archive is not declared as raw bytes (`use_pickle` false)."""

    title = "A tensor of the program is stored as a pickle, which is never loaded"
    remedy = "Export the module with plain tensors instead of tensor subclasses."


class UnexpectedEntry(InvalidProgram):
    """`entry` is the first name in a .pt2 archive beside the graph and raw tensors."""

    title = "The archive holds more than a plain export"
    remedy = (
        "Save it again with torch 2.13: torch.export.save(program, path), without extra files, "
        "compiled libraries, custom objects or tensor subclasses."
    )


class FusionError(FoldserveError):
    """The engine cannot write the fused program, or finds no single layer that a block equals."""

    title = "The network could not be fused"
    remedy = "Report this together with the fusion report: the engine should refuse, never fail."


class CertificateFailed(FusionError):
    """What would be served deviates from its source by more than the certificate's limits.

    Raised about a conversion and about a backend's precision; the numbers that failed are its
    facts.
    """

    title = "The network that would be served is not equal to the uploaded one"
    remedy = "Nothing was published. The numbers say where it differs; please report them."


class ExportError(FoldserveError):
    """Base of what keeps a ready version's deploy form from becoming another engine's file."""

    title = "The deploy form could not be exported"
    remedy = "Ask for safetensors, pth or bundle, which every version that serves has."


class FormatNotInstalled(ExportError):
    """A Python package that the format needs is missing; the remedy names the extra that has it."""

    title = "What this format needs is not installed"
    remedy = "Install the extra of that name, or ask for safetensors, pth or bundle."


class ExportFailed(ExportError):
    """The converter failed or left no file, or its file gives other outputs than the program."""

    title = "The network cannot be exported to this format"


class ConversionError(FoldserveError):
    """Base of what ends the child process of a conversion or an export without a result."""

    title = "The conversion did not finish"
    remedy = "Upload again; if it happens again, report the version's events."


class ConversionTimeout(ConversionError):
    """The child ran longer than its wall-clock or its processor time allows, and was ended."""

    title = "The conversion took too long"
    remedy = "Raise FOLDSERVE_CONVERSION_SECONDS for a network of this size."


class ConversionOutOfMemory(ConversionError):
    """The child outgrew its memory limit, or memory ran out when the result was to be loaded."""

    title = "The conversion ran out of memory"
    remedy = "Raise FOLDSERVE_CONVERSION_MEMORY_BYTES, or convert on a larger machine."


class ConversionCrashed(ConversionError):
    """The child died, raised something unforeseen, overfilled its folder, or sent nonsense."""

    title = "The conversion process died"


class ConversionInterrupted(ConversionError):
    """The conversion was cancelled, or given up after `attempts` that a restart interrupted."""

    title = "The service stopped during the conversion"
    remedy = "Upload the same file again; its bytes are still stored."


class StoreError(FoldserveError):
    """Base of what the catalog and the blob store refuse; itself, that disk or database failed."""

    title = "The store refused"


class ModelNotFound(StoreError):
    """The catalog has no model of that name, or it was deleted."""

    title = "There is no such model"
    remedy = "List the models with GET /v1/models."


class VersionNotFound(StoreError):
    """The model has no version of that number, or it was deleted."""

    title = "There is no such version"
    remedy = "List the model's versions with GET /v1/models/{name}."


class NameInvalid(StoreError):
    """The name does not match `[a-z0-9][a-z0-9._-]{0,62}`; the catalog was not asked."""

    title = "The model name is not valid"
    remedy = "Use 1 to 63 characters: a-z, 0-9, '.', '_' and '-', starting with a letter or digit."


class VersionNotReady(StoreError):
    """Something was asked for that only a ready version has; `state`, if given, is its own."""

    title = "The version is not ready"
    remedy = "Wait until its state is `ready`; if it is `rejected`, its `error` says why."


class ModelUnloaded(StoreError):
    """The model was unloaded by hand, until it is loaded or the service starts again."""

    title = "The model was taken out of serving"
    remedy = "Serve it again with POST /v2/repository/models/{name}/load."


class Conflict(StoreError):
    """The present state forbids the change, as when another worker took the version up."""

    title = "That conflicts with the present state"
    remedy = "Read the resource again and repeat the request if it still applies."


class FormNotAvailable(StoreError):
    """The version has no artifact or program of the form asked for."""

    title = "The version has no such form"
    remedy = "A checkpoint uploaded in deploy form has no training form."


class NotServable(StoreError):
    """The version was converted block by block and has no program, so that nothing can run it."""

    title = "The version can be downloaded, but not served"
    remedy = (
        "Its blocks were converted, but the checkpoint does not say how they are wired. Upload a "
        "bundle of the whole network, made by `foldserve pack`."
    )


class UploadTooLarge(StoreError):
    """The body is longer than `limit` bytes, as its head says or as they were counted."""

    title = "The upload is too large"
    remedy = "Raise FOLDSERVE_MAX_UPLOAD_BYTES if files of this size are expected."


class StorageFull(StoreError):
    """The disk, a quota or the database had no room left for what was being written."""

    title = "The disk is full"
    remedy = "Free space or grow the volume; the request can then be repeated."


class BlobCorrupt(StoreError):
    """A blob is missing, or has the wrong length or hash; `sha256`, if given, is its name."""

    title = "Stored bytes do not match their hash"
    remedy = "Restore the blob from a backup, or upload the checkpoint again."


class AccessError(FoldserveError):
    """Base of what is refused before a route is reached, and of what concerns API keys."""

    title = "The request is not let in"


class Unauthorized(AccessError):
    """No API key was sent where one is needed, or it is unknown, revoked or expired."""

    title = "The request carries no valid API key"
    remedy = "Send `Authorization: Bearer KEY`; `foldserve keys create` makes keys."


class Forbidden(AccessError):
    """The API key has none of the scopes in `required`, one of which the request needs."""

    title = "The API key does not allow that"
    remedy = "Use a key with the named scope; `foldserve keys create` makes keys."


class RateLimited(AccessError):
    """The caller's token bucket is empty; in `retry_after` seconds it holds a token again."""

    title = "Too many requests from this key or address"
    remedy = "Repeat the request after the time in Retry-After."


class HostNotAllowed(AccessError):
    """`Host` is a dotted name that is not listed, by which a rebound DNS name could have come."""

    title = "The service does not answer to this host name"
    remedy = "If the name is right, list it in FOLDSERVE_ALLOWED_HOSTS."


class OriginNotAllowed(AccessError):
    """A browser says that another site's page sends a request that may change something."""

    title = "Pages of another site may not change anything here"
    remedy = "If the site is trusted, list its origin in FOLDSERVE_CORS_ORIGINS."


class UrlTooLong(AccessError):
    """Path and query together have more bytes than FOLDSERVE_MAX_URL_BYTES."""

    title = "The address of the request is too long"
    remedy = "Send large values in the body, or raise FOLDSERVE_MAX_URL_BYTES."


class HeadTooLarge(AccessError):
    """A request's address and headers have too many bytes or fields; the connection ends."""

    title = "The headers of the request are too large or too many"
    remedy = "Send fewer headers, or raise FOLDSERVE_MAX_HEAD_BYTES or FOLDSERVE_MAX_HEADERS."


class KeyNotFound(AccessError):
    """No key, revoked ones included, has the id that was to be revoked."""

    title = "There is no such API key"
    remedy = "List the keys with `foldserve keys list`."


class ServingError(FoldserveError):
    """Base of what keeps one request from its answer."""

    title = "The request could not be served"


class BadInput(ServingError):
    """The request is not what route or model take: shape, type, JSON, image or parameter."""

    title = "The input does not fit the model"
    remedy = "Send the shape and type that the model's resource states."


class UnsupportedMediaType(ServingError):
    """`Content-Type` or `Content-Encoding` names a kind of body that the route does not read."""

    title = "The content type is not accepted here"
    remedy = "Send one of the content types that the route's documentation lists."


class ImageTooLarge(ServingError):
    """The image has more pixels, or the JPEG more scans, than are decoded (`limit`, if given)."""

    title = "The image has too many pixels"
    remedy = "Scale the image down, or raise FOLDSERVE_MAX_IMAGE_PIXELS."


class RequestStalled(ServingError):
    """A request's head or body came more slowly than the limits allow."""

    title = "The request stopped sending"
    remedy = "Send it again over a connection that does not pause for so long."


class QueueFull(ServingError):
    """The queue has no room for the request's rows; in `retry_after` seconds it is expected to."""

    title = "The model's queue is full"
    remedy = "Repeat the request after the time in Retry-After."


class DeadlineExceeded(ServingError):
    """The rows were not computed by their deadline, or a client's wait for a conversion ran out."""

    title = "The request waited too long"
    remedy = "Repeat it, or raise FOLDSERVE_REQUEST_SECONDS."


class BackendFailed(ServingError):
    """A backend cannot prepare the program as asked, or computing a request's own rows failed."""

    title = "The model failed on this input"


class ModelFaulty(ServingError):
    """The program fails on rows of the service's own, so that no request is to blame for it.

    `retry_after` (s) is the time until it is expected to have been loaded again.
    """

    title = "The model or its device is out of order"
    remedy = "It is being loaded again; repeat the request after the time in Retry-After."


class DeviceLost(ModelFaulty):
    """Nothing can be computed on `device` in this process any more, so that it starts itself anew.

    Requests for what was loaded there answer `model_faulty`.
    """

    title = "The device is lost"
    remedy = "The service starts itself anew; repeat the request after the time in Retry-After."


class NotLoaded(ServingError):
    """What should answer is not in memory: it was unloaded meanwhile, or the service stops."""

    title = "The model is not loaded"
    remedy = "Wait until /health/ready answers 200."


_OUT_OF_MEMORY = ("allocate memory", "enough memory", "bad_alloc", "start new thread")


def out_of_memory(error: Exception) -> bool:
    """Whether this says that the process ran out of memory, and so nothing of what it was reading.

    PyTorch has no type of its own for it: its allocator raises a RuntimeError. A thread that cannot
    be started lacks the memory for its stack.
    """
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def all_kinds(root: type[FoldserveError] = FoldserveError) -> Iterator[type[FoldserveError]]:
    """Every class of the tree below and including `root`, parents first."""
    yield root
    for child in root.__subclasses__():
        yield from all_kinds(child)


_BY_CODE = {kind.code(): kind for kind in all_kinds()}
