"""What README and docs show is what the code takes: commands, Python, configs, links."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from vitdense import METRICS, cli
from vitdense import config as configs
from vitdense.testing import check_metric

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "data").glob("*.md")])
COMMANDS = {"tools/train.py": ["train"], "tools/eval.py": ["eval"], "tools/predict.py": ["predict"]}

SECTIONS = {
    "model": {"backbone", "neck", "head"},
    "data": {"dataset", "root", "train", "val", "transforms", "workers"},
}
"""Keys by which a block is known to show the inside of a section."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(language: str) -> list:
    """Fenced blocks of a language, as pytest parameters named by page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^ *```({language})\n(.*?)^ *```", text, re.M | re.S):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(match[2], id=f"{name_of(page)}:{line}"))
    return found


def commands_in(text: str) -> list[list[str]]:
    """Arguments for `vitdense` of each line that runs it or one of the tools."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        words = [] if line.startswith("#") else shlex.split(line.split("  #")[0])
        while words and re.fullmatch(r"\w+=\S*|(\S*/)?python3?|\$\(BIN\)/python|-m", words[0]):
            words = words[1:]
        if words and words[0].split("/")[-1] == "vitdense":
            found.append(words[1:])
        elif words and words[0].removeprefix("./") in COMMANDS:
            found.append(COMMANDS[words[0].removeprefix("./")] + words[1:])
    return found


def check_command(words: list[str]) -> None:
    if len(words) == 1:  # a sentence that only names the command
        words = [*words, "--help"]
    try:
        cli.parse(words)
    except SystemExit as stop:
        assert stop.code == 0, f"the command line refuses: {' '.join(words)}"
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).exists(), f"{word} does not exist"


def test_the_readme_has_commands_and_python():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\b(vitdense |tools/)train", text)
    assert re.search(r"\b(vitdense |tools/)predict", text)
    assert "```python" in text and "vitdense.load(" in text


@pytest.mark.parametrize("block", blocks("sh|shell|bash|console"))
def test_commands_parse(block):
    for words in commands_in(block):
        check_command(words)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^\$? ?make ([\w-]+)", block, re.M)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_parse(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for code in re.findall(r"`((?:vitdense|tools/\w+\.py) [^`|.…]+)`", text.replace("\n", " ")):
        for words in commands_in(code):
            check_command(words)


@pytest.mark.parametrize(
    "file", [ROOT / "Makefile", *sorted((ROOT / "configs").rglob("*.yaml"))], ids=name_of
)
def test_commands_of_configs_and_makefile_parse(file):
    lines = [
        line
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.match(r"#\s+(python )?(tools/|vitdense )|\t\$\(BIN\)/python tools/", line)
    ]
    commands = commands_in("\n".join(line.lstrip("#\t ") for line in lines))
    assert commands
    for words in commands:
        check_command(words)


@pytest.mark.parametrize("block", blocks("python|py"))
def test_python_compiles(block):
    code = compile(block, "block", "exec")
    assert code.co_code


def test_the_metric_of_the_docs_conforms():
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    use, own = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    exec(use + "\nscore = metric.compute()['AP']", names)
    assert names["score"] == pytest.approx(1)
    try:
        exec(own, names)
        check_metric(names["Counts"])
    finally:
        METRICS._classes.pop("counts")


@pytest.mark.parametrize("block", blocks("yaml|yml"))
def test_yaml_is_a_valid_part_of_a_config(block):
    """Set on top of a demo config, so that a block may show only what it is about."""
    task = "detection" if re.search(r"detr|coco|yolo", block) else "segmentation"
    text = re.sub(r"^base:.*\n", "", block, flags=re.M).replace("my_project.", "examples.")
    for section, keys in SECTIONS.items():
        if set(re.findall(r"^(\w+):", text, re.M)) <= keys:
            text = f"{section}:\n" + textwrap.indent(text, "  ")
    text = f"base: configs/demo/{task}.yaml\n{text}"
    config = configs.loads(text, str(ROOT / "block.yaml"))
    assert configs.dump(config)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"https?:|mailto:", target):
            assert (page.parent / target).exists(), f"{name_of(page)}: {target} does not exist"
