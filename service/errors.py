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
    └── NotLoaded

An error is a sentence for a person (`detail`), what that person can do (`remedy`), a stable `code`
for programs, and any further facts by name. It survives JSON both ways, because conversions fail in
a child process and are remembered in the catalog.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

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


class CheckpointError(FoldserveError):
    title = "The file is not a checkpoint that can be read"
    remedy = "Upload a state dict saved by torch.save or as safetensors."


class EmptyFile(CheckpointError):
    title = "The file is empty"
    remedy = "Check the path that was uploaded; the file has no bytes."


class NotACheckpoint(CheckpointError):
    title = "The file is not a checkpoint"
    remedy = "Upload a .safetensors file, or a .pth/.pt/.pth.tar written by torch.save(state_dict)."


class PolyglotFile(NotACheckpoint):
    title = "The file is more than one file"
    remedy = "Upload the checkpoint as it was saved, with nothing before, after or inside it."


class DuplicateKey(NotACheckpoint):
    title = "The file names something twice"
    remedy = "Save the checkpoint again; no library writes a name twice."


class OverlappingTensors(NotACheckpoint):
    title = "Tensors of the file overlap"
    remedy = "Save the file again with the safetensors library, which gives each tensor its bytes."


class ChecksumMismatch(NotACheckpoint):
    title = "The file was damaged on its way"
    remedy = "Copy the file again from where it was saved."


class UnsafeName(NotACheckpoint):
    title = "A name in the file is not safe to show or to use"
    remedy = (
        "Rename it: no control or text-direction characters, no backslashes, no path that leaves "
        "its folder."
    )


class TruncatedFile(CheckpointError):
    title = "The file ends too early"
    remedy = (
        "The transfer or the copy was cut short; compare sizes with the original and upload again."
    )


class TensorOutOfRange(CheckpointError):
    title = "A tensor lies outside the bytes that the file has for it"
    remedy = "The file is damaged or forged; upload the original."


class UnsafePickle(CheckpointError):
    title = "The pickle asks for code that is never run here"
    remedy = "Save the weights alone: torch.save(model.state_dict(), path), or use safetensors."


class WholeModulePickle(UnsafePickle):
    title = "The file is a pickled module, not a state dict"
    remedy = (
        "Save model.state_dict() instead of the model, or pack the module with `foldserve pack`."
    )


class UnsupportedContainer(CheckpointError):
    title = "This file format is not read"
    remedy = "Convert it to safetensors or to a torch.save state dict."


class TorchScriptArchive(UnsupportedContainer):
    title = "The file is a TorchScript archive, which holds code"
    remedy = (
        "Load it where you trust it and save the weights alone: "
        "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')."
    )


class CompressedArchive(UnsupportedContainer):
    title = "The archive is compressed or encrypted"
    remedy = "Upload the file as torch.save wrote it."


class ExternalReference(UnsupportedContainer):
    title = "The file refers to other files"
    remedy = "Write each array into the file itself."


class FilteredDataset(UnsupportedContainer):
    title = "A dataset of the file is chunked or filtered"
    remedy = "Write each array plainly: file.create_dataset(name, data=array), nothing else."


class LimitExceeded(CheckpointError):
    title = "The file exceeds a limit of the reader"
    remedy = "If the file is legitimate, raise the setting that the detail names."


class ArchiveBomb(LimitExceeded):
    title = "The archive expands beyond its own size"


class HeaderTooLarge(LimitExceeded):
    title = "The file's header is too large"


class PickleBomb(LimitExceeded):
    title = "The pickle asks for too much work or memory"


class NestingTooDeep(LimitExceeded):
    title = "The file is nested too deeply"
    remedy = "Save a flat state dict: names to tensors."


class StrideBomb(LimitExceeded):
    title = "A tensor repeats its elements beyond the limit"
    remedy = (
        "Save the tensor's elements once: tensor.contiguous(), or the part that is not repeated."
    )


class AliasBomb(LimitExceeded):
    title = "Tensors share their bytes beyond the limit"
    remedy = "Save each tensor with bytes of its own: {key: t.clone() for key, t in state.items()}."


class NoStateDict(CheckpointError):
    title = "No state dict was found in the file"
    remedy = "Save a mapping from names to tensors, bare or under `state_dict`, `model` or `ema`."


