"""Key names of other projects for the same networks, and how they translate.

timm and mmpretrain hold RepVGG, MobileOne, FastViT, ... under names of their own. Their checkpoints
are read, refused and given back under their own names; inside, they become the networks here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from service.networks.keys import Keys

Pair = tuple[str, str]


@dataclass(frozen=True)
class Renaming:
    """A two-way translation of keys, as pairs of (theirs, ours).

    Of the pairs that do not begin with a dot, the first that begins a key replaces that beginning.
    Those that begin and end with a dot replace a whole name anywhere inside the key, all of them in
    order. Back again, the same in reverse.
    """

    pairs: tuple[Pair, ...] = ()

    def ours(self, key: str) -> str:
        """The key of the network here for a key of the other project."""
        return self._apply(key, self.pairs)

    def theirs(self, key: str) -> str:
        """The other project's key for a key of the network here."""
        return self._apply(key, [(ours, theirs) for theirs, ours in reversed(self.pairs)])

    @staticmethod
    def _apply(key: str, pairs: Iterable[Pair]) -> str:
        pairs, key = list(pairs), f"{key}."  # the dot lets the last name be a whole name too
        # Longer beginnings first, so that the order of going back does not matter.
        starts = sorted((p for p in pairs if not p[0].startswith(".")), key=lambda p: -len(p[0]))
        for old, new in starts:
            if key.startswith(old):
                key = new + key[len(old) :]
                break
        for old, new in pairs:
            if old.startswith("."):
                key = key.replace(old, new)
        return key[:-1]


@dataclass(frozen=True)
class Dialect:
    """One project's names of one network.

    `claims` tells from all keys whether they are in this dialect; `pairs` gives the translation,
    which may depend on which stages exist.
    """

    name: str
    claims: Callable[[Keys], bool]
    pairs: Callable[[Keys], tuple[Pair, ...]]


def translate(keys: Keys) -> tuple[str | None, Renaming]:
    """The dialect of `keys`, if it is another project's, and its translation."""
    for dialect in DIALECTS:
        if dialect.claims(keys):
            return dialect.name, Renaming(dialect.pairs(keys))
    return None, Renaming()


def renamed(shapes: Mapping[str, object], renaming: Renaming) -> dict[str, str]:
    """Their key -> ours. Keys that would meet under one name keep their own, to be refused."""
    names = {key: renaming.ours(key) for key in shapes}
    counts: dict[str, int] = {}
    for name in names.values():
        counts[name] = counts.get(name, 0) + 1
    return {key: name if counts[name] == 1 else key for key, name in names.items()}


def _matches(*patterns: str) -> Callable[[Keys], bool]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda keys: any(p.search(key) for p in compiled for key in keys.shapes)


def _timm_stages(keys: Keys) -> tuple[Pair, ...]:
    count = keys.count("stages.")
    return tuple((f"stages.{i}.", f"stage{i + 1}.") for i in range(count))


def _is_timm_repvgg(keys: Keys) -> bool:
    if _matches(r"^stages\.[0-9]+\.[0-9]+\.conv_1x1\.")(keys):
        return True
    # Folded, RepVGG differs from MobileOne by having a dense 3x3 kernel in every layer.
    second = keys.shapes.get("stages.0.0.reparam_conv.weight", ())
    return len(second) == 4 and second[1] > 1


def _timm_repvgg(keys: Keys) -> tuple[Pair, ...]:
    return (
        ("stem.", "stage0."),
        *_timm_stages(keys),
        ("head.fc.", "linear."),
        (".conv_kxk.", ".rbr_dense."),
        (".conv_1x1.", ".rbr_1x1."),
        (".identity.", ".rbr_identity."),
        (".attn.fc1.", ".se.down."),
        (".attn.fc2.", ".se.up."),
        (".reparam_conv.", ".rbr_reparam."),
    )


def _timm_mobileone(keys: Keys) -> tuple[Pair, ...]:
    return (
        ("stem.", "stage0."),
        *_timm_stages(keys),
        ("head.fc.", "linear."),
        (".conv_kxk.", ".rbr_conv."),
        (".conv_scale.", ".rbr_scale."),
        (".identity.", ".rbr_skip."),
        (".attn.fc1.", ".se.reduce."),
        (".attn.fc2.", ".se.expand."),
    )


