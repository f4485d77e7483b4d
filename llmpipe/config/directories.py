"""Where the YAML files and the example datasets are, in a checkout and once installed."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """Return the directory of YAML files: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def data_dir() -> Path:
    """Return the directory of the example datasets, found as `conf_dir` finds its own."""
    return conf_dir().parent / "data"
