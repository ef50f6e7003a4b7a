"""The six steps of the demo, each checked; the first thing that does not hold ends it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from service.client import Client, Version
from service.demo import digits, files, show
from service.demo.failure import DemoFailed, check
from service.demo.server import Service
from service.errors import FoldserveError

Form = Literal["train", "deploy"]
LEAST_ACCURACY = 0.97
ROWS_PER_REQUEST = 30
CONVERSION_SECONDS = 300.0
BENCHMARK_SECONDS = 20.0
BATCH_SIZES = (1, 8)


def run(
    *,
    keep: bool = False,
    as_json: bool = False,
    data_dir: Path | None = None,
    console: Console | None = None,
) -> int:
    """Run the demo; 0 if everything held, 1 otherwise, with the reason on the console.

    The service's data goes to `data_dir`, or to a temporary folder that is removed at the end.
    With `keep` the service goes on running and its data stays. With `as_json` what was seen goes
    to standard output as one object, and everything else to standard error.
    """
    out = console or Console(highlight=False, stderr=as_json)
    folder = data_dir or Path(tempfile.mkdtemp(prefix="foldserve-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    kept = False
    try:
        with Service(folder) as service:
            with Client(service.url, timeout=300) as client:
                demo = _Demo(out, client, folder)
                demo.walk()
            kept = keep
            _farewell(out, service, keep)
            if as_json:
                print(json.dumps({"url": service.url, **demo.seen}, indent=2))
    except DemoFailed as failure:
        out.print(f"[bold red]The demo failed.[/] {failure}", soft_wrap=True)
        return 1
    except FoldserveError as error:
        out.print(f"[bold red]The service refused.[/] {error.detail}", soft_wrap=True)
        if error.remedy:
            out.print(error.remedy, soft_wrap=True)
        return 1
    except httpx.HTTPError as error:
        out.print(f"[bold red]The service did not answer.[/] {error}", soft_wrap=True)
        return 1
    finally:
        if data_dir is None and not kept:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


class _Demo:
    """The steps over one running service; `folder` takes the checkpoints."""

    def __init__(self, out: Console, client: Client, folder: Path) -> None:
        self.out, self.client, self.folder = out, client, folder
        self.seen: dict[str, Any] = {"versions": [], "compared": []}

    def walk(self) -> None:
        """All steps, in order. Raises DemoFailed, or what the client raises."""
        data = self._load()
        for recipe in digits.RECIPES:
            self.out.rule(f"{recipe.title} on handwritten digits", align="left")
            path = self._train(recipe, data)
            version = self._convert(recipe.model, path, recipe.config)
            self._compare(version, data)
        self.out.rule("RepVGG-A0, 1000 classes, 224x224", align="left")
        path = self.folder / "repvgg-a0-train.pth"
        with self._working("making a checkpoint with seeded weights"):
            files.save_checkpoint(files.full_size_repvgg(), path)
        version = self._convert("repvgg-a0", path, None)
        self._classify_photograph(version)
        self._benchmark(version)

    def _load(self) -> digits.Digits:
        try:
            return digits.load_digits()
        except ImportError as error:
            raise DemoFailed(
                f"{error}. The demo trains on data that scikit-learn ships: "
                "install `foldserve\\[demo]`."
            ) from None

    def _train(self, recipe: digits.Recipe, data: digits.Digits) -> Path:
        """Step 1 and 2: a trained network, saved as its user would."""
        started = time.perf_counter()
        with self._bar() as bar:
            task = bar.add_task("training", total=digits.steps(recipe, data))
            network = digits.train(recipe, data, lambda: bar.advance(task))
        seconds = time.perf_counter() - started
        reached = digits.accuracy(network, data)
        path = self.folder / f"{recipe.model}.pth"
        files.save_checkpoint(network, path, recipe.prefix)
        parameters = sum(p.numel() for p in network.parameters())
        self.out.print(
            f"trained {parameters:,} parameters in {seconds:.1f} s: {reached:.2%} of "
            f"{len(data.test_labels)} held-out images named rightly; saved {path.name}"
        )
        check(
            reached > LEAST_ACCURACY,
            f"{recipe.model} reached {reached:.2%} on the held-out split; over "
            f"{LEAST_ACCURACY:.0%} was expected.",
        )
        return path

    def _convert(self, model: str, path: Path, config: dict[str, Any] | None) -> Version:
        """Step 3: upload, follow the conversion, and look at the certificate."""
        with self._bar() as bar:
            upload = bar.add_task(f"uploading {path.name}", total=path.stat().st_size)
            version = self.client.upload(
                path,
                model,
                config=config,
                progress=lambda sent, whole: bar.update(upload, completed=sent, total=whole),
            )
            conversion = bar.add_task("converting", total=None)
            for event in self.client.events(version):
                if event["event"] == "progress":
                    stage, done, total = (event["data"].get(k) for k in ("stage", "done", "total"))
                    bar.update(conversion, description=stage, completed=done, total=total)
            bar.update(conversion, description="converted", completed=1, total=1)
        version = self.client.wait(version, CONVERSION_SECONDS)
        self.seen["versions"].append(version.raw)
        self.out.print(show.certificate(version.raw))
        fusion = version.fusion
        check(fusion is not None, f"Version {version.version} of {model} has no certificate.")
        assert fusion is not None
        check(
            fusion["fused"] == fusion["blocks"] > 0,
            f"{fusion['fused']} of {fusion['blocks']} blocks of {model} were fused.",
        )
        check(
            fusion["error_float64"] <= 1e-12 and fusion["error_end_to_end"] <= 1e-3,
            f"The certificate of {model} is weaker than promised.",
        )
        return version

    def _compare(self, version: Version, data: digits.Digits) -> None:
        """Step 4: the held-out split over REST with both forms, which must agree."""
        images, labels = data.test_images.numpy(), data.test_labels.numpy()
        logits, judged = {}, []
        forms: tuple[Form, ...] = ("train", "deploy")
        with self._bar() as bar:
            for form in forms:
                task = bar.add_task(f"classifying, {form} form", total=len(labels))
                started = time.perf_counter()
                answers = []
                for rows in _slices(images):
                    answers.append(self.client.infer(version.model, rows, form=form))
                    bar.advance(task, len(rows))
                seconds = time.perf_counter() - started
                logits[form] = np.concatenate(answers)
                right = int((logits[form].argmax(1) == labels).sum())
                judged.append(show.Judged(form, len(labels), right, seconds))
        same = int((logits["train"].argmax(1) == logits["deploy"].argmax(1)).sum())
        apart = float(np.abs(logits["train"] - logits["deploy"]).max())
        self.seen["compared"].append(
            {
                "model": version.model,
                "forms": [asdict(each) for each in judged],
                "same_prediction": same,
                "largest_difference": apart,
            }
        )
        title = f"{version.model} on the held-out split, over REST"
        self.out.print(show.side_by_side(title, judged, same, apart))
        check(
            same == len(labels),
            f"The forms of {version.model} disagree on {len(labels) - same} images.",
        )
        for each in judged:
            check(
                each.accuracy > LEAST_ACCURACY,
                f"The {each.form} form of {version.model} reached {each.accuracy:.2%} over REST.",
            )

    def _classify_photograph(self, version: Version) -> None:
        """Step 5, first half: a JPEG to both forms."""
        jpeg = files.photograph()
        (self.folder / "photograph.jpg").write_bytes(jpeg)
        deploy, train = (
            self.client.predict(version.model, jpeg, form=form)[0] for form in ("deploy", "train")
        )
        self.seen["photograph"] = {
            "deploy": [asdict(label) for label in deploy],
            "train": [asdict(label) for label in train],
        }
        self.out.print(show.classes(deploy, train))
        check(
            [label.index for label in deploy] == [label.index for label in train],
            "The forms of RepVGG-A0 rank the classes of the JPEG differently.",
        )

    def _benchmark(self, version: Version) -> None:
        """Step 5, second half: what fusion saves on this machine."""
        with self._working(f"measuring both forms for {BENCHMARK_SECONDS:g} s"):
            answer = self.client.benchmark(
                version.model, batch_sizes=BATCH_SIZES, seconds=BENCHMARK_SECONDS
            )
        self.seen["benchmark"] = answer
        self.out.print(show.benchmark(answer))
        measured = tuple(batch["batch_size"] for batch in answer["batches"])
        check(measured == BATCH_SIZES, f"Batch sizes {measured} were measured.")
        saving = [m for m in self.client.health()["models"] if m["latency_saving"] is not None]
        check(bool(saving), "/health does not show the latency that was measured.")

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=self.out,
            transient=True,
        )

    def _working(self, what: str) -> Progress:
        progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.out,
            transient=True,
        )
        progress.add_task(what, total=None)
        return progress


def _slices(images: NDArray[np.float32]) -> Iterable[NDArray[np.float32]]:
    for start in range(0, len(images), ROWS_PER_REQUEST):
        yield images[start : start + ROWS_PER_REQUEST]


def _farewell(out: Console, service: Service, keep: bool) -> None:
    """Step 6: where to look next."""
    out.print(f"Everything held. The service answers at {service.url}")
    out.print(f"  the API's pages   {service.url}/docs")
    out.print(f"  its state         {service.url}/health")
    if keep:
        service.keep()
        out.print(f"  its data and log  {service.data_dir}", soft_wrap=True)
        out.print(f"  to end it         kill {service.pid}")
    else:
        out.print("It ends now; with --keep it goes on.")
