"""What came from the environment reaches the model, and nothing that is written or said."""

from __future__ import annotations

import base64
import json
import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from commands import run_llmpipe
from traps import Said

import llmpipe
from llmpipe import EchoRunner, LedgerError, LLMConfigError, LLMError, RunConfig, compose
from llmpipe.config import BACKENDS, BackendConfig, DatasetConfig, conf_dir
from llmpipe.datasets import Dataset
from llmpipe.export import export
from llmpipe.fingerprint import fingerprint
from llmpipe.ledger import saved_arguments
from llmpipe.plan import SHOWN_CHARACTERS, plan
from llmpipe.redaction import RedactedFormatter, change, conceal, redacted, sealed
from llmpipe.runners.weights import BUNDLED_DIR

HEAD, TAIL = "c4n4ryHead", "c4n4ryTail"
SECRET = f'{HEAD} it\'s "quoted" <b>&é\\ \n {TAIL}'
NUMBER = "918273645"
TOOLS = json.dumps([{"type": "function", "function": {"name": "f", "description": SECRET}}])
ENVIRONMENT = {"SECRET": SECRET, "NUMBER": NUMBER, "TOOLS": TOOLS, "LIST": f"[a, '{HEAD}', {{b: {TAIL}}}]"}
BOUNDARIES = [base64.b64encode(b" " * shift + HEAD.encode())[4:12] for shift in range(3)]
TRACES = [HEAD.encode(), TAIL.encode(), NUMBER.encode(), *BOUNDARIES]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def check_hidden(*texts: Any) -> None:
    """Look for the values in texts, and in every file of directories."""
    for text in texts:
        if isinstance(text, Path):
            for file in filter(Path.is_file, text.rglob("*")):
                found = [trace for trace in TRACES if trace in file.read_bytes() or trace in str(file).encode()]
                assert not found, (file, found)
        else:
            data = (text if isinstance(text, str) else json.dumps(text)).encode()
            assert not [trace for trace in TRACES if trace in data], text


# --- every option -----------------------------------------------------------------------------------------------------


VALUES = {"list": "[a,'b ${oc.env:SECRET}']", "dict": "{a:'${oc.env:SECRET}'}", "str": "${oc.env:SECRET}"}
ANY = [*VALUES.values(), "${oc.env:NUMBER}"]


