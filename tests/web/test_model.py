"""A model's page: versions, the picture of the network, the benchmark."""

from __future__ import annotations

import json
from typing import Any

import httpx
from playwright.sync_api import Route, expect

from tests.web.conftest import put
from tests.web.test_upload import picture
from tests.web.watched import XSS, Watched


def default(http: httpx.Client, name: str) -> tuple[int | None, bool]:
    model = http.get(f"/v1/models/{name}").json()
    return model["default_version"], model["pinned"]


def test_roll_back_unpin_and_delete(web: Watched, http: httpx.Client) -> None:
    name = "web-versions"
    put(http, name, 0)
    put(http, name, 1)
    page = web.page
    web.refusals = {409}  # of a version that is not loaded only the benchmark route knows a result
    web.go(f"/models/{name}")
    expect(page.locator("#summary")).to_contain_text("Version 2")

    serving = page.locator("#versions tr", has=page.locator(".badge.plain"))
    expect(serving).to_contain_text("Version 2")
    page.get_by_role("button", name="Roll back to version 1").click()
    expect(serving).to_contain_text("Version 1")
    expect(serving).to_contain_text("default, pinned")
    assert default(http, name) == (1, True)
    page.get_by_role("button", name="unpin version 1").click()
    expect(serving).to_contain_text("Version 2")
    assert default(http, name) == (2, False)

    page.get_by_role("button", name="Delete version 2").click()
    dialog = page.get_by_role("alertdialog")
    expect(dialog).to_contain_text("cannot be undone")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    assert default(http, name) == (2, False)
    page.get_by_role("button", name="Delete version 2").click()
    dialog.get_by_role("button", name="Delete version").click()
    expect(page.locator("#versions tbody tr")).to_have_count(1)
    assert default(http, name) == (1, False)

    page.get_by_role("button", name="Delete model").click()
    page.get_by_role("alertdialog").get_by_role("button", name="Delete model").click()
    page.wait_for_url(f"{web.url}/")
    assert http.get(f"/v1/models/{name}").status_code == 404


def test_a_model_that_is_not_there_says_so(web: Watched, http: httpx.Client) -> None:
    web.refusals = {404}
    web.page.goto("/models/web-nowhere")
    said = http.get("/v1/models/web-nowhere").json()
    expect(web.page.locator("#model-problem")).to_contain_text(said["detail"])
    expect(web.page.locator("#versions-section")).to_be_hidden()
    expect(web.page.locator("[aria-busy]")).to_have_count(0)


def test_an_image_is_dropped_on_the_try_box(web: Watched, shown: str) -> None:
    web.go(f"/models/{shown}")
    web.page.locator(".try-drop").evaluate(
        """(place, bytes) => {
          const files = new DataTransfer();
          files.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
          const how = { dataTransfer: files, bubbles: true, cancelable: true };
          place.dispatchEvent(new DragEvent("drop", how));
        }""",
        list(picture()),
    )
    expect(web.page.locator("#try .top")).to_have_count(2)
    expect(web.page.get_by_alt_text("The chosen image")).to_be_visible()


def test_labels_are_text(web: Watched, shown: str) -> None:
    web.go(f"/models/{shown}")
    web.page.locator("#try input[type=file]").set_input_files(
        {"name": f"{XSS}.png", "mimeType": "image/png", "buffer": picture()}
    )
    expect(web.page.locator(".top").first).to_contain_text(XSS)
    expect(web.page.locator(".top").first).to_contain_text("<script>")
    assert web.page.evaluate("window.pwned") is None


def test_a_damaged_image_shows_the_words_of_the_api(web: Watched, shown: str) -> None:
    web.refusals = {422}
    web.go(f"/models/{shown}")
    web.page.locator("#try input[type=file]").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": b"not an image"}
    )
    boxes = web.page.locator("#try .problem")
    expect(boxes).to_have_count(2)
    expect(boxes.first).to_contain_text("Send an undamaged JPEG, PNG or WebP file.")


def test_the_network_folds(web: Watched, shown: str) -> None:
    page = web.page
    web.go(f"/models/{shown}")
    blocks = page.locator(".block")
    expect(blocks).to_have_count(5)
    stem = blocks.first
    expect(stem.locator(".branches .conv")).to_have_count(2)
    expect(stem.locator(".whole")).to_have_css("opacity", "0")
    page.get_by_text("After: folded").click()
    expect(stem.locator(".whole")).to_have_css("opacity", "1")
    expect(stem.locator(".branches")).to_have_css("opacity", "0")
    panel = page.locator(".block-panel")
    expect(panel.get_by_role("img")).to_have_accessible_name(
        "3\u00d73, BN, 1\u00d71, BN, add; folded into 3\u00d73 conv"
    )
    for said in ("Ding et al. 2021", "Error, float64", "5 → 1", "3 → 8", "branch addition"):
        expect(panel).to_contain_text(said)
    blocks.nth(2).hover()
    expect(panel).to_contain_text("stage2.0")


def block(module: str, **changes: Any) -> dict[str, Any]:
    """A block of a report: kept, unless told otherwise."""
    operation = {
        "op": "aten.conv2d",
        "module": module,
        "kernel": [1, 1],
        "groups": 1,
        "reads": [-1],
    }
    numbers = {
        f"{what}_{when}": 1
        for what in ("operators", "convolutions", "macs", "parameters")
        for when in ("before", "after")
    }
    return {
        "module": module,
        "status": "kept",
        "reason": "a single convolution; sigmoid follows",
        "rules": [],
        "sources": [],
        "modules": [module],
        "operations": [operation],
        "kernel": [1, 1],
        "stride": [1, 1],
        "groups": 1,
        "in_channels": 4,
        "out_channels": 4,
        "error_float64": None,
        **numbers,
        **changes,
    }