def _timm_fastvit(keys: Keys) -> tuple[Pair, ...]:
    pairs: list[Pair] = [("stem.", "patch_embed."), ("final_conv.", "conv_exp.")]
    place = 0
    for index in range(keys.count("stages.")):
        stage = f"stages.{index}."
        if keys.any(f"{stage}downsample."):
            here = f"network.{place}.proj."
            large = f"{stage}downsample.proj.0."
            pairs.append((f"{large}large_conv.", f"{here}0.lkb_origin."))
            pairs.append((f"{large}reparam_conv.", f"{here}0.lkb_reparam."))
            pairs.append((f"{stage}downsample.proj.", here))
            place += 1
        if keys.any(f"{stage}pos_emb."):
            pairs.append((f"{stage}pos_emb.pos_enc.", f"network.{place}.pe."))
            pairs.append((f"{stage}pos_emb.reparam_conv.", f"network.{place}.reparam_conv."))
            place += 1
        pairs.append((f"{stage}blocks.", f"network.{place}."))
        place += 1
    return (
        *pairs,
        ("head.fc.", "head."),
        (".conv_kxk.", ".rbr_conv."),
        (".conv_scale.", ".rbr_scale."),
        (".identity.", ".rbr_skip."),
        (".mlp.", ".convffn."),
        (".se.fc1.", ".se.reduce."),
        (".se.fc2.", ".se.expand."),
        (".layer_scale.gamma.", ".layer_scale."),
        (".layer_scale_1.gamma.", ".layer_scale_1."),
        (".layer_scale_2.gamma.", ".layer_scale_2."),
    )


def _timm_repvit(keys: Keys) -> tuple[Pair, ...]:
    pairs: list[Pair] = [("stem.conv1.", "features.0.0."), ("stem.conv2.", "features.0.2.")]
    place = 1

    def block(theirs: str) -> None:
        here = f"features.{place}."
        pairs.append((f"{theirs}token_mixer.", f"{here}token_mixer.0."))
        pairs.append((f"{theirs}se.", f"{here}token_mixer.1."))
        pairs.append((f"{theirs}channel_mixer.conv1.", f"{here}channel_mixer.m.0."))
        pairs.append((f"{theirs}channel_mixer.conv2.", f"{here}channel_mixer.m.2."))

    for index in range(keys.count("stages.")):
        stage = f"stages.{index}."
        down = f"{stage}downsample."
        if keys.any(f"{down}pre_block."):
            block(f"{down}pre_block.")
            place += 1
        if keys.any(down):
            here = f"features.{place}."
            pairs.append((f"{down}spatial_downsample.", f"{here}token_mixer.0."))
            pairs.append((f"{down}channel_downsample.", f"{here}token_mixer.2."))
            pairs.append((f"{down}ffn.conv1.", f"{here}channel_mixer.m.0."))
            pairs.append((f"{down}ffn.conv2.", f"{here}channel_mixer.m.2."))
            place += 1
        for number in range(keys.count(f"{stage}blocks.")):
            block(f"{stage}blocks.{number}.")
            place += 1
    return (
        *pairs,
        ("head.head.", "classifier.classifier."),
        ("head.head_dist.", "classifier.classifier_dist."),
        ("head.", "classifier."),
    )


def _mm_repvgg(keys: Keys) -> tuple[Pair, ...]:
    return (
        ("backbone.stem.", "stage0."),
        ("backbone.stage_", "stage"),
        ("head.fc.", "linear."),
        (".branch_3x3.", ".rbr_dense."),
        (".branch_1x1.", ".rbr_1x1."),
        (".branch_norm.", ".rbr_identity."),
        (".se_layer.conv1.conv.", ".se.down."),
        (".se_layer.conv2.conv.", ".se.up."),
        (".branch_reparam.", ".rbr_reparam."),
        (".norm.", ".bn."),
    )


def _mm_mobileone(keys: Keys) -> tuple[Pair, ...]:
    return (
        ("backbone.stage", "stage"),
        ("head.fc.", "linear."),
        (".branch_conv_list.", ".rbr_conv."),
        (".branch_scale.", ".rbr_scale."),
        (".branch_norm.", ".rbr_skip."),
        (".se.conv1.conv.", ".se.reduce."),
        (".se.conv2.conv.", ".se.expand."),
        (".branch_reparam.", ".reparam_conv."),
        (".norm.", ".bn."),
    )


DIALECTS: tuple[Dialect, ...] = (
    Dialect("timm", _is_timm_repvgg, _timm_repvgg),
    Dialect("timm", _matches(r"^stages\.[0-9]+\.blocks\.[0-9]+\.channel_mixer\."), _timm_repvit),
    Dialect(
        "timm",
        _matches(r"^stages\.[0-9]+\.blocks\.[0-9]+\.mlp\.(conv|fc1)\.", r"^final_conv\."),
        _timm_fastvit,
    ),
    Dialect(
        "timm",
        _matches(r"^stages\.[0-9]+\.[0-9]+\.(conv_kxk|conv_scale|reparam_conv)\."),
        _timm_mobileone,
    ),
    Dialect("mmpretrain", _matches(r"^backbone\.stage_[0-9]+\.[0-9]+\.branch_"), _mm_repvgg),
    Dialect("mmpretrain", _matches(r"^backbone\.stage[0-9]+\.[0-9]+\.branch_"), _mm_mobileone),
)