class OptimizerOnly(NoStateDict):
    title = "The file holds an optimizer's state and no weights"
    remedy = "Upload the model's own state dict: torch.save(model.state_dict(), path)."


class NonFiniteWeights(CheckpointError):
    title = "The weights hold NaN or infinity"
    remedy = "The training run diverged or the file is damaged; upload an earlier checkpoint."


class NegativeVariance(CheckpointError):
    title = "A batch-norm running variance is negative"
    remedy = "The statistics are damaged; recompute them or upload an earlier checkpoint."


class RecognitionError(FoldserveError):
    title = "The network was not recognised"
    remedy = "Name the architecture in `config`, or upload a bundle made by `foldserve pack`."


class UnknownArchitecture(RecognitionError):
    title = "No known architecture has these keys"


class LanguageModel(UnknownArchitecture):
    title = "The weights are a language model's"
    remedy = "Serve it elsewhere: convolutional networks with branches to fold are converted here."


class MissingKeys(RecognitionError):
    title = "Keys of the architecture are missing"
    remedy = "Upload the complete state dict, saved before any conversion."


class UnexpectedKeys(RecognitionError):
    title = "The file holds keys that the architecture does not have"
    remedy = "Remove the named keys, or name the right architecture in `config`."


class ShapeMismatch(RecognitionError):
    title = "A tensor has a shape that the architecture cannot have"
    remedy = (
        "Check that the file belongs to the architecture; name it in `config` if it was misread."
    )


class MixedForm(RecognitionError):
    title = "The file is half converted"
    remedy = "Upload the training checkpoint from before the conversion, or a wholly converted one."


class InvalidConfig(RecognitionError):
    title = "The config is not valid"
    remedy = "Correct the named field; the OpenAPI page lists what config may hold."


class UnsafeLabel(InvalidConfig):
    title = "A label is not safe to show"
    remedy = "Write labels without control or text-direction characters."


class GraphError(FoldserveError):
    title = "The program cannot be used"
    remedy = "Make it again with `foldserve pack` of this version."


class UnsupportedOperator(GraphError):
    title = "The program uses an operator that is not allowed"
    remedy = (
        "Rewrite that part of the network with allowed operators; the detail names the operator."
    )


class InvalidProgram(GraphError):
    title = "The program is malformed"


class PickledTensor(InvalidProgram):
    title = "A tensor of the program is stored as a pickle, which is never loaded"
    remedy = "Export the module with plain tensors instead of tensor subclasses."


class UnexpectedEntry(InvalidProgram):
    title = "The archive holds more than a plain export"
    remedy = (
        "Save it again with torch 2.13: torch.export.save(program, path), without extra files, "
        "compiled libraries, custom objects or tensor subclasses."
    )


class FusionError(FoldserveError):
    title = "The network could not be fused"
    remedy = "Report this together with the fusion report: the engine should refuse, never fail."


class CertificateFailed(FusionError):
    title = "The network that would be served is not equal to the uploaded one"
    remedy = "Nothing was published. The numbers say where it differs; please report them."


class ExportError(FoldserveError):
    title = "The deploy form could not be exported"
    remedy = "Ask for safetensors, pth or bundle, which every version that serves has."


class FormatNotInstalled(ExportError):
    title = "What this format needs is not installed"
    remedy = "Install the extra of that name, or ask for safetensors, pth or bundle."


class ExportFailed(ExportError):
    title = "The network cannot be exported to this format"


class ConversionError(FoldserveError):
    title = "The conversion did not finish"
    remedy = "Upload again; if it happens again, report the version's events."


class ConversionTimeout(ConversionError):
    title = "The conversion took too long"
    remedy = "Raise FOLDSERVE_CONVERSION_SECONDS for a network of this size."


class ConversionOutOfMemory(ConversionError):
    title = "The conversion ran out of memory"
    remedy = "Raise FOLDSERVE_CONVERSION_MEMORY_BYTES, or convert on a larger machine."


class ConversionCrashed(ConversionError):
    title = "The conversion process died"


class ConversionInterrupted(ConversionError):
    title = "The service stopped during the conversion"
    remedy = "Upload the same file again; its bytes are still stored."


class StoreError(FoldserveError):
    title = "The store refused"


