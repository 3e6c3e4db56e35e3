"""README.md, CONTRIBUTING.md and docs/: what they show runs, what they name exists, figures agree.

Python blocks are run as they are; commands too, with settings behind them that make them short.
What needs a GPU, several machines or the hub is read by the parsers that would read it there.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import typer
from marks import slow
from packaging.requirements import Requirement
from typer.testing import CliRunner

from hybrid_sleep.cli.app import app
from hybrid_sleep.eval.facts.world import World
from hybrid_sleep.parametric import workspace
from hybrid_sleep.training import load_run_config, train

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

SMALL = [
    "model.hidden_size=16", "model.intermediate_size=16", "model.num_attention_heads=2",
    "model.linear_num_key_heads=2", "model.linear_num_value_heads=2",
    "model.linear_key_head_dim=8", "model.linear_value_head_dim=8",
]  # fmt: skip
BRIEF = ["train.steps=1", "train.warmup=0", "train.batch_size=2", "train.eval_every=1",
         "train.eval_examples=2"]  # fmt: skip
OF_TEXT = ["model.window=8", "text.length=16"]
# Models that commands and blocks start from: a config and its changes.
MODELS = {
    "rule110_cpu": ["rule110_cpu", *SMALL, *BRIEF],
    "rule110": ["rule110_cpu", *SMALL, *BRIEF, "task.params={width: 24, states: 4, steps: 8}",
                "model.window=24", "sleep_passes=2"],
    "depo_cpu": ["depo_cpu", *SMALL, *BRIEF],
    "circuit_cpu": ["circuit_cpu", *BRIEF],
    "text_cpu": ["text_cpu", *SMALL, *BRIEF, *OF_TEXT, "text.files=[my.txt]",
                 "text.separator=null"],
}  # fmt: skip
MODELS["my_text"] = MODELS["text_cpu"]
# A folder of facts, of a model that is small.
FACTS = [
    "facts", "learn", "out/facts", "Ada Byron lives in Lisbon.", "--dtype", "float32",
    "--model", str(ROOT / "eval/facts/checkpoints/seed0"), "--set", "layers=[2]",
    "--set", "wake.position=prompt_last", "--set", "night.position=prompt_last",
]  # fmt: skip
EXPERIENCE = [
    "experience", "add", "out/facts", "Ada Byron moved on Monday.", "--source", "ada", "--consent",
]  # fmt: skip
# What stands behind a command to make it short: that of the longest beginning that fits. Commands
# without an entry are short as they are.
SHORT = {
    "hybrid-sleep train configs/runs/rule110_cpu.yaml": [*SMALL, *BRIEF],
    "hybrid-sleep train configs/runs/circuit_": BRIEF,
    "hybrid-sleep train configs/runs/ancestor_cpu.yaml": BRIEF,
    "hybrid-sleep train configs/runs/text_cpu.yaml": [*SMALL, *BRIEF, *OF_TEXT],
    "hybrid-sleep train out/my_text/run.yaml": ["train.steps=1"],
    "hybrid-sleep bench depth out/": ["--count", "4"],
    "hybrid-sleep bench depth configs/": [*SMALL, *BRIEF, "--count", "4"],
    "hybrid-sleep bench ablate": [*SMALL, *BRIEF, "--count", "4", "--seeds", "0"],
    "hybrid-sleep bench map": [*SMALL, *BRIEF, "--count", "4", "--depths", "1,2", "--seeds", "0"],
    "hybrid-sleep bench cost": ["--hidden", "16", "--layers", "2", "--window", "8", "--windows",
                                "1", "--depths", "2", "--repeats", "2"],
    "hybrid-sleep bench cost --model": ["--windows", "1", "--depths", "2", "--repeats", "2",
                                        "--cycles", "2"],
    "hybrid-sleep bench sleep": ["--minutes", "0.02"],
    "hybrid-sleep bench generation": ["--windows", "2", "--window", "4", "--repeats", "2"],
    "hybrid-sleep bench decoding": ["--hidden", "64", "--layers", "2", "--window", "20",
                                    "--repeats", "2", "--windows", "0", "--batches", "1"],
    "hybrid-sleep bench train": ["--repeats", "2", "--minutes", "0.02"],
    "hybrid-sleep bench kernels": ["--repeats", "2", "--minutes", "0.02"],
    "hybrid-sleep experience sleep": [
        "--set", "study.tokens=200", "--set", "study.dreams=0", "--set", "study.foundation=64",
        "--set", "study.measured=2", "--set", "study.share=1.0",
    ],
    "hybrid-sleep bench continual": ["--steps", "2", "--methods", "ewc", "--seeds", "0",
                                     "--width", "4"],
    "hybrid-sleep bench continual --stream facts": ["--steps", "2", "--methods", "none",
                                                    "--seeds", "0", "--set", "objects=4"],
    "hybrid-sleep bench bridge": ["--steps", "2", "--arms", "none,fine-tuning", "--seeds", "0",
                                  "--days", "1"],
    "hybrid-sleep eval": ["--limit", "2"],
}  # fmt: skip
SLOW = (
    "hybrid-sleep bench depth configs/", "hybrid-sleep bench ablate", "hybrid-sleep bench map",
    "hybrid-sleep train out/my_text/run.yaml",
    "hybrid-sleep bench cost --model", "hybrid-sleep bench sleep",
    "hybrid-sleep bench generation", "hybrid-sleep bench decoding", "hybrid-sleep bench train",
    "hybrid-sleep bench kernels", "hybrid-sleep bench nights", "hybrid-sleep eval", "deepspeed",
    "hybrid-sleep facts sleep", "hybrid-sleep facts save", "hybrid-sleep facts calibrate",
)  # fmt: skip
# Figures of the Python blocks that make them long.
FEWER = {"max_new_tokens=500": "max_new_tokens=20", "count=1000": "count=4"}
# Only the parser can say something of these here.
ELSEWHERE = (
    "--device cuda", "train.device=auto", "_paper.yaml", "gsm_infinite.yaml", "wikitext", "smollm2",
)  # fmt: skip


class Block(NamedTuple):
    document: str
    language: str
    text: str


def blocks() -> Iterator[Block]:
    for document, text in DOCUMENTS.items():
        for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(document, language, body)


def commands() -> list[str]:
    """Every line of the blocks of commands, without comments, once."""
    lines = (line for b in blocks() if b.language == "bash" for line in b.text.splitlines())
    return list(dict.fromkeys(shlex.join(words) for x in lines if (words := words_of(x))))


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


def cases(of: list[str]) -> list:
    return [slow(line) if line.startswith(SLOW) else line for line in of]


def called(program: str) -> list[str]:
    return [line for line in commands() if line.startswith(f"{program} ")]


HERE = [x for x in called("hybrid-sleep") if not any(word in x for word in ELSEWHERE)]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Where `place` keeps models between tests; each is trained when it is first needed."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """An empty folder to call commands in, with the configs of a checkout and a text of one's own.

    Returns a function that puts the models there which a text names as `out/NAME`.
    """
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.joinpath("configs").symlink_to(ROOT / "configs")
    shutil.copytree(ROOT / "eval/results/suite_rule110", "eval/results/suite_rule110")
    folder.joinpath("my.txt").write_text("The sun rose, and the cat sat in it.\n" * 200)
    tasks = folder / "my_tasks"
    tasks.mkdir()
    tasks.joinpath("mine.jsonl").write_text('{"text": "the cat sat in the sun"}\n' * 4)
    folder.joinpath("probes.txt").write_text("Bela Novak lives in Lisbon.\n")
    tasks.joinpath("mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: my_tasks/mine.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}]\n'
    )

    def put(text: str) -> None:
        for name in set(re.findall(r"(?<!output_dir=)\bout/(\w+)", text)) & MODELS.keys():
            if not (models / name).exists():
                config, *changes = MODELS[name]
                run = load_run_config(f"configs/runs/{config}.yaml", changes)
                run.output_dir = str(models / name)
                train(run, progress=False)
            shutil.copytree(models / name, folder / "out" / name)
        if re.search(r"(facts|experience) \w+ out/facts", text):
            # What a model writes by itself takes a minute.
            monkeypatch.setattr(workspace, "own_samples", own_words)
            if not (models / "facts").exists():
                for words in (FACTS, EXPERIENCE):
                    result = CliRunner().invoke(app, words)
                    assert result.exit_code == 0, result.output
                shutil.move("out/facts", models / "facts")
            shutil.copytree(models / "facts", folder / "out" / "facts")

    return put


def own_words(model, tokenizer, *tokens, seed, **given):
    return [tokenizer(x)["input_ids"] for x in World(0).texts("test", seed, count=20)]


def shortened(line: str) -> list[str]:
    """The words of a command that takes a moment."""
    fitting = max((start for start in SHORT if line.startswith(start)), key=len, default=None)
    return [*shlex.split(line)[1:], *SHORT.get(fitting, [])]


def parsed(words: list[str]) -> None:
    """What the command itself makes of its words, and of the config and changes among them."""
    found = typer.main.get_command(app)
    while hasattr(found, "commands"):
        name, *words = words
        assert name in found.commands, name
        found = found.commands[name]
    context = found.make_context(name, list(words))
    given = context.params.get("source") or [context.params.get("config")]
    if str(given[0]).endswith(".yaml"):
        load_run_config(given[0], given[1:] or context.params.get("overrides") or [])


@pytest.mark.parametrize("line", cases(HERE))
def test_commands_run(line, place, monkeypatch):
    from hybrid_sleep.eval import demo

    whole = demo.recipe

    def brief(seed: int, folder: Path):
        run = whole(seed, folder)
        run.train.steps, run.train.warmup, run.train.batch_size = 1, 0, 2
        run.train.eval_every = None
        return run

    monkeypatch.setattr(demo, "recipe", brief)
    monkeypatch.setattr(demo, "EXAMPLES", 4)
    place(f"{line} out/rule110_cpu" if line.endswith("--resume") else line)
    words = shortened(line)
    monkeypatch.setattr("sys.argv", ["hybrid-sleep", *words])
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


def test_commands_for_elsewhere_are_what_the_command_takes(place):
    lines = [line for line in called("hybrid-sleep") if line not in HERE]
    assert lines
    for line in lines:
        parsed(shlex.split(line)[1:])


@pytest.mark.parametrize("line", cases([*called("torchrun"), *called("deepspeed")]))
def test_launchers_start_a_run(line, place, monkeypatch):
    from hybrid_sleep.training import __main__ as program
    from hybrid_sleep.training import run as runs

    launcher, *words = shlex.split(line)
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words)
        assert given.module and given.training_script == "hybrid_sleep.training"
        words = given.training_script_args
    else:
        from deepspeed.launcher.runner import parse_args

        given = parse_args(words)
        assert given.module and given.user_script == "hybrid_sleep.training"
        words = given.user_args
    started = []

    def start(run, **how):
        started.append(run)
        return SimpleNamespace(report=lambda: "trained")

    monkeypatch.setattr(runs, "train", start)
    assert program.main(words) == 0 and len(started) == 1


@pytest.mark.parametrize("line", called("make"))
def test_make_knows_what_to_do(line):
    program, *words = shlex.split(line)
    subprocess.run([program, "-n", *words], cwd=ROOT, check=True, capture_output=True)


def test_pip_and_pytest_are_asked_for_what_there_is():
    extras = PROJECT["project"]["optional-dependencies"].keys()
    for line in called("pip"):
        assert line.startswith("pip install ")
        for word in (word for word in shlex.split(line)[2:] if not word.startswith("-")):
            # Of a checkout, or the name of another package.
            name = word.replace(".", "hybrid-sleep", 1) if word.startswith(".") else word
            assert Requirement(name).extras <= extras, line
    marks = {text.partition(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    for line in called("pytest"):
        words = shlex.split(line)[1:]
        chosen = words[words.index("-m") + 1] if "-m" in words else ""
        assert set(re.findall(r"\w+", chosen)) <= marks | {"not", "and", "or"}, line
        assert all((ROOT / word).exists() for word in words if "/" in word), line


def test_every_command_is_of_a_kind_that_is_tested():
    kinds = {shlex.split(line)[0] for line in commands()}
    tested = {"hybrid-sleep", "torchrun", "deepspeed", "make", "pip", "pytest", "pre-commit"}
    assert kinds <= tested


def python_blocks() -> list:
    found = [block for block in blocks() if block.language == "python"]
    return [
        pytest.param(
            block,
            id=f"{block.document}-{i}",
            marks=[pytest.mark.slow] if "lm_eval" in block.text else [],
        )
        for i, block in enumerate(found)
    ]


@pytest.mark.parametrize("block", python_blocks())
def test_python_runs(block, place):
    place(block.text)
    text = block.text
    for long, short in FEWER.items():
        text = text.replace(long, short)
    names = {"__name__": "__main__"}
    if "trainer.data_collator" in text:
        from transformers import default_data_collator

        names["trainer"] = SimpleNamespace(data_collator=default_data_collator)
    if "predictions" in text:
        text = text.replace("predictions", '[x["labels"] for x in examples]')
    exec(compile(text, block.document, "exec"), names)
    if block.document == "README.md":
        # 200 tokens of prompt and 99 of the 100 new ones: four windows of 64, which sleep by
        # themselves, and 43 tokens, which are told to.
        slept = [report.tokens for report in names["out"].cache.reports]
        assert slept == [64] * 4 + [43] and names["report"].passes == 4
        # Then one token was left to take in, and 19 of the 20 new ones.
        assert names["cache"].counts.tolist() == [20]
    if "trainer" in names:
        batch = names["trainer"].data_collator([{"input_ids": [1, 2], "labels": [-100, 2]}])
        assert batch["supervised"].tolist() == [[False, True]]
    if "record" in names:
        assert names["record"].steps == 20
        assert names["record"].losses[-1] < names["record"].losses[0]


def test_listings_are_those_of_the_code():
    """A block of `py` is what a file has, without its comments, blank lines and indentation."""
    listings = [block for block in blocks() if block.language == "py"]
    assert listings
    for block in listings:
        source = (ROOT / "hybrid_sleep/sleep/minimal.py").read_text().splitlines()
        code = [x.strip() for x in source if x.strip() and not x.strip().startswith("#")]
        shown = [x.strip() for x in block.text.splitlines()]
        assert "\n".join(shown) in "\n".join(code)


def test_names_in_the_table_of_the_algorithm_exist():
    table = DOCUMENTS["docs/algorithm.md"].partition("## Where each line is")[2]
    rows = [row.split("|")[2:4] for row in table.partition("\n\n## ")[0].splitlines() if "|" in row]
    minimal = (ROOT / "hybrid_sleep/sleep/minimal.py").read_text()
    package = "".join(path.read_text() for path in (ROOT / "hybrid_sleep").rglob("*.py"))
    named = 0
    for ours, theirs in rows[2:]:
        for cell, source in ((ours, minimal), (theirs, package)):
            for name in re.findall(r"`([^`]+)`", cell):
                assert all(part in source for part in re.split(r"\.(?=\w+$)", name)), name
                named += 1
    assert named > 15


def prose(text: str) -> str:
    """A document without its blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def units(text: str) -> Iterator[tuple[str, str]]:
    """Each paragraph, item and row of a table, with the section that it stands in."""
    for section in re.split(r"^(?=#)", prose(text), flags=re.MULTILINE):
        for unit in re.split(r"\n\n|\n(?=- |\| )", section):
            yield unit, section