def test_edges_cross_no_other_step(web: Watched, shown: str) -> None:
    """A branch of one batch norm beside longer ones: the edge to the sum stays in its own lane."""
    steps = [
        ("aten.conv2d", [3, 3], [-1]),
        ("aten.batch_norm", [], [0]),
        ("aten.conv2d", [1, 1], [-1]),
        ("aten.batch_norm", [], [2]),
        ("aten.batch_norm", [], [-1]),
        ("aten.add", [], [1, 3]),
        ("aten.add", [], [5, 4]),
    ]
    operations = [
        {"op": op, "module": "", "kernel": kernel, "groups": 1, "reads": reads}
        for op, kernel, reads in steps
    ]

    def changed(route: Route) -> None:
        report = route.fetch().json()
        drawn = block("stem", status="fused", operations=operations)
        route.fulfill(json=report | {"blocks": [drawn]})

    web.page.route("**/report", changed)
    web.go(f"/models/{shown}")
    figure = web.page.locator(".block-panel .figure")
    expect(figure.locator(".op")).to_have_count(6)
    crossings = """figure => {
        const boxes = [...figure.querySelectorAll('.op rect')].map(each => each.getBBox());
        const inside = (p, b) =>
            p.x > b.x && p.x < b.x + b.width && p.y > b.y && p.y < b.y + b.height;
        const edges = [...figure.querySelectorAll('path:not(.becomes)')];
        return edges.flatMap(edge => {
            const long = edge.getTotalLength();
            const at = n => edge.getPointAtLength(long * n / 100);
            const points = Array.from({length: 101}, (_, n) => at(n));
            const ends = [points[0], points[100]];
            return boxes.filter(
                box => !ends.some(p => inside(p, box)) && points.some(p => inside(p, box)));
        }).length;
    }"""
    assert figure.evaluate(crossings) == 0


def test_many_blocks_are_grouped_and_say_why_they_stay(web: Watched, shown: str) -> None:
    blocks = [block(f"net.stage{n // 60}.{n % 60}") for n in range(190)]
    blocks[1] |= {
        "status": "refused",
        "reason": f"max pooling {XSS}",
        "module": f"net.stage0.{XSS}",
    }
    totals = {"blocks": 190, "fused": 0, "kept": 189, "refused": 1}

    def changed(route: Route) -> None:
        report = route.fetch().json()
        route.fulfill(json=report | {"blocks": blocks, "totals": report["totals"] | totals})

    web.page.route("**/report", changed)
    web.go(f"/models/{shown}")
    stages = web.page.locator(".stage")
    expect(stages).to_have_count(4)
    expect(web.page.locator(".stage[open]")).to_have_count(1)
    expect(stages.nth(1)).to_contain_text("60 blocks")
    expect(web.page.locator(".legend")).to_contain_text("1 refused")
    web.page.locator(".block").first.focus()
    expect(web.page.locator(".block-panel")).to_contain_text("A single convolution; sigmoid")
    web.page.keyboard.press("ArrowRight")
    expect(web.page.locator(".block-panel")).to_contain_text(f"Max pooling {XSS}")
    expect(web.page.locator(".block.refused")).to_be_focused()
    assert web.page.evaluate("window.pwned") is None


def test_the_benchmark_is_measured_and_drawn(web: Watched, shown: str, http: httpx.Client) -> None:
    def shorter(route: Route) -> None:
        asked = json.loads(route.request.post_data or "{}")
        route.continue_(post_data=json.dumps(asked | {"seconds": 1}))

    web.page.route(
        "**/benchmark?version=1",
        lambda r: shorter(r) if r.request.method == "POST" else r.continue_(),
    )
    web.go(f"/models/{shown}?version=1")
    web.page.get_by_label("Batch sizes").fill("1, 2, 4")
    web.page.get_by_role("button", name="Measure").click()
    rows = web.page.locator("#latency tbody tr")
    expect(rows).to_have_count(3)
    result = http.get(f"/v1/models/{shown}/benchmark", params={"version": 1}).json()
    for row, batch in zip(rows.all(), result["batches"], strict=True):
        expect(row).to_contain_text(f"{batch['speedup']:.2f}\u00d7")
        expect(row).to_contain_text(batch["verdict"])
    expect(web.page.locator("#saved")).to_contain_text("Latency, batch 4")
    canvas = web.page.locator("#latency canvas")
    drawn = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x > 0)"
    assert canvas.evaluate(drawn), "the chart is empty"

    web.refusals = {422}
    web.page.get_by_label("Batch sizes").fill("4096")
    web.page.get_by_role("button", name="Measure again").click()
    expect(web.page.locator("#latency .problem")).to_contain_text("FOLDSERVE_MAX_BATCH")


def test_a_file_that_is_made_first_comes_or_says_why_not(web: Watched, shown: str) -> None:
    said = {
        "title": "No export",
        "detail": f"It has {XSS}.",
        "remedy": "Take another.",
        "code": "x",
    }
    web.go(f"/models/{shown}")
    link = web.page.get_by_role("link", name="Deploy form, onnx")
    web.refusals = {409}
    web.page.route("**format=onnx", lambda route: route.fulfill(status=409, json=said))
    link.click()
    expect(web.page.locator("#downloads .problem")).to_contain_text("Take another.")
    web.page.unroute("**format=onnx")
    head = {"Content-Disposition": 'attachment; filename="made.onnx"'}
    web.page.route("**format=onnx", lambda route: route.fulfill(headers=head, body="made"))
    with web.page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename == "made.onnx"
    expect(web.page.locator("#downloads .problem")).to_have_count(0)
