"""From a state dict to a network: which family, which hyper-parameters, which form, and why.

A family reads its hyper-parameters from the shapes; then the network is laid out without storage
(on the meta device) and its keys and shapes are compared with the file's, in training and in deploy
form. So every refusal names keys, and no family has to check its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn

from service.errors import (
    InvalidConfig,
    LanguageModel,
    MissingKeys,
    MixedForm,
    RecognitionError,
    ShapeMismatch,
    UnexpectedKeys,
    UnknownArchitecture,
    out_of_memory,
)
from service.networks import foreign
from service.networks.base import deploy_skeleton
from service.networks.config import ModelConfig, Requested
from service.networks.dialects import Renaming, renamed, translate
from service.networks.family import Family, Values
from service.networks.keys import Keys, Shape, show
from service.networks.table import FAMILIES

Form = Literal["train", "deploy"]
_BOOKKEEPING = re.compile(r"(^|\.)(num_batches_tracked|total_ops|total_params)$")
"""Counters of batch norm (absent from old files) and of profilers: they never change an output."""
_WORDS = re.compile(
    r"(^|\.)(wte|embed_tokens|tok_embeddings|word_embeddings|token_embedding|shared|embed_in)\.weight$"
)
_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|SelfAttention|lm_head)([._]|$)")
_SHOWN = 6


@dataclass(frozen=True)
class Recognition:
    """What a state dict is: enough to build it, and the reasons for believing so.

    `network` is the row of the table that builds it from `hyperparameters`; `name` is for people.
    `evidence` and `assumed` are sentences; `dropped` are keys of the file that are left out.
    """

    family: str
    network: str
    name: str
    form: Form
    hyperparameters: Values
    num_classes: int | None
    input_shape: tuple[int, ...]
    evidence: tuple[str, ...]
    assumed: tuple[str, ...]
    dropped: tuple[str, ...]
    renaming: Renaming = field(default_factory=Renaming)

    @property
    def foreign(self) -> bool:
        """Whether another library builds the network, so that it has no deploy form of its own."""
        return foreign.is_foreign(self.network)

    def public_key(self, key: str) -> str:
        """The name of one of the built network's keys in the project the file came from."""
        return self.renaming.theirs(key)


def recognise(state: Mapping[str, Tensor], config: ModelConfig | None = None) -> Recognition:
    """Tell which network a state dict belongs to, from its keys and shapes and the config.

    Raises UnknownArchitecture (LanguageModel when it is one), MissingKeys, UnexpectedKeys,
    ShapeMismatch, MixedForm (each with the keys in `keys`) or InvalidConfig.
    """
    config = config or ModelConfig()
    own = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if foreign.is_foreign(config.requested().name):
        return _recognise_foreign(own, config)
    project, renaming = translate(Keys(own))
    names = renamed(own, renaming)
    shapes = {names[key]: shape for key, shape in own.items()}
    try:
        recognition = _recognise(shapes, config)
    except RecognitionError as error:
        raise _in_their_words(error, renaming) from None
    if project is None:
        return recognition
    theirs = {ours: key for key, ours in names.items()}
    return replace(
        recognition,
        evidence=(f"The keys are {project}'s names of this network.", *recognition.evidence),
        dropped=tuple(theirs[key] for key in recognition.dropped),
        renaming=renaming,
    )


def _recognise(shapes: Mapping[str, Shape], config: ModelConfig) -> Recognition:
    keys = Keys(shapes)
    requested = config.requested()
    family, published = _choose(keys, requested)
    hints = dict(requested.values)
    unknown = set(hints) - set(family.parameters())
    if unknown:
        raise _unknown_value(family, min(unknown))
    if config.input_shape:
        hints.setdefault("in_channels", config.input_shape[0])
    reading = family.read(keys, hints)
    values = {**reading.values, **requested.values}
    if published is not None:
        head = {k: v for k, v in values.items() if k in ("num_classes", "in_channels")}
        values = {**published, **head, **requested.values}
    values = family.complete(values)
    _agree(family, config, values, reading.size)
    dropped = tuple(key for key in shapes if family.dropped and family.dropped.search(key))
    network = _lay_out(family, values, requested=bool(requested.values))
    form = _compare(family, network, {k: s for k, s in shapes.items() if k not in set(dropped)})
    shape = config.input_shape or family.input_shape(_channels(values), reading.size)
    told = tuple(s for s in reading.assumed if not _fixed(s, requested.values))
    if config.input_shape is None and reading.size is None:
        told = (*told, f"The input is taken to be {show(shape)}.")
    return Recognition(
        family=family.family,
        network=family.network,
        name=_name(family, values),
        form=form,
        hyperparameters=values,
        num_classes=values.get("num_classes"),
        input_shape=shape,
        evidence=reading.evidence,
        assumed=told,
        dropped=dropped,
    )