@pytest.mark.parametrize("document", DOCUMENTS)
def test_figures_are_those_of_the_results_beside_them(document):
    """What links a result quotes it to the digit; a table without links has its section's."""
    folder, compared = (ROOT / document).parent, 0
    for unit, section in units(DOCUMENTS[document]):
        linked = re.findall(r"\]\(([^)]*results\.md)\)", unit)
        if not linked and unit.startswith("|"):
            linked = re.findall(r"\]\(([^)]*results\.md)\)", section)
        if linked:
            results = " ".join((folder / path).read_text() for path in linked)
            for figure in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", unit):
                assert figure in results, (figure, unit)
                compared += 1
    if document == "README.md":
        assert compared >= 15


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", prose(DOCUMENTS[document])):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            place = (ROOT / document).parent / path
            assert place.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
                assert anchor in {h.lower().replace(" ", "-") for h in headings}, target


def test_tree_of_the_readme_names_what_exists():
    readme = [block for block in blocks() if block.document == "README.md"]
    (tree,) = [b.text for b in readme if b.text.startswith("hybrid_sleep/")]
    for line in tree.splitlines():
        top, told = re.match(r"(\S+)/ +(.*)", line).groups()
        assert (ROOT / top).is_dir(), line
        assert all((ROOT / top / inner).is_dir() for inner in re.findall(r"(\w+)/", told)), line


def test_make_targets_that_are_named_exist():
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {x for text in DOCUMENTS.values() for x in re.findall(r"\bmake ([a-z-]+)\b", text)}
    assert {"demo", "test"} <= named <= rules


def test_gate_is_the_whole_of_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    commands = [line for line in script.read_text().splitlines() if "make" in line]
    assert commands == ["exec make test"]
