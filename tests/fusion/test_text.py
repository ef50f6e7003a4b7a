"""The report as text: what happened to every convolution, why, and where the rules come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from service.errors import UnsupportedOperator
from service.fusion import Fusion, fuse, quantisation_report, ranges_to_dict, report_text
from service.networks import RepVGGBlock


class Sampler(nn.Module):
    """A block that fuses, one that is kept, one that is refused, and siblings of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGGBlock(4, 4)
        self.reduce = nn.Conv2d(4, 1, 1, bias=False)
        self.expand = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.biased = nn.Conv2d(8, 8, 1)
        self.padded = nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)
        self.wide = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(self.reduce(self.block(x)))
        x = self.padded(self.biased(x.relu())).relu()
        return torch.cat([self.left(x).relu(), self.right(x).relu(), self.wide(x)], 1)


@pytest.fixture(scope="module")
def fusion() -> Fusion:
    torch.manual_seed(0)
    network = Sampler().eval()
    identity = network.block.rbr_identity
    assert identity is not None
    assert identity.running_var is not None
    identity.running_var[0] = 1e-4  # the known spike in the centre of a fused kernel
    return fuse(network, (torch.zeros(1, 4, 6, 6),))


@pytest.fixture(scope="module")
def text(fusion: Fusion) -> str:
    document = fusion.report.to_dict()
    return report_text({**document, "quantisation": ranges_to_dict(quantisation_report(fusion))})


def section(text: str, title: str) -> str:
    return next(part for part in text.split("\n\n") if part.startswith(title))


def test_a_fused_block_names_its_modules_rules_and_numbers(text: str) -> None:
    fused = section(text, "Fused")
    assert "block: 3x3 convolution, 4 to 4 channels" in fused
    assert "rbr_dense.conv, rbr_dense.bn, rbr_1x1.conv, rbr_1x1.bn, rbr_identity" in fused
    assert "branch addition, conv-bn, identity branch, multi-scale kernels" in fused
    assert "7 operators to 1" in fused
    sources = section(text, "Rules")
    assert "identity branch: Ding et al. 2021, RepVGG" in sources
    assert "average pooling" not in sources


def test_every_convolution_that_stays_says_why(text: str) -> None:
    kept, refused = section(text, "Kept"), section(text, "Refused")
    assert "expand: 3x3 convolution, 1 to 8 channels" in kept
    assert "raise its cost" in kept
    assert "padded: 3x3 convolution" in refused
    assert "the bias would differ between border and interior" in refused


def test_siblings_are_told_with_the_reason(text: str) -> None:
    assert "left, right" in section(text, "Merged")
    apart = section(text, "Not merged")
    assert "wide" in apart
    assert "their kernels differ (1x1, 3x3)" in apart


def test_branches_that_stay_are_told_with_what_stands_between(text: str) -> None:
    joined = " ".join(section(text, "Joined as before").split())
    assert "the network: concatenation of 3 branches" in joined
    assert "linear only from behind relu" in joined
    # Branches that were folded into one convolution are no join any more.
    assert "block" not in joined
    assert "sum of" not in joined


def test_int8_readiness_covers_every_layer_and_warns_of_the_widened(text: str) -> None:
    ranges = section(text, "Readiness for int8")
    for layer in ("block", "reduce", "expand", "biased", "padded", "left", "right", "wide"):
        assert any(line.startswith(f"  {layer} ") for line in ranges.splitlines()), layer
    warned = [line for line in ranges.splitlines() if line.endswith("  !")]
    assert len(warned) == 1
    assert warned[0].startswith("  block ")
    assert "block: fusing widened the kernel" in " ".join(ranges.split())


def test_lines_fit_a_terminal(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 100


class Neighbours(nn.Module):
    """Branches and padding that keep a convolution from being fused."""

    def __init__(self, neighbour: str) -> None:
        super().__init__()
        self.neighbour = neighbour
        self.conv, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.neighbour == "pooling":
            return y + nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if self.neighbour == "ceil":
            return self.point(nn.functional.avg_pool2d(x, 2, ceil_mode=True)).relu()
        if self.neighbour == "padding":
            return self.conv(nn.functional.pad(self.point(x), (1, 1, 1, 1)))
        return nn.functional.conv_transpose2d(y, self.conv.weight)


@pytest.mark.parametrize(
    ("neighbour", "reason"),
    [
        ("pooling", "average pooling that leaves padding out of its count"),
        ("ceil", "ceil mode reaches past the padding"),
        ("padding", "the bias would differ between border and interior"),
        ("transposed", "no rule takes a transposed convolution"),
    ],
)
def test_the_reason_is_the_one_that_counts(neighbour: str, reason: str) -> None:
    torch.manual_seed(0)
    report = fuse(Neighbours(neighbour).eval(), (torch.zeros(1, 4, 7, 7),)).report
    assert any(reason in block.reason for block in report.blocks)
    assert not any("adds channels or rows" in block.reason for block in report.blocks)


def test_a_norm_of_its_own_batch_is_refused_by_name() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    network = nn.Sequential(nn.Conv2d(4, 4, 1), norm).eval()
    with pytest.raises(UnsupportedOperator, match="what else is in the batch"):
        fuse(network, (torch.zeros(2, 4, 4, 4),))
