"""The sandboxed child: what crosses the boundary, what does not, and that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from service.checkpoint import sandbox
from service.checkpoint.child import ChildLimits, run_sandboxed, sandbox_features
from service.errors import (
    ConversionCrashed,
    ConversionInterrupted,
    ConversionOutOfMemory,
    ConversionTimeout,
    FoldserveError,
    MixedForm,
)
from service.hosting import worker_limits
from service.settings import Settings

from .forge import MIB


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def run(name: str, *args: Any, scratch: Path, **kwargs: Any) -> Any:
    limits = kwargs.pop("limits", ChildLimits(seconds=30, cpu_seconds=30))
    return run_sandboxed(
        f"tests.checkpoint.targets:{name}", args, limits, scratch=scratch, **kwargs
    )


def needs(feature: str) -> None:
    if not sandbox_features()[feature]:
        pytest.skip(f"{feature} is not available on this kernel")


def descriptors() -> set[str]:
    return {
        f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}"
        for name in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{name}")
    }


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "State:\tZ" not in status


def test_results_and_progress_come_back_in_order(scratch: Path) -> None:
    seen: list[dict[str, Any]] = []
    result = run("add", 1, 2, scratch=scratch, on_progress=seen.append)
    assert result["sum"] == 3
    assert result["pid"] != os.getpid()
    assert seen == [{"stage": "adding", "done": done} for done in range(3)]


def test_relative_paths_mean_what_they_meant_to_the_caller(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("add", 1, 2, scratch=scratch)  # the fork server may start elsewhere
    monkeypatch.chdir(scratch.parent)
    (scratch / "file").write_text("found")
    assert run("read_here", "scratch/file", scratch=Path("scratch")) == "found"


def test_our_errors_arrive_as_they_were_raised(scratch: Path) -> None:
    with pytest.raises(MixedForm, match="Half is converted") as raised:
        run("refuse", scratch=scratch)
    assert raised.value.remedy == "Convert all of it."
    assert raised.value.extra == {"keys": ["a.b", "c.d"]}
    with pytest.raises(MixedForm):
        run("refuse_oddly", scratch=scratch)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("divide", "ZeroDivisionError: division by zero"),
        ("give_a_tensor", "TypeError: .*not JSON"),
        ("give_nan", "ValueError: .*not JSON"),
        ("missing", "AttributeError: .*missing"),
    ],
)
def test_other_exceptions_are_crashes_with_type_and_message(
    scratch: Path, name: str, says: str
) -> None:
    with pytest.raises(ConversionCrashed, match=says):
        run(name, scratch=scratch)


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_death_by_signal_is_named(scratch: Path, number: signal.Signals) -> None:
    with pytest.raises(ConversionCrashed, match=number.name):
        run("die", int(number), scratch=scratch)


def test_a_crash_in_native_code_and_a_silent_exit(scratch: Path) -> None:
    with pytest.raises(ConversionCrashed, match="SIGSEGV"):
        run("segfault", scratch=scratch)
    for code in (0, 3):
        with pytest.raises(ConversionCrashed, match=f"with code {code}"):
            run("leave", code, scratch=scratch)


def test_wall_clock_time_is_limited(scratch: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ConversionTimeout, match=r"longer than 0\.3 s"):
        run("sleep", scratch=scratch, limits=ChildLimits(seconds=0.3))
    assert time.monotonic() - started < 5


def test_processor_time_is_limited(scratch: Path) -> None:
    with pytest.raises(ConversionTimeout, match="1 s of processor time"):
        run("spin", scratch=scratch, limits=ChildLimits(seconds=20, cpu_seconds=1))


@pytest.mark.parametrize("name", ["allocate_bytes", "allocate_tensor", "share_memory"])
def test_memory_is_limited(scratch: Path, name: str) -> None:
    limits = ChildLimits(seconds=20, memory_bytes=128 * MIB)
    with pytest.raises(ConversionOutOfMemory, match=str(128 * MIB)):
        run(name, 512 * MIB, scratch=scratch, limits=limits)
    if name != "share_memory":
        assert run(name, 32 * MIB, scratch=scratch, limits=limits) == 32 * MIB


def test_files_are_limited(scratch: Path) -> None:
    limits = ChildLimits(seconds=20, file_bytes=MIB)
    assert run("write_much", scratch=scratch, limits=limits) == "OSError"
    assert run("write_much", scratch=scratch) == "done"


def test_cancelling_ends_the_child(scratch: Path) -> None:
    cancel = threading.Event()
    pids: list[int] = []

    def on_progress(progress: dict[str, Any]) -> None:
        pids.append(progress["pid"])
        cancel.set()

    with pytest.raises(ConversionInterrupted, match="cancelled"):
        run("sleep", scratch=scratch, on_progress=on_progress, cancel=cancel)
    assert not alive(pids[0])


def test_what_the_listener_raises_ends_the_child(scratch: Path) -> None:
    pids: list[int] = []

    def on_progress(progress: dict[str, Any]) -> None:
        pids.append(progress["pid"])
        raise LookupError("the version was deleted")

    with pytest.raises(LookupError, match="deleted"):
        run("sleep", scratch=scratch, on_progress=on_progress)
    assert not alive(pids[0])


@pytest.mark.parametrize(
    "text",
    [
        b"\x80nonsense\n",
        b"[]\n",
        b'{"other": 1}\n',
        b'{"progress": 1}\n',
        b'{"result": NaN}\n',
        b'{"result": "\\ud800"}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_nonsense_from_the_child_is_a_crash(scratch: Path, text: bytes) -> None:
    with pytest.raises(ConversionCrashed, match="nothing sensible"):
        run("say", text, scratch=scratch)


@pytest.mark.parametrize(
    "text", [b'{"error": {}}\n', b'{"error": {"code": "mixed_form", "self": 1, "detail": 2}}\n']
)
def test_an_error_that_cannot_be_one_is_still_an_error(scratch: Path, text: bytes) -> None:
    with pytest.raises(FoldserveError):
        run("say", text, scratch=scratch)


@pytest.mark.parametrize("name", ["flood", "chatter"])
def test_a_talkative_child_is_not_listened_to_for_ever(scratch: Path, name: str) -> None:
    with pytest.raises(ConversionCrashed, match="more than is listened to"):
        run(name, scratch=scratch)


def test_a_half_said_message_does_not_hold_the_parent(scratch: Path) -> None:
    with pytest.raises(ConversionTimeout):
        run("say", b'{"result": ', scratch=scratch, limits=ChildLimits(seconds=0.3))


def test_the_child_starts_with_little(scratch: Path) -> None:
    found = run("state", scratch=scratch, limits=ChildLimits(threads=2, nice=7))
    assert found["temporary"] == str(scratch)
    assert len(found["descriptors"]) == 4, "standard three and the pipe to the parent"
    assert found["threads"] == 2
    assert found["nice"] == min(19, os.nice(0) + 7)
    assert found["policy"] == os.SCHED_OTHER
    assert found["core"] == 0
    assert found["main"] is None, "the parent's main module was imported again"
    assert found["modules"] == []
    assert found["status"]["NoNewPrivs"] == "1"
    assert int(found["status"]["CapEff"], 16) == 0


def attack(scratch: Path, tmp_path: Path) -> dict[str, str]:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "old").write_text("precious")
    found: dict[str, str] = run("attack", str(outside), os.getpid(), scratch=scratch)
    found["left outside"] = ",".join(sorted(p.name for p in outside.iterdir()))
    found["old"] = (outside / "old").read_text() if (outside / "old").exists() else "gone"
    return found


def test_it_writes_inside_its_folder_only(scratch: Path, tmp_path: Path) -> None:
    needs("files_confined")
    found = attack(scratch, tmp_path)
    assert {found[f"{what} inside"] for what in ("write", "delete", "make a folder")} == {"done"}
    assert {result for what, result in found.items() if what.endswith("outside")} == {
        "PermissionError",
        "old",
    }
    assert found["old"] == "precious"


def test_it_reads_only_what_it_is_given(scratch: Path, tmp_path: Path) -> None:
    needs("files_confined")
    given, secret = tmp_path / "given", tmp_path / "secret"
    for path in (given, secret):
        path.write_text(path.name)
    tests = Path(__file__).parents[1]
    wanted = [str(given), str(secret), str(tmp_path), f"/proc/{os.getpid()}/environ", "/etc/passwd"]
    found = run("look_at", wanted, scratch=scratch, readable=(given, tests))
    assert found == ["given", *["PermissionError"] * 4]
    freely = run("look_at", wanted[:2], scratch=scratch)
    assert freely == ["given", "secret"], "the control: without the list both can be read"
    work = run("export_and_train", scratch=scratch, readable=(tests,))
    assert work["same"]


def test_it_makes_no_links_or_pipes_that_could_mislead_the_service(
    scratch: Path, tmp_path: Path
) -> None:
    needs("system_calls_filtered")
    found = attack(scratch, tmp_path)
    assert {found["link from outside"], found["symbolic link"], found["pipe"]} == {
        "PermissionError"
    }


def test_it_reaches_no_network_program_or_process(scratch: Path, tmp_path: Path) -> None:
    needs("system_calls_filtered")
    found = attack(scratch, tmp_path)
    for what in ("tcp", "unix", "run a program", "fork", "kill the service", "change its limits"):
        assert found[what] == "PermissionError", what


def test_it_cannot_reach_the_service(scratch: Path) -> None:
    needs("system_calls_filtered")
    needs("files_confined")
    given = (scratch, Path(__file__).parents[1])
    found = run("reach", os.getpid(), scratch=scratch, readable=given)
    limit = found.pop("many descriptors")
    assert limit == "OSError", "the limit of descriptors"
    allowed = {what: result for what, result in found.items() if result != "PermissionError"}
    assert not allowed


def test_without_the_sandbox_the_service_is_reached() -> None:
    """The control: another process of the same user, unconfined, does all of it.

    Where this test itself runs in a container some ways out are closed by that already.
    """
    code = (
        "import json, os, sys; from tests.checkpoint import targets; "
        "print(json.dumps(targets.reach(int(sys.argv[1]), None)))"
    )
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        done = subprocess.run(
            [sys.executable, "-c", code, str(victim.pid)],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        victim.kill()
    found = json.loads(done.stdout)
    for what in (
        *("environment", "memory map", "descriptors", "signal", "signal by descriptor"),
        *("slow it down", "change its policy", "move it", "descriptor of it", "memory file"),
        *("shared memory", "many descriptors", "raw disk"),
    ):
        assert found[what] == "done", what


def test_no_secret_is_in_its_environment(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from pathlib import Path; from service.checkpoint.child import run_sandboxed; "
        "found = run_sandboxed('tests.checkpoint.targets:state', (), scratch=Path(sys.argv[1])); "
        "print(*found['environment'], sep='\\n')"
    )
    secrets = {"FOLDSERVE_DATABASE_URL": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(scratch)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **secrets, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "s3cret" not in done.stdout
    assert "OMP_NUM_THREADS=1" in done.stdout.splitlines(), "the control: something is kept"


@pytest.mark.parametrize("name", ["fill_with_bytes", "fill_with_files"])
def test_a_child_that_fills_its_folder_is_ended(scratch: Path, name: str) -> None:
    limits = ChildLimits(seconds=60, scratch_bytes=32 * MIB, scratch_files=500)
    with pytest.raises(ConversionCrashed, match="filled its folder"):
        run(name, scratch=scratch, limits=limits)


def test_an_idle_child_leaves_the_processors_to_others(scratch: Path) -> None:
    """Beside processes that want every core it gets next to nothing; alone it would get all."""
    cores = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    idle = ChildLimits(seconds=0.7, nice=19, idle=True)
    try:
        started = time.monotonic()
        with pytest.raises(ConversionTimeout):
            run("burn", 60, scratch=scratch, limits=idle)
        waited = time.monotonic() - started
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert waited > 1.2, "time in which it was not let run was counted against it"


def test_conversions_are_idle_unless_the_settings_say_otherwise() -> None:
    for priority, nice, idle in (("idle", 19, True), ("low", 19, False), ("normal", 0, False)):
        limits = worker_limits(Settings(conversion_priority=priority)).child
        assert (limits.nice, limits.idle, limits.threads) == (nice, idle, 1)
    assert worker_limits(Settings()).child.idle, "the default"


def test_an_idle_child_says_so(scratch: Path) -> None:
    found = run("state", scratch=scratch, limits=ChildLimits(nice=19, idle=True))
    assert found["policy"] == os.SCHED_IDLE
    assert found["nice"] == 19


def test_it_cannot_raise_its_own_limits(scratch: Path, tmp_path: Path) -> None:
    needs("capabilities_dropped")
    assert attack(scratch, tmp_path)["raise own limits"] == "PermissionError"


def test_without_the_sandbox_the_same_attack_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the attack is refused by the sandbox and by nothing else."""
    from . import targets

    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "old").write_text("precious")
    monkeypatch.setattr("tempfile.tempdir", str(inside))
    monkeypatch.chdir(inside)  # put back afterwards: the attack changes it
    found = targets.attack(str(outside), os.getpid(), lambda _: None)
    for what in ("write outside", "make a folder outside", "tcp", "unix", "symbolic link", "pipe"):
        assert found[what] == "done", what
    assert found["run a program"] == "done"