def options_of(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every option that can hold text, with text from the environment for it."""
    for f in fields(config):
        if f.name == "backend":  # chooses a file
            continue
        inner = getattr(config, f.name)
        if is_dataclass(inner):
            yield from options_of(inner, f"{path}{f.name}.")
        else:
            kind = next((kind for kind in VALUES if kind in str(f.type)), None)
            values = [VALUES[kind]] if kind else ANY if f.type == "Any" else []
            yield from ((path + f.name, value) for value in values)


OPTIONS = [
    *(("echo", *option) for option in options_of(RunConfig("???", dataset=DatasetConfig("x")))),
    *dict.fromkeys(
        (name.group, f"backend.{option}", value)
        for name, schema in BACKENDS.items()
        for option, value in options_of(schema())
        if name.group == "llama_cpp" or option not in {f.name for f in fields(BackendConfig)}
    ),
]


@pytest.mark.parametrize(("backend", "option", "value"), OPTIONS)
def test_an_option_shows_its_reference_in_every_listing_and_message(
    backend: str, option: str, value: str, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl({"prompt": "hi"})
    try:
        config = compose([f"backend={backend}", f"dataset.path={path}", f"{option}={value}"])
        assert "${oc.env:" in json.dumps(config.written())
        check_hidden(config.written())
        check_hidden(fingerprint(config, Dataset(config.dataset).scan()))
    except LLMError as error:
        check_hidden(str(error))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${oc.env:SECRET}", SECRET),
        ("a ${oc.env:SECRET} b", f"a {SECRET} b"),
        ("${oc.env:SECRET,else}", SECRET),
        ("${oc.env:UNSET,else}", "else"),
        ("${oc.decode:'\"${oc.env:NUMBER}\"'}", NUMBER),
        ("${prompt.chat_template_kwargs.key}", SECRET),
        ("${oc.select:prompt.chat_template_kwargs.key}", SECRET),
    ],
)
def test_the_model_gets_the_value_and_the_listing_what_was_written(text: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "prompt").mkdir()
    quoted = text.replace("'", "''")
    (tmp_path / "prompt" / "mine.yaml").write_text(
        f"system: '{quoted}'\nchat_template_kwargs:\n  key: ${{oc.env:SECRET}}\n  keys: [a, '${{..key}}']\n"
    )
    config = compose(["backend=echo", "prompt=mine"], config_dir=tmp_path)
    assert config.prompt.system == value
    assert config.written()["prompt"]["system"] == text
    assert config.prompt.chat_template_kwargs == {"key": SECRET, "keys": ["a", SECRET]}
    assert config.written()["prompt"]["chat_template_kwargs"] == {"key": "${oc.env:SECRET}", "keys": ["a", "${..key}"]}


@pytest.mark.parametrize(
    ("option", "said"),
    [("sampling.temperature", "no Float"), ("prompt.tools", "cannot be read"), ("seed", "an integer")],
)
def test_a_value_that_cannot_be_read_is_not_shown_in_pieces(option: str, said: str) -> None:
    with pytest.raises(LLMConfigError) as refused:
        compose(
            [f"{option}='${{oc.decode:${{oc.env:SECRET}}}}'"]
            if option == "prompt.tools"
            else [f"{option}=${{oc.env:SECRET}}"]
        )
    assert said in str(refused.value) and "${oc.env:SECRET}" in str(refused.value)
    check_hidden(str(refused.value), str(refused.value.__cause__))


@pytest.mark.parametrize("value", ["-3", "hi"])
def test_a_refused_value_is_shown_as_its_reference_however_short_it_is(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORT", value)
    for option in ("sampling.top_k", "seed", "dataset.limit", "prompt.add_bos", "backend.slots"):
        with pytest.raises(LLMConfigError) as refused:
            compose(["backend=llama_cpp", f"{option}=${{oc.env:SHORT}}"])
        assert "'${oc.env:SHORT}' is not allowed" in str(refused.value)


# --- a run, and all that is done with one -----------------------------------------------------------------------------

SECRETIVE = [
    *("prompt.system=You know ${oc.env:SECRET}", "+prompt.chat_template_kwargs.key=${prompt.system}"),
    "+prompt.chat_template_kwargs.list='${oc.decode:${oc.env:LIST}}'",
    *("prompt.tools=${oc.env:TOOLS}", "sampling.stop=['${oc.env:SECRET}']", "seed=${oc.env:NUMBER}"),
    *("output.prefix=${oc.env:UNSET,x_}", "metrics.memory_interval_s=${oc.env:UNSET,0.5}"),
]


@pytest.fixture
def rows(write_jsonl: Callable[..., Path]) -> Path:
    asked = [[{"role": "user", "content": f"What is {i} + 2?"}] for i in range(3)]
    return write_jsonl(*({"id": f"r{i}", "messages": chat} for i, chat in enumerate(asked)), {"id": "bad"})


def test_no_artifact_log_or_message_of_a_run_has_a_value(rows: Path, tmp_path: Path) -> None:
    run = [*SECRETIVE, f"dataset.path={rows}", "sampling.max_tokens=4"]
    done = run_llmpipe(*run, "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    check_hidden(tmp_path, done.stdout, done.stderr)
    assert saved_arguments(tmp_path / "out") == run
    assert "You know ${oc.env:SECRET}" in (tmp_path / "out" / "report.html").read_text()
    alone = run_llmpipe("resume", "out", cwd=tmp_path)  # a directory does not decide what is asked of the environment
    assert alone.returncode == 1 and "prompt.system=You know ${oc.env:SECRET}" in alone.stderr
    again = run_llmpipe("resume", "out", *SECRETIVE, cwd=tmp_path)
    assert again.returncode == 3, again.stderr
    changed = run_llmpipe("resume", "out", *SECRETIVE, cwd=tmp_path, SECRET=f"{HEAD} and more")
    assert changed.returncode == 1
    assert "prompt.system is You know ${oc.env:SECRET} as before, but with another value" in changed.stderr
    missing = run_llmpipe("resume", "out", *SECRETIVE, "prompt.system='${oc.env:UNSET}'", cwd=tmp_path)
    assert missing.returncode == 1 and "Environment variable 'UNSET' not found" in missing.stderr
    for process in (alone, again, changed, missing):
        check_hidden(tmp_path, process.stdout, process.stderr)


def test_no_plan_or_export_has_a_value(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmpipe.terminal import show_plan

    config = compose([*SECRETIVE, f"dataset.path={rows}", "sampling.max_tokens=4"])
    found = plan(config, tmp_path / "plan")
    show_plan(found, tmp_path / "plan")
    assert "You know ${oc.env:SECRET}" in found["prompts"][0]["text"]
    llmpipe.run(config, tmp_path / "out")
    plan(config, tmp_path / "out")
    export(config, tmp_path / "out")
    check_hidden(found, tmp_path, capsys.readouterr().out)


def test_no_directory_table_or_log_of_a_sweep_has_a_value(rows: Path, tmp_path: Path) -> None:
    done = run_llmpipe(
        *("-m", "backend=echo", f"dataset.path={rows}", "prompt.system='a ${oc.env:SECRET}','b ${oc.env:SECRET}'"),
        *("hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}${hydra.job.override_dirname}"),
        *("hydra.job.config.override_dirname.exclude_keys=[dataset.path]", "hydra/job_logging=default"),
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stderr
    assert len(list((tmp_path / "sweep").glob("*/report.html"))) == 2
    assert "a ${oc.env:SECRET}" in done.stdout.replace("\\", "")
    check_hidden(tmp_path, done.stdout, done.stderr)


@pytest.mark.parametrize("value", ["a ${oc.env:SECRET}", "\\${oc.env:SECRET}", "${prompt.template}"])
def test_no_sweep_over_the_environment_is_written_out(value: str, place: Path, said: Said) -> None:
    (place / "mine.yaml").write_text(
        "defaults: [config, _self_]\nprompt: {template: '${oc.env:SECRET}'}\n"
        f"hydra: {{mode: MULTIRUN, sweeper: {{params: {{seed: '1,2', prompt.system: '{value}'}}}}}}\n"
    )
    chosen = ["--config-dir=.", "--config-name=mine", "backend=echo", "dataset.path=rows.jsonl"]
    code, error = said(*chosen, "hydra.sweep.dir=sweep")
    assert code == 1 and error.count("\n") == 1 and not (place / "sweep").exists(), error
    assert f"hydra.sweeper.params.prompt.system={value!r} is not allowed; it must be on the command line" in error
    check_hidden(error)


LEAKY = """
import logging
from dataclasses import dataclass, field
from llmpipe import BaseLLMRunner, Chunk
from llmpipe.config import BackendConfig
from llmpipe.runners.facts import Facts

@dataclass
class LeakyConfig(BackendConfig):
    key: str = ""
    headers: dict = field(default_factory=dict)

class Leaky(BaseLLMRunner):
    config_type = LeakyConfig

    def _initialize_model(self):
        logging.getLogger("leaky").warning("opened with %s and %r", self.config.key, self.config.headers)
        if self.config.model == "load":
            raise RuntimeError(f"no model for {self.config.headers}")

    def stream(self, requests):
        for request in requests:
            if request.prompt == "fail":
                yield Chunk(request.id, 0, finish_reason="error", error=f"denied: {self.config.headers}")
            elif request.prompt == "raise":
                raise RuntimeError(f"denied: {self.config.key}")
            else:
                yield Chunk(request.id, 0, "ok", "stop")

    def info(self):
        if self.config.model == "info":
            raise RuntimeError(f"no word of {self.config.key}")
        return {"model": self.config.model, "key": self.config.key, "with": [self.config.headers]}

    def facts(self):
        return Facts(decides={"key": self.config.key})
"""


@pytest.mark.parametrize("isolation", ["true", "false"])
@pytest.mark.parametrize(("fault", "code"), [("fail", 3), ("raise", 1), ("load", 1), ("info", 1)])
def test_a_backend_of_someone_elses_leaks_nothing_that_it_was_given(
    fault: str, code: int, isolation: str, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    (tmp_path / "leaky.py").write_text(LEAKY)
    path = write_jsonl({"prompt": "hi"}, {"prompt": fault})
    (tmp_path / "backend").mkdir()
    (tmp_path / "backend" / "leaky.yaml").write_text(
        "_target_: leaky.Leaky\nkey: ${oc.env:SECRET}\n"
        "headers: {Authorization: 'Bearer ${oc.env:SECRET}', n: '${oc.env:NUMBER}'}\n"
    )
    done = run_llmpipe(
        *("--config-dir=.", "backend=leaky", f"+backend.model={fault}", f"+backend.isolation={isolation}"),
        *(f"dataset.path={path}", "trusted_modules=[leaky]", "hydra.run.dir=out"),
        cwd=tmp_path,
    )
    assert done.returncode == code, done.stderr
    said = (tmp_path / "out" / "run.log").read_text()
    assert "opened with ${oc.env:SECRET}" in said and "Bearer ${oc.env:SECRET}" in said
    check_hidden(tmp_path / "out", done.stdout, done.stderr)


def test_what_a_job_fails_with_goes_without_values_to_whoever_shows_it(place: Path, said: Said) -> None:
    (place / "leaky.py").write_text(LEAKY)
    (place / "backend").mkdir()
    (place / "backend" / "leaky.yaml").write_text("_target_: leaky.Leaky\nkey: ${oc.env:SECRET}\nmodel: info\n")
    chosen = ["--config-dir=.", "backend=leaky", "dataset.path=rows.jsonl", "trusted_modules=[leaky]"]
    with pytest.raises(RuntimeError, match=r"no word of \$\{oc.env:SECRET\}") as failed:
        said(*chosen, "hydra.run.dir=out")
    check_hidden(str(failed.value))


@pytest.mark.parametrize("isolation", ["true", "false"])
def test_a_refusal_of_the_chat_template_is_not_cut_within_a_value(
    isolation: str, tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", HEAD + "." * 2000)
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no: ' + messages[0]['content']) }}")
    path = write_jsonl({"prompt": "hi"})
    config = compose(
        [
            *(f"dataset.path={path}", "prompt.system='${oc.env:SECRET}'", f"backend.chat_template={tmp_path}/t.jinja"),
            *(f"backend.isolation={isolation}", "prompt=chat"),
        ]
    )
    try:
        llmpipe.run(config, tmp_path / "out")
    except LLMError as error:  # what fails every row is refused before
        check_hidden(str(error))
        assert "${oc.env:SECRET}" in str(error)
    check_hidden(tmp_path / "out")


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(rows: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run, or go on with a run, in one directory."""

    def run(*overrides: str) -> dict[str, Any]:
        return llmpipe.run(compose(["backend=echo", f"dataset.path={rows}", *overrides]), tmp_path / "r")

    run("prompt.system='${oc.env:SECRET}'", "output.prefix=${oc.env:NUMBER}")
    return run


def test_a_run_goes_on_where_the_value_is_the_same_however_it_is_written(
    begun: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RENAMED", SECRET)
    monkeypatch.setattr(EchoRunner, "stream", lambda *_: pytest.fail("computed again"))
    for system in ("${oc.env:SECRET}", "${oc.env:RENAMED}", "${oc.env:RENAMED,else}"):
        begun(f"prompt.system='{system}'", "output.prefix=${oc.env:NUMBER}")


def test_another_value_is_refused_and_neither_is_named(
    begun: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LedgerError, match=r"prompt.system was '\$\{oc.env:SECRET\}', is 'plain'") as refused:
        begun("prompt.system=plain")
    check_hidden(str(refused.value))
    monkeypatch.setenv("SECRET", TAIL * 2)
    with pytest.raises(LedgerError, match=r"prompt.system is \$\{oc.env:SECRET\} as before, but with") as refused:
        begun("prompt.system='${oc.env:SECRET}'")
    check_hidden(str(refused.value))


def test_files_are_written_again_when_the_value_of_an_output_option_changes(
    begun: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NUMBER", "x_")
    begun("prompt.system='${oc.env:SECRET}'", "output.prefix=${oc.env:NUMBER}")
    assert "x_completion" in json.loads((tmp_path / "r" / "outputs.jsonl").read_text().splitlines()[0])


def test_a_digest_cannot_be_compared_between_runs(rows: Path) -> None:
    config = compose(["backend=echo", f"dataset.path={rows}", "prompt.system='${oc.env:SECRET}'"])
    scan = Dataset(config.dataset).scan()
    one, two = (fingerprint(config, scan)["prompt"]["system"] for _ in range(2))
    assert one != two and one.startswith("${oc.env:SECRET} (scrypt ")


def test_paths_may_come_from_the_environment(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setenv("MODELS", str(BUNDLED_DIR))
    config = compose(
        [
            *("dataset.path=${oc.env:DATA}/*.jsonl", "backend.model=${oc.env:MODELS}/tiny-chat.gguf"),
            *("output.source=true", "sampling.max_tokens=3"),
        ]
    )
    for _ in range(2):
        metrics = llmpipe.run(config, tmp_path / "out")
    assert metrics["runner"]["model"] == "${oc.env:MODELS}/tiny-chat.gguf"
    assert metrics["model_digest"].startswith("sha256:")
    first = json.loads((tmp_path / "out" / "outputs.jsonl").read_text().splitlines()[0])
    assert first["source_file"] == str(rows)
    monkeypatch.setenv("FILE", str(rows))
    llmpipe.run(compose(["backend=echo", "dataset.path=${oc.env:FILE}"]), tmp_path / "other")
    assert "${oc.env:FILE} line 1" in (tmp_path / "other" / "report.html").read_text()
    listing = config.written()
    assert listing["dataset"]["path"] == "${oc.env:DATA}/*.jsonl"
    assert redacted(f"llmpipe resume {tmp_path / 'out'}") == f"llmpipe resume {tmp_path / 'out'}"


# --- texts that others make -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [str, repr, json.dumps, lambda s: json.dumps(s, ensure_ascii=False), lambda s: [s]])
def test_a_value_is_found_in_texts_however_it_is_quoted(form: Callable[[str], Any]) -> None:
    conceal(SECRET, "${oc.env:SECRET}")
    for text in (SECRET, f"both kinds \" and ' of quotes, {SECRET}"):
        check_hidden(redacted(f"was {form(text)}, is not"))
        assert "${oc.env:SECRET}" in redacted(f"{form(text)}")


def test_what_is_inside_of_a_value_that_is_json_is_found() -> None:
    conceal(TOOLS, "${oc.env:TOOLS}")
    assert redacted(json.loads(TOOLS)[0]["function"]["description"]).startswith("${oc.env:")


def test_a_plan_does_not_cut_a_prompt_within_a_value(rows: Path, tmp_path: Path) -> None:
    before = "x" * (SHOWN_CHARACTERS - len(SECRET))  # and what the template has before it
    found = plan(compose([f"dataset.path={rows}", f"prompt.system='{before}${{oc.env:SECRET}}'"]), tmp_path)
    assert found["prompts"][0]["characters"] > 0
    check_hidden(found)


def test_a_changed_copy_of_a_configuration_hides_what_the_first_one_did() -> None:
    config = compose(["prompt.system='a ${oc.env:SECRET}'", "seed=${oc.env:NUMBER}"])
    changes = {"on_error": "stop"}
    for copy in (replace(config, **changes), config.replace(changes), pickle.loads(pickle.dumps(config))):
        assert copy.written()["prompt"]["system"] == "a ${oc.env:SECRET}"
    assert config.replace(changes).written()["seed"] == "${oc.env:NUMBER}"


def test_a_reference_is_left_as_it_is_when_a_text_is_looked_through_twice() -> None:
    conceal("SECRET", "${oc.env:SECRET}")
    assert redacted(redacted("SECRET")) == "${oc.env:SECRET}"


def test_words_that_are_everywhere_are_not_replaced() -> None:
    for value in ("1", "true", "", "auto"):
        conceal(value, "${oc.env:WORD}")
    assert redacted("auto: 1 is true") == "auto: 1 is true"


def test_a_traceback_in_the_log_has_no_value() -> None:
    conceal(SECRET, "${oc.env:SECRET}")
    try:
        raise RuntimeError(SECRET)
    except RuntimeError:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "failed: %s", (SECRET,), sys.exc_info())
    text = RedactedFormatter(None).format(record)
    assert "Traceback" in text and "RuntimeError: ${oc.env:SECRET}" in text
    check_hidden(text)


def test_what_is_sealed_is_kept_while_the_value_is_the_same() -> None:
    value, written = {"a": [1, "x"], "b": 2}, {"a": [1, "${oc.env:X}"], "b": 2}
    first = sealed(value, written)
    assert first["a"][0] == 1 and first["a"][1].startswith("${oc.env:X} (scrypt ") and first["b"] == 2
    assert sealed(value, written, first) == first
    assert sealed(value, value, first) == first
    other = sealed({"a": [1, "y"], "b": 2}, written, first)
    assert other != first and change(first["a"][1], other["a"][1]) == "is ${oc.env:X} as before, but with another value"
    assert change(first["a"][1], 3) == "was '${oc.env:X}', is 3"


def test_the_files_that_come_with_llmpipe_ask_nothing_of_the_environment() -> None:
    assert not [file for file in conf_dir().rglob("*.yaml") if "oc.env" in file.read_text()]