def _recognise_foreign(shapes: Mapping[str, Shape], config: ModelConfig) -> Recognition:
    """A network of another library, which the config names: its keys must be the file's."""
    requested = config.requested()
    name = str(requested.name)
    network = foreign.create(name, requested.values)
    _check(name, {key: tuple(t.shape) for key, t in network.state_dict().items()}, shapes)
    classes, shape = foreign.classes_of(network), foreign.input_shape_of(network)
    _agree_on_labels(config, classes)
    assumed = () if config.input_shape or shape else ("The input is taken to be 3x224x224.",)
    return Recognition(
        family="timm",
        network=name,
        name=name,
        form="train",
        hyperparameters=dict(requested.values),
        num_classes=classes,
        input_shape=config.input_shape or shape or (3, 224, 224),
        evidence=(f"The config names {name}, whose keys and shapes are the file's.",),
        assumed=assumed,
        dropped=(),
    )


def build(recognition: Recognition, state: Mapping[str, Tensor]) -> nn.Module:
    """The recognised network in evaluation mode and float32, holding the weights of `state`.

    Half and double precision are converted. Raises MissingKeys, UnexpectedKeys or ShapeMismatch
    when `state` is not the one that was recognised.
    """
    module = _made(recognition)
    if recognition.form == "deploy":
        module = deploy_skeleton(module)
    own = module.state_dict()
    kept = {key: tensor for key, tensor in state.items() if key not in recognition.dropped}
    names = renamed(kept, recognition.renaming)
    wanted = {names[key]: tensor for key, tensor in kept.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    own_shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    _check(recognition.network, own_shapes, shapes)
    for key in own:
        if _BOOKKEEPING.search(key):
            wanted.setdefault(key, own[key])
    module.load_state_dict({key: wanted[key].reshape(own[key].shape) for key in own})
    return module.float().eval()


def _made(recognition: Recognition) -> nn.Module:
    if recognition.foreign:
        return foreign.create(recognition.network, recognition.hyperparameters)
    family = next(row for row in FAMILIES if row.network == recognition.network)
    return family.make(**recognition.hyperparameters)


def bare_blocks(state: Mapping[str, Tensor]) -> str | None:
    """The name of the bare block class whose signature `state` has, if any."""
    keys = Keys({key: tuple(tensor.shape) for key, tensor in state.items()})
    rows = (row for row in FAMILIES if row.bare and row.claims(keys))
    return next((row.network for row in rows), None)


def known_names() -> list[str]:
    """Every name that `config.architecture` may give."""
    return sorted({name for row in FAMILIES for name in (row.network, *row.named)})


def make_network(name: str, **values: Any) -> nn.Module:
    """A network or block of the table by its name, with fresh weights, ready to be trained.

    `values` are its constructor's, beyond or in place of the published ones. Raises InvalidConfig
    for an unknown name or values that fit no such network.
    """
    family, published = _named(name)
    complete = {**(published or {}), **values}
    unknown = set(complete) - set(family.parameters())
    if unknown:
        raise _unknown_value(family, min(unknown))
    try:
        return family.make(**complete)
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidConfig(f"No {name} has the values {_brief(complete)}: {error}.") from error


def _choose(keys: Keys, requested: Requested) -> tuple[Family, Values | None]:
    """The family to read with, and the published values if a published network was named."""
    if requested.name is not None:
        return _named(requested.name)
    for row in FAMILIES:
        if row.claims(keys):
            return row, None
    kind, what = UnknownArchitecture, "None"
    if _is_language_model(keys.shapes):
        kind, what = LanguageModel, "This is a language model: none"
    raise kind(
        f"{what} of the {len(keys.shapes)} keys belongs to a known re-parameterizable network; "
        f"they begin with {_list(keys.shapes)}.",
        keys=list(keys.shapes)[:50],
    )


def _named(wanted: str) -> tuple[Family, Values | None]:
    """The family that has this name, and the published values where one of those has it."""
    for row in FAMILIES:
        if row.network.lower() == wanted.lower():
            return row, None
        for name, values in row.named.items():
            if name.lower() == wanted.lower():
                return row, values
    close = get_close_matches(wanted, known_names(), n=3, cutoff=0.4)
    raise InvalidConfig(
        f"`architecture` is {wanted[:80]!r}, which names no known network.",
        remedy=f"Did you mean {' or '.join(close)}?" if close else "Leave it out, or see docs.",
        field="architecture",
    )


def _unknown_value(family: Family, name: str) -> InvalidConfig:
    return InvalidConfig(
        f"`architecture.{name}` is not a value of {family.network}.",
        remedy=f"It has {', '.join(f'`{known}`' for known in family.parameters())}.",
        field=f"architecture.{name}",
    )


def _is_language_model(shapes: Mapping[str, Shape]) -> bool:
    """A table of word vectors beside attention or a head over words, and no kernel of an image."""
    tables = [
        shape
        for key, shape in shapes.items()
        if _WORDS.search(key) and len(shape) == 2 and shape[0] > shape[1]
    ]
    images = any(len(shape) > 3 for shape in shapes.values())
    return bool(tables) and not images and any(map(_ATTENTION.search, shapes))


def _lay_out(family: Family, values: Values, *, requested: bool) -> nn.Module:
    try:
        with torch.device("meta"):
            return family.make(**values)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError, ArithmeticError) as error:
        if out_of_memory(error):
            raise
        kind = InvalidConfig if requested else ShapeMismatch
        raise kind(
            f"No {family.network} has the values {_brief(values)}: {error}.",
            remedy="Correct `architecture` in config, or check that the checkpoint is undamaged.",
            field="architecture",
        ) from None