def test_conversion_work_is_possible_inside(scratch: Path) -> None:
    found = run("export_and_train", scratch=scratch, limits=ChildLimits(threads=2))
    assert found["same"]
    assert (scratch / "weights.pth").stat().st_size == found["bytes"]


def test_twenty_children_leave_nothing_behind(scratch: Path) -> None:
    run("add", 1, 2, scratch=scratch)
    before, threads = descriptors(), threading.active_count()
    pids = []
    for index in range(20):
        pids.append(run("add", index, 1, scratch=scratch)["pid"])
        with pytest.raises(ConversionCrashed):
            run("leave", 3, scratch=scratch)
    assert len(descriptors()) == len(before)
    assert threading.active_count() == threads
    assert not any(alive(pid) for pid in pids)


def test_children_start_fast_after_the_first(scratch: Path) -> None:
    run("add", 1, 2, scratch=scratch)
    times = []
    for _ in range(5):
        started = time.monotonic()
        run("add", 1, 2, scratch=scratch)
        times.append(time.monotonic() - started)
    assert sorted(times)[2] < 0.5


def test_several_threads_run_children_at_once(scratch: Path) -> None:
    results: list[int] = []

    def work(index: int) -> None:
        for _ in range(3):
            results.append(run("add", index, 1, scratch=scratch)["sum"])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


_ORPHAN = """
import sys
from pathlib import Path
from service.checkpoint.child import run_sandboxed
print_ = lambda progress: print(progress["pid"], flush=True)
run_sandboxed("tests.checkpoint.targets:sleep", (), scratch=Path(sys.argv[1]), on_progress=print_)
"""


def test_a_child_dies_with_the_service(scratch: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    service = subprocess.Popen(
        [sys.executable, "-c", _ORPHAN, str(scratch)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    try:
        assert service.stdout is not None
        child = int(service.stdout.readline())
        assert alive(child)
    finally:
        service.kill()
        service.communicate()
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


def test_the_features_are_all_named() -> None:
    features = sandbox_features()
    assert tuple(features) == sandbox.FEATURES
    assert features["cpu_limit"]
    assert features["file_size_limit"]
