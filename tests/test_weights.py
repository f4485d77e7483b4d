"""A model's name → its files and digest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from llmpipe import LLMInitializationError
from llmpipe.runners import digests
from llmpipe.runners.digests import model_digest
from llmpipe.runners.weights import BUNDLED_DIR, find_checkpoint, find_gguf, hub_commit, local_path


@pytest.mark.parametrize("model", ["owner/name", "owner/name:Q4_K_M", "owner/name:file-Q4_K_M.gguf"])
def test_a_hub_id_is_no_local_path(model: str) -> None:
    assert local_path(model) is None
    assert model_digest(model) == f"hub:{model}"


@pytest.mark.parametrize(
    "model", ["./nowhere", "/no/where", "~/nowhere", "nowhere", "a/b/c", "owner/file.gguf", "dir/model.safetensors"]
)
def test_a_name_that_can_only_be_a_path_and_is_not_there_is_refused(model: str) -> None:
    with pytest.raises(LLMInitializationError, match="does not exist .*it must be a file, a directory, a hub id"):
        local_path(model)


def test_an_existing_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_path("owner/name") == Path("owner/name")


def test_the_one_gguf_of_a_directory_is_found_and_several_are_listed(tmp_path: Path) -> None:
    with pytest.raises(LLMInitializationError, match="no GGUF file .*use backend=transformers"):
        find_gguf(str(tmp_path))
    (tmp_path / "a-00001-of-00002.gguf").write_bytes(b"GGUF")
    (tmp_path / "a-00002-of-00002.gguf").write_bytes(b"GGUF")
    assert find_gguf(str(tmp_path)).name == "a-00001-of-00002.gguf"
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(LLMInitializationError, match=r"2 GGUF files .*name one: backend.model=.*a-00001.*b\.gguf"):
        find_gguf(str(tmp_path))


def test_a_directory_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(LLMInitializationError, match=r"no config\.json"):
        find_checkpoint(str(tmp_path))
    assert find_checkpoint("bundled") == str(BUNDLED_DIR)


HUB = ["README.md", "m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "m-F16.gguf"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub with one repository; the list says what was downloaded."""
    import huggingface_hub

    downloaded: list[str] = []

    def download(repo: str, name: str, local_files_only: bool) -> str:
        assert repo == "owner/m-GGUF" and not local_files_only
        downloaded.append(name)
        return str(tmp_path / name)

    monkeypatch.setattr("llmpipe.runners.hub.is_needed", lambda model, cached: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: HUB)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return downloaded


@pytest.mark.parametrize("pattern", ["Q4_K_M", "q4_k_m", "m-Q4_K_M.gguf"])
def test_the_file_of_a_hub_id_that_the_pattern_names_is_downloaded(pattern: str, hub: list[str]) -> None:
    assert find_gguf(f"owner/m-GGUF:{pattern}").name == "m-Q4_K_M.gguf"
    assert hub == ["m-Q4_K_M.gguf"]


def test_all_parts_of_a_split_file_are_downloaded_and_nothing_else(hub: list[str]) -> None:
    assert find_gguf("owner/m-GGUF:Q8_0").name == "m-Q8_0-00001-of-00002.gguf"
    assert hub == HUB[2:4]


def test_several_files_on_the_hub_are_listed_with_what_to_write(hub: list[str]) -> None:
    with pytest.raises(LLMInitializationError, match="3 GGUF files .*backend.model=owner/m-GGUF:m-Q4_K_M.gguf"):
        find_gguf("owner/m-GGUF")
    assert hub == []


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("llmpipe.runners.hub.is_needed", lambda model, cached: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    with pytest.raises(LLMInitializationError, match="ConnectionError.*give a local file"):
        find_gguf("owner/name")


def test_a_file_of_the_cache_is_found_in_its_folder_and_one_that_is_not_there_is_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository, commit = tmp_path / "models--owner--name", "a" * 40
    file = repository / "snapshots" / commit / "Q8_0" / "m-Q8_0.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert find_gguf("owner/name:q8_0") == file and hub_commit("owner/name:q8_0", file) == commit
    with pytest.raises(LLMInitializationError, match="'owner/name:q4_0': the hub .* does not answer"):
        find_gguf("owner/name:q4_0")


def test_a_digest_tells_models_apart_and_not_where_they_are(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED_DIR, tmp_path / "copy")
    assert model_digest(str(tmp_path / "copy")) == model_digest("bundled")
    (tmp_path / "copy/README.md").write_text("a note changes nothing")
    assert model_digest(str(tmp_path / "copy")) == model_digest("bundled")
    with (tmp_path / "copy/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert model_digest(str(tmp_path / "copy")) != model_digest("bundled")


def test_a_large_file_is_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)
    file = tmp_path / "large.gguf"
    file.write_bytes(bytes(20 * 2**20))
    before = model_digest(str(file))
    for offset in (0, 20 * 2**20 - 1):
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"\x01")
        after = model_digest(str(file))
        assert after != before
        before = after
