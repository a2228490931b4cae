"""The documentation against the code: links, commands, code blocks, the configuration reference."""

import functools
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from pr2jax.core.config import from_config_dict
from pr2jax.models.importers import families
from pr2jax.tasks import generated, registry
from pr2jax.train import config_reference
from pr2jax.train.config import Config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
name = lambda path: str(path.relative_to(ROOT))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Words that stand for what a reader puts in.
PLACEHOLDER = re.compile(r"\[|\.\.\.|NAME|configs/X")
# Written by what the command before it in the same text makes.
FROM_FILES = ("config.rl_plan",)


def prose(text: str) -> str:
    """A page without its code, in which nothing is a link."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        number = sum(1 for a in found if a == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", a))
        found.add(f"{slug}-{number}" if number else slug)
    return found


def links(path: Path) -> list[str]:
    """Targets of links and pictures that are not addresses of the web."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text()))
    return [t for t in targets if not re.match(r"[a-z]+:", t)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for target in links(page):
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        inside = there.is_relative_to(ROOT) and there.exists()
        if not inside or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


def test_the_checks_see_what_is_broken(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c: d\n## A\n## A\n[x](no.md) `[y](z)`\n```\n[q](r)\n```\n![p](#a-1)\n")
    assert anchors(page) == {"a-b-c-d", "a", "a-1"}
    assert links(page) == ["no.md", "#a-1"]
    told = list(commands("```bash\npython -m pr2jax.main \\\n  --config=a.py  # b\n```\n"))
    assert told == [["python", "-m", "pr2jax.main", "--config=a.py"]]


def commands(text: str) -> list[list[str]]:
    """Words of each command of ours in a page's code: `python -m pr2jax...` and `./launch/...`."""
    code = [body for _, body in FENCE.findall(text)]
    code += re.findall(r"`((?:python -m pr2jax|\./launch/)[^`\n]*)`", FENCE.sub("", text))
    found = []
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        start = re.search(r"(python -m pr2jax|\./launch/)\S*", line)
        if start and not PLACEHOLDER.search(line):
            words = shlex.split(line[start.start() :].rstrip("&; "), comments=True)
            found.append(words)
    return found


@functools.cache
def known_flags() -> frozenset[str]:
    import pr2jax.main  # noqa: F401 (defines them)

    return frozenset(flags.FLAGS)


def check_config(words: list[str]) -> None:
    """Loads --config and applies --config.key=value, as pr2jax.main does. Raises what it raises."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    own = [w for w in words if w.startswith("--config")]
    own = [w for w in own if not w.startswith(tuple(f"--{key}" for key in FROM_FILES))]
    argv = ["", *(re.sub(r"^(--config=)(?!/)", rf"\1{ROOT}/", w) for w in own)]
    with mock.patch.object(sys, "argv", argv):  # where the library looks for overrides
        values(argv)
    from_config_dict(Config, values["config"].value)


def check(words: list[str]) -> None:
    """Raises AssertionError, or what the configuration raises, for a command that cannot run."""
    if words[0].startswith("./launch/"):
        assert (ROOT / words[0]).is_file(), words[0]
    else:
        assert importlib.util.find_spec(words[2]), words[2]
    if words[:3] == ["python", "-m", "pr2jax.main"]:
        for word in words[3:]:
            if word.startswith("--") and not word.startswith("--config"):
                assert word[2:].partition("=")[0] in known_flags(), word
    if any(w.startswith("--config=") for w in words):
        check_config(words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_can_run(page):
    for words in commands(page.read_text()):
        try:
            check(words)
        except Exception as error:
            raise AssertionError(f"{' '.join(words)}: {error}") from error


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_commands_in_configs_can_run(path):
    docstring = path.read_text().split('"""')[1].replace("\\\\\n", "\\\n")
    for words in commands(f"```\n{docstring}```\n"):
        try:
            check(words)
        except Exception as error:
            raise AssertionError(f"{' '.join(words)}: {error}") from error


def test_a_command_that_cannot_run_is_seen():
    base = ["python", "-m", "pr2jax.main", "--config=configs/grpo.py"]
    check(base)
    for bad in ("--config.rl.stepss=3", "--config.rl.mini_steps=3", "--work_dir=x"):
        with pytest.raises(Exception, match="stepss|mini_steps|work_dir"):
            check([*base, bad])


def test_every_config_is_in_the_docs():
    text = (ROOT / "docs/curves.md").read_text() + (ROOT / "README.md").read_text()
    assert not [name(path) for path in CONFIGS if name(path) not in text]


def test_every_page_is_in_an_index():
    """Pages are reached from docs/README.md or docs/results.md."""
    shown = set()
    for index in (ROOT / "docs/README.md", ROOT / "docs/results.md"):
        shown |= {(index.parent / t.partition("#")[0]).resolve() for t in links(index)}
    indices = {ROOT / "README.md", ROOT / "docs/README.md"}
    pages = set(PAGES) - indices - {ROOT / "docs/results/replay_tables.md"}
    assert not [name(p) for p in pages if p not in shown]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_are_there(page):
    """`configs/...`, `pr2jax/...` and other paths from the root, in code within the text."""
    pattern = r"`((?:configs|pr2jax|tests|launch|docs|colabs)/[\w./-]+\.\w+)[:`]"
    missing = [p for p in re.findall(pattern, page.read_text()) if not (ROOT / p).exists()]
    assert not [p for p in missing if "NAME" not in p]


def test_configuration_reference_is_up_to_date():
    assert (ROOT / "docs/config.md").read_text() == config_reference.reference(), (
        "made again by: python -m pr2jax.train.config_reference > docs/config.md"
    )


def test_every_key_of_the_configuration_is_explained():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", config_reference.reference(), re.MULTILINE)
    assert len(rows) > 250
    assert not [key for key, meaning in rows if not meaning.strip()]


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(lang == "python" for lang, _ in FENCE.findall(p.read_text()))],
    ids=name,
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace; what they register is taken back."""
    monkeypatch.chdir(tmp_path)
    for table in (families.FAMILIES, registry.VERIFIERS, generated.GENERATORS):
        for key in ("qwen2", "words__", "differences"):
            monkeypatch.setitem(table, key, None)  # so that monkeypatch takes the page's back
            del table[key]
    space: dict = {}
    for language, body in FENCE.findall(page.read_text()):
        if language == "python":
            exec(compile(body, name(page), "exec"), space)