class ModelNotFound(StoreError):
    title = "There is no such model"
    remedy = "List the models with GET /v1/models."


class VersionNotFound(StoreError):
    title = "There is no such version"
    remedy = "List the model's versions with GET /v1/models/{name}."


class NameInvalid(StoreError):
    title = "The model name is not valid"
    remedy = "Use 1 to 63 characters: a-z, 0-9, '.', '_' and '-', starting with a letter or digit."


class VersionNotReady(StoreError):
    title = "The version is not ready"
    remedy = "Wait until its state is `ready`; if it is `rejected`, its `error` says why."


class ModelUnloaded(StoreError):
    title = "The model was taken out of serving"
    remedy = "Serve it again with POST /v2/repository/models/{name}/load."


class Conflict(StoreError):
    title = "That conflicts with the present state"
    remedy = "Read the resource again and repeat the request if it still applies."


class FormNotAvailable(StoreError):
    title = "The version has no such form"
    remedy = "A checkpoint uploaded in deploy form has no training form."


class NotServable(StoreError):
    title = "The version can be downloaded, but not served"
    remedy = (
        "Its blocks were converted, but the checkpoint does not say how they are wired. Upload a "
        "bundle of the whole network, made by `foldserve pack`."
    )


class UploadTooLarge(StoreError):
    title = "The upload is too large"
    remedy = "Raise FOLDSERVE_MAX_UPLOAD_BYTES if files of this size are expected."


class StorageFull(StoreError):
    title = "The disk is full"
    remedy = "Free space or grow the volume; the request can then be repeated."


class BlobCorrupt(StoreError):
    title = "Stored bytes do not match their hash"
    remedy = "Restore the blob from a backup, or upload the checkpoint again."


class AccessError(FoldserveError):
    title = "The request is not let in"


class Unauthorized(AccessError):
    title = "The request carries no valid API key"
    remedy = "Send `Authorization: Bearer KEY`; `foldserve keys create` makes keys."


class Forbidden(AccessError):
    title = "The API key does not allow that"
    remedy = "Use a key with the named scope; `foldserve keys create` makes keys."


class RateLimited(AccessError):
    title = "Too many requests from this key or address"
    remedy = "Repeat the request after the time in Retry-After."


class HostNotAllowed(AccessError):
    title = "The service does not answer to this host name"
    remedy = "If the name is right, list it in FOLDSERVE_ALLOWED_HOSTS."


class OriginNotAllowed(AccessError):
    title = "Pages of another site may not change anything here"
    remedy = "If the site is trusted, list its origin in FOLDSERVE_CORS_ORIGINS."


class UrlTooLong(AccessError):
    title = "The address of the request is too long"
    remedy = "Send large values in the body, or raise FOLDSERVE_MAX_URL_BYTES."


class HeadTooLarge(AccessError):
    title = "The headers of the request are too large or too many"
    remedy = "Send fewer headers, or raise FOLDSERVE_MAX_HEAD_BYTES or FOLDSERVE_MAX_HEADERS."


class KeyNotFound(AccessError):
    title = "There is no such API key"
    remedy = "List the keys with `foldserve keys list`."


class ServingError(FoldserveError):
    title = "The request could not be served"


class BadInput(ServingError):
    title = "The input does not fit the model"
    remedy = "Send the shape and type that the model's resource states."


class UnsupportedMediaType(ServingError):
    title = "The content type is not accepted here"
    remedy = "Send one of the content types that the route's documentation lists."


class ImageTooLarge(ServingError):
    title = "The image has too many pixels"
    remedy = "Scale the image down, or raise FOLDSERVE_MAX_IMAGE_PIXELS."


class RequestStalled(ServingError):
    title = "The request stopped sending"
    remedy = "Send it again over a connection that does not pause for so long."


class QueueFull(ServingError):
    title = "The model's queue is full"
    remedy = "Repeat the request after the time in Retry-After."


class DeadlineExceeded(ServingError):
    title = "The request waited too long"
    remedy = "Repeat it, or raise FOLDSERVE_REQUEST_SECONDS."


class BackendFailed(ServingError):
    title = "The model failed on this input"


class ModelFaulty(ServingError):
    title = "The model or its device is out of order"
    remedy = "It is being loaded again; repeat the request after the time in Retry-After."


class NotLoaded(ServingError):
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
