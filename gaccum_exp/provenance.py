"""Where a result comes from: commit, command, versions, machine."""

import importlib.metadata
import platform
import subprocess
from functools import cache

import torch

PACKAGES = ("gaccum_exp", "torch", "torchvision", "hydra-core", "mlflow", "numpy")


def environment_tags() -> dict[str, str]:
    """Return what is the same for every run of this process."""
    tags = {"host": platform.node(), "python": platform.python_version(), "git_commit": git_commit()}
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            tags[f"version.{package}"] = "not installed"
    return tags


def device_tags(device: torch.device) -> dict[str, str]:
    """Return what the run computes on: `cpu` or the accelerator's own name, and its CPU threads."""
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "threads": str(torch.get_num_threads())}


@cache
def git_commit() -> str:
    """Return the working directory's commit, marked where files differ from it; `none` outside git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return "none"
    return commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
