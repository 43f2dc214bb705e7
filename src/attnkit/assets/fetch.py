"""The commands that install assets: printed by default, run on request."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attnkit._core.errors import CheckFailed, MissingAsset
from attnkit.assets.catalogue import Asset, Package
from attnkit.assets.locate import unpack_folder, verify

__all__ = ["Step", "fetch", "steps"]


@dataclass(frozen=True)
class Step:
    """One command of an installation.

    Attributes:
        arguments: the command; a `*` stands for the one file that the step before has downloaded.
        folder: where it runs; None means anywhere.
    """

    arguments: tuple[str, ...]
    folder: Path | None = None

    def __str__(self) -> str:
        command = " ".join(item if "*" in item else shlex.quote(item) for item in self.arguments)
        if self.folder is None:
            return command
        folder = shlex.quote(str(self.folder))
        return f"mkdir -p {folder} && cd {folder} && {command}"


def steps(package: Package) -> list[Step]:
    """The commands that bring one package: pip installs, apt and npm packages are unpacked in the cache folder."""
    folder = unpack_folder(package)
    if package.manager == "pip":
        options = () if package.dependencies else ("--no-deps",)
        return [Step((sys.executable, "-m", "pip", "install", *options, f"{package.name}=={package.version}"))]
    if package.manager == "apt":
        unpack = Step(("dpkg-deb", "-x", f"{package.name}_*.deb", "."), folder)
        return [Step(("apt-get", "download", package.name), folder), unpack]
    download = Step(("npm", "pack", f"{package.name}@{package.version}"), folder)
    return [download, Step(("tar", "-xzf", f"{package.name}-{package.version}.tgz"), folder)]


def fetch(asset: Asset, *, on_step: Callable[[Step], None]) -> None:
    """Run the commands of every package of an asset, then compare its files with the pinned hashes.

    Args:
        asset: what to install.
        on_step: called with each command before it runs; the commands' own output goes to stderr.
    Raises:
        MissingAsset: a package manager is absent, or a command failed.
        CheckFailed: a file differs from the pinned SHA-256.
    """
    for package in asset.packages:
        for step in steps(package):
            on_step(step)
            _run(asset, step)
    wrong = [f"{state.file} {state.state}" for state in verify(asset) if state.state != "ok"]
    if wrong:
        raise CheckFailed(f"{asset.key} was fetched, but {'; '.join(wrong)}: the package manager delivered another version")


def _run(asset: Asset, step: Step) -> None:
    if shutil.which(step.arguments[0]) is None:
        raise MissingAsset(f"{asset.key} needs {step.arguments[0]}, which is not on this machine; run elsewhere: {step}")
    arguments = list(step.arguments)
    if step.folder is not None:
        step.folder.mkdir(parents=True, exist_ok=True)
        arguments = [str(_newest(step.folder, item)) if "*" in item else item for item in arguments]
    done = subprocess.run(arguments, cwd=step.folder, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise MissingAsset(f"{asset.key}: exit status {done.returncode} from: {step}")


def _newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
