"""Backslash escapes between quotes on the command line mean what they say, once; all else is as it was typed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llmpipe import LLMConfigError, compose
from llmpipe.cli import main
from llmpipe.config.escapes import KEYS, read_escapes
from llmpipe.config.messages import in_words

TEXTS = st.text(st.sampled_from("\\\"'ntrué0 \n\t{}"), max_size=12)
LINES = "line one\nline two\nline three"


@pytest.mark.parametrize(
    ("override", "stops"),
    [
        (r'sampling.stop=["\n"]', ["\n"]),
        (r"sampling.stop=['\n','\t\r']", ["\n", "\t\r"]),
        (r'++sampling.stop=["a\"b",word]', ['a"b', "word"]),
        (r"""sampling.stop=["it\'s"]""", ["it's"]),
        (r'sampling.stop=["\\n"]', [r"\n"]),
        (r'sampling.stop=["a\\"]', ["a\\"]),
        (r'sampling.stop=["a\\\"b"]', [r"a\"b"]),
        (r'sampling.stop=["\u00e9\ud83d\ude42"]', ["é🙂"]),
        (r'sampling.stop=["\d+\.","C:\dir"]', [r"\d+\.", r"C:\dir"]),
        ('sampling.stop=["\n"]', ["\n"]),
        ("sampling.stop=[a]", ["a"]),
    ],
)
def test_escapes_between_quotes_are_what_they_mean_in_stop_strings(override: str, stops: list[str]) -> None:
    assert compose([override]).sampling.stop == stops


def test_escapes_are_read_in_text_that_is_meant_for_the_model_and_nowhere_else() -> None:
    typed = [r'prompt.template="Q: {prompt}\nA:"', r'prompt.system="Be \"brief\".\n"', r'output.prefix="C:\new"']
    config = compose([*typed, r'dataset.path="C:\new\table.jsonl"', r'prompt.system="last\t"'])
    assert config.prompt.template == "Q: {prompt}\nA:"
    assert config.prompt.system == "last\t"
    assert (config.output.prefix, config.dataset.path) == (r"C:\new", r"C:\new\table.jsonl")


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        (r"sampling.stop=[\n]", r"""'sampling.stop=["\n"]' for what .* 'sampling.stop=["\\n"]' for two"""),
        (r"prompt.system=C:\new", r"""'prompt.system="\n"' for what .* 'prompt.system="\\n"' for two"""),
    ],
)
def test_escapes_outside_of_quotes_are_refused_with_the_remedy(override: str, remedy: str) -> None:
    with pytest.raises(LLMConfigError, match=remedy.replace("\\", "\\\\").replace("[", r"\[").replace("]", r"\]")):
        compose([override])


@given(text=TEXTS, quote=st.sampled_from("\"'"))
def test_any_text_can_be_typed(text: str, quote: str) -> None:
    typed = "".join({"\\": r"\\", "\n": r"\n", "\t": r"\t", quote: f"\\{quote}"}.get(c, c) for c in text)
    config = OmegaConf.create({"prompt": {"system": "before"}, "sampling": {"stop": []}})
    read_escapes(config, [f"prompt.system={quote}{typed}{quote}", f"sampling.stop=[a,{quote}{typed}{quote}]"])
    if "\\" in typed:  # else there is nothing to read
        assert config == {"prompt": {"system": text}, "sampling": {"stop": ["a", text]}}


@given(text=st.text(st.sampled_from("ab =~é#&;!,'\"\\[]{}()$`<\n*"), min_size=1, max_size=8))
@example("a=b")
@example("it's a=b")
@example("[a=b, c]")
def test_a_value_that_cannot_be_read_is_shown_as_a_shell_has_to_be_told(text: str) -> None:
    parser = OverridesParser.create()
    try:
        parser.parse_overrides([f"prompt.system={text}"])
    except OverrideParseException as error:
        message = in_words(error)
        assert "\n" not in message and repr(f"prompt.system={text}") in message
        shown = message.partition("inside the shell's: ")[2]
        told = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, text=True, check=True).stdout
        value = parser.parse_override(told).value()
        inner = text[1:-1] if text[1:] and text[0] == text[-1] and text[0] in "\"'" else text
        assert value == inner or (isinstance(value, list) and inner[0] == "[")


def test_a_file_of_options_has_been_read_by_yaml(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    texts = {"stop": ["\n", r"\n"]}
    lines = ["# @package _global_", f"sampling: {json.dumps(texts)}", r"prompt: {template: '{prompt}\n'}"]
    (tmp_path / "experiment" / "mine.yaml").write_text("\n".join(lines))
    config = compose(["+experiment=mine"], tmp_path)
    assert (config.sampling.stop, config.prompt.template) == (["\n", r"\n"], r"{prompt}\n")


def test_a_run_stops_at_a_line_break_and_so_does_its_resumption_and_a_sweep(
    write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    data = write_jsonl({"prompt": LINES})
    fixed = ["backend=echo", f"dataset.path={data}"]

    def completion(directory: Path) -> str:
        return str(json.loads((directory / "outputs.jsonl").read_text())["completion"])

    typed = [r'sampling.stop=["\n","\\n"]', r'prompt.template="{prompt} \\n\n"']
    assert main([*fixed, *typed, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    assert completion(tmp_path / "one") == "line one"
    before = (tmp_path / "one" / "outputs.jsonl").read_bytes()
    assert main(["resume", str(tmp_path / "one")]) == 0  # refused if the same text had become another
    assert (tmp_path / "one" / "outputs.jsonl").read_bytes() == before
    sweep = [f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=job-${hydra.job.num}"]
    assert main(["-m", *fixed, r'sampling.stop=["\n"],["\x","\ntwo"]', *sweep]) == 0
    assert [completion(tmp_path / f"job-{i}") for i in range(2)] == ["line one", LINES]


def test_the_keys_whose_escapes_are_read_are_there() -> None:
    config = compose()
    for key in KEYS:
        group, name = key.split(".")
        assert hasattr(getattr(config, group), name)
