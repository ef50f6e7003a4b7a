"""From a file to a prediction, in a real browser."""

from __future__ import annotations

import io
import json
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import expect

from service.client import model_name
from service.errors import BadInput
from tests.api import tiny
from tests.web.watched import XSS, Watched


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((20, 20)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def test_from_upload_to_prediction(web: Watched, http: httpx.Client, tmp_path: Path) -> None:
    checkpoint = tmp_path / "Web Journey.v1.pth"
    checkpoint.write_bytes(tiny.checkpoint())
    page = web.page
    web.go("/")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a file").click()
    chooser.value.set_files(checkpoint)
    expect(page.get_by_label("Model name")).to_have_value("web-journey.v1")
    page.get_by_text("Options: what").click()
    page.get_by_label("Config (JSON)").fill(json.dumps(tiny.CONFIG))
    page.get_by_role("button", name="Upload and fold").click()

    card = page.locator(".conversion")
    expect(card).to_contain_text("ready")
    expect(card).to_contain_text("All 5 blocks folded.")
    expect(page.locator("#models")).to_contain_text("10 → 5")
    card.get_by_role("link", name="Open").click()

    expect(page.locator("#certificate")).to_contain_text("names the same class for every probe")
    expect(page.locator("#saved")).to_contain_text("50 % less")
    expect(page.locator(".block")).to_have_count(5)

    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose an image").click()
    chooser.value.set_files({"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    expect(page.locator(".top")).to_have_count(2)
    expect(page.locator(".agreement")).to_contain_text("Both forms give the same classes")
    answer = http.post(
        "/v1/models/web-journey.v1/predict",
        content=picture(),
        headers={"Content-Type": "image/png"},
    ).json()
    best = answer["predictions"][0]["top"][0]
    first = page.locator(".top li").first
    expect(first).to_contain_text(best["label"])
    expect(first).to_contain_text(f"{100 * best['score']:.1f} %")

    with page.expect_download() as download:
        page.get_by_role("link", name="Deploy form, safetensors").click()
    own = http.get("/v1/models/web-journey.v1/versions/1/checkpoints/deploy").content
    assert Path(download.value.path()).read_bytes() == own


def test_files_are_dropped(web: Watched) -> None:
    web.go("/")
    web.page.evaluate(
        """() => {
          const files = new DataTransfer();
          files.items.add(new File(["{}"], "Config.JSON"));
          files.items.add(new File(["x"], "RepVGG-A0-train.pth.tar"));
          const how = { dataTransfer: files, bubbles: true, cancelable: true };
          const event = (kind) => new DragEvent(kind, how);
          document.querySelector("#drop").dispatchEvent(event("dragenter"));
          document.querySelector("#drop").dispatchEvent(event("drop"));
        }"""
    )
    expect(web.page.get_by_label("Model name")).to_have_value("repvgg-a0-train")
    expect(web.page.get_by_label("Config (JSON)")).to_have_value("{}")
    web.page.get_by_role("button", name="Discard").click()
    expect(web.page.get_by_role("button", name="Choose a file")).to_be_focused()


def upload(web: Watched, name: str, file: str, content: bytes, config: str = "") -> None:
    web.go("/")
    web.page.locator("#file").set_input_files(
        {"name": file, "mimeType": "application/octet-stream", "buffer": content}
    )
    web.page.get_by_label("Model name").fill(name)
    web.page.locator("#config").evaluate("(field, text) => (field.value = text)", config)
    web.page.get_by_role("button", name="Upload and fold").click()


def test_a_refused_checkpoint_shows_the_words_of_the_api(web: Watched, http: httpx.Client) -> None:
    upload(web, "web-garbage", f"{XSS}.pth", b"this is no checkpoint")
    box = web.page.locator(".conversion .problem")
    expect(box).to_be_visible()
    error = http.get("/v1/models/web-garbage/versions/1").json()["error"]
    for said in (error["title"], error["detail"], error["remedy"], error["code"]):
        expect(box).to_contain_text(said)
    expect(web.page.locator(".conversion")).to_contain_text(XSS)
    assert web.page.evaluate("window.pwned") is None

    web.go("/models/web-garbage")
    expect(web.page.locator("#state-section .problem")).to_contain_text(error["remedy"])
    expect(web.page.locator("#versions")).to_contain_text(XSS)
    expect(web.page.locator("#certificate-section")).to_be_hidden()
    assert web.page.evaluate("window.pwned") is None


def test_a_refused_request_shows_the_words_of_the_api(web: Watched, http: httpx.Client) -> None:
    web.refusals = {422}
    upload(web, "Not A Name", "a.pth", b"x")
    said = http.post("/v1/models/Not A Name/versions", files={"checkpoint": b"x"}).json()
    box = web.page.locator(".conversion .problem")
    expect(box).to_contain_text(said["detail"])
    expect(box).to_contain_text(said["remedy"])
    upload(web, "web-config", "a.pth", b"x", '{"nonsense": "' + XSS.replace('"', "'") + '"}')
    expect(web.page.locator(".conversion .problem")).to_contain_text("nonsense")
    web.page.get_by_role("button", name="Dismiss").click()
    expect(web.page.locator(".conversion")).to_have_count(0)


def test_a_config_that_is_no_json_is_not_sent(web: Watched) -> None:
    upload(web, "web-no-json", "a.pth", b"x", "{labels: []}")
    expect(web.page.locator("#config-error")).to_contain_text("This is not JSON")
    expect(web.page.get_by_label("Config (JSON)")).to_be_focused()
    assert not any("web-no-json" in url for url in web.requests)


def test_a_service_that_is_gone_is_named(web: Watched) -> None:
    web.unanswered = True
    web.go("/")
    web.page.route("**/v1/**", lambda route: route.abort())
    web.page.locator("#file").set_input_files(
        {"name": "a.pth", "mimeType": "application/octet-stream", "buffer": b"x"}
    )
    web.page.get_by_role("button", name="Upload and fold").click()
    expect(web.page.locator(".conversion .problem")).to_contain_text("did not answer")


def named(file: str) -> str:
    """The name that the command gives a model; empty where the file's name makes none."""
    try:
        return model_name(file)
    except BadInput:
        return ""


def test_models_are_named_as_the_command_names_them(web: Watched) -> None:
    files = [
        "RepVGG-A0-train.pth",
        "mobileone_s0_unfused.pth.tar",
        "__Weird  (1) N\u00e4me!!.safetensors",
        "model.bundle.safetensors",
        f"{'long' * 30}.pt",
        ".pth",
    ]
    web.page.goto("/problems")
    script = """async (files) => {
      const { modelName } = await import("/static/js/upload.js");
      return files.map(modelName);
    }"""
    assert web.page.evaluate(script, files) == [named(file) for file in files]