def _channels(values: Values) -> int:
    """The channels that enter a network or block of these constructor values."""
    return int(values.get("in_channels") or values.get("channels") or 3)


def _agree(family: Family, config: ModelConfig, values: Values, size: int | None) -> None:
    """Raise InvalidConfig where input shape or labels contradict what the shapes told."""
    channels, classes = _channels(values), values.get("num_classes")
    rank = len(family.input_shape(channels))
    if config.input_shape and len(config.input_shape) != rank:
        raise InvalidConfig(
            f"`input_shape` has {len(config.input_shape)} axes; {family.network} takes {rank}.",
            field="input_shape",
        )
    if config.input_shape and config.input_shape[0] != channels:
        raise InvalidConfig(
            f"`input_shape` has {config.input_shape[0]} channels; the network takes {channels}.",
            field="input_shape",
        )
    if size is not None and config.input_shape and set(config.input_shape[1:]) != {size}:
        raise InvalidConfig(
            f"`input_shape` is {show(config.input_shape)}; these weights take {size}x{size} only.",
            field="input_shape",
        )
    _agree_on_labels(config, classes)


def _agree_on_labels(config: ModelConfig, classes: int | None) -> None:
    if config.labels and classes and len(config.labels) != classes:
        raise InvalidConfig(
            f"`labels` holds {len(config.labels)} names; the network has {classes} classes.",
            field="labels",
        )


def _compare(family: Family, network: nn.Module, shapes: Mapping[str, Shape]) -> Form:
    """Which form of `network` the file holds; raises when it holds neither wholly."""
    train = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    with torch.device("meta"):
        folded = deploy_skeleton(network).state_dict()
    deploy = {key: tuple(tensor.shape) for key, tensor in folded.items()}
    of_train = [key for key in shapes if key in train and key not in deploy]
    of_deploy = [key for key in shapes if key in deploy and key not in train]
    if of_train and of_deploy:
        raise MixedForm(
            f"{len(of_train)} keys belong to the training form only (such as {_list(of_train)}) "
            f"and {len(of_deploy)} to the deploy form only (such as {_list(of_deploy)}).",
            keys=[*of_deploy[:25], *of_train[:25]],
        )
    # Some deploy forms have no key of their own, only fewer.
    fewer = not of_train and any(key not in deploy for key in train)
    form: Form = "deploy" if of_deploy or fewer else "train"
    _check(family.network, deploy if form == "deploy" else train, shapes)
    return form


def _check(network: str, own: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    missing = [key for key in own if key not in found and not _BOOKKEEPING.search(key)]
    extra = [key for key in found if key not in own and not _BOOKKEEPING.search(key)]
    if missing:
        also = f" In their place it holds {_list(extra)}." if extra else ""
        raise MissingKeys(
            f"{network} of these shapes has {_list(missing)}, which the file lacks.{also}",
            keys=missing[:50],
            unexpected=extra[:50],
        )
    if extra:
        raise UnexpectedKeys(f"{network} of these shapes has no {_list(extra)}.", keys=extra[:50])
    wrong = [k for k in own if k in found and own[k] != found[k] and not _BOOKKEEPING.search(k)]
    if wrong:
        key = wrong[0]
        raise ShapeMismatch(
            f"`{key}` has shape {show(found[key])} where {network} has {show(own[key])}"
            + (f"; {len(wrong) - 1} more differ." if len(wrong) > 1 else "."),
            keys=wrong[:50],
            expected=list(own[key]),
            found=list(found[key]),
        )


def _name(family: Family, values: Values) -> str:
    def shape_of(complete: Values) -> Values:
        ignored = ("num_classes", "in_channels")
        return {k: v for k, v in complete.items() if k not in ignored}

    for name, published in family.named.items():
        if shape_of(family.complete(published)) == shape_of(values):
            return name
    return f"{family.network} (custom)" if family.named else family.network


def _fixed(sentence: str, values: Values) -> bool:
    """Whether the config fixed the value that an `assumed` sentence begins with."""
    return sentence.split(" ", 1)[0].strip("`") in values


def _in_their_words(error: RecognitionError, renaming: Renaming) -> RecognitionError:
    """The same refusal with every key as the file spells it."""
    if not renaming.pairs:
        return error
    detail = re.sub(r"`([^`]+)`", lambda match: f"`{renaming.theirs(match[1])}`", error.detail)
    extra = dict(error.extra)
    for name in ("keys", "unexpected"):
        if name in extra:
            extra[name] = [renaming.theirs(key) for key in extra[name]]
    return type(error)(detail, remedy=error.remedy, **extra)


def _list(keys: Iterable[str]) -> str:
    keys = list(keys)
    shown = ", ".join(f"`{key}`" for key in keys[:_SHOWN])
    return f"{shown} and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else shown


def _brief(values: Mapping[str, Any]) -> str:
    text = ", ".join(f"{key}={value}" for key, value in values.items())
    return text if len(text) <= 300 else text[:300] + "..."
