"""A wrong run config fails before anything is built, naming the key and what is allowed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hybrid_sleep import HybridSleepConfig
from hybrid_sleep.training.config import load_run_config
from hybrid_sleep.training.depth import Fixed, Uniform
from hybrid_sleep.training.parsing import parse_overrides
from hybrid_sleep.training.schema import set_key

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "runs").glob("*.yaml"))

SMALL = """
model:
  hidden_size: 16
  intermediate_size: 24
  num_hidden_layers: 2
  num_attention_heads: 2
  linear_num_key_heads: 2
  linear_num_value_heads: 2
  linear_key_head_dim: 8
  linear_value_head_dim: 8
task:
  name: rule110
  params: {width: 4, states: 2, steps: 1}
sleep_passes: {uniform: [1, 3]}
train:
  steps: 6
  batch_size: 8
  lr_muon: 2e-2
  lr_adamw: 0.003
output_dir: out/small
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_defaults_and_what_the_task_decides(small):
    run = load_run_config(small)
    assert run.sleep_passes == Uniform(1, 3)
    assert run.train.lr_muon == 0.02  # to YAML 1.1, 2e-2 is text
    assert run.train.save_every is None
    config = run.model_config()
    assert (config.vocab_size, config.window, config.hidden_size) == (3, 4, 16)
    assert run.load_task().params == {"width": 4, "states": 2, "steps": 1}


def test_a_resolved_run_loads_as_itself(small, tmp_path):
    run = load_run_config(small, ["sleep_passes={choice: {1: 1, 4: 2.5}}", "train.grad_clip=null"])
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    assert load_run_config(tmp_path / "run.yaml") == run
    assert yaml.safe_load(run.to_yaml())["model"]["window"] == 4


def test_overrides_by_text_and_by_mapping(small):
    text = load_run_config(small, ["train.steps=10", "sleep_passes=2", "model.window=3"])
    mapping = load_run_config(small, {"train.steps": 10, "sleep_passes": 2, "model.window": 3})
    assert text == mapping
    assert (text.train.steps, text.sleep_passes) == (10, Fixed(2))
    assert text.model_config().window == 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_committed_recipes_load(recipe, tmp_path):
    start = {}
    if init := yaml.safe_load(recipe.read_text()).get("init"):
        # What it starts from is trained first; to read the recipe, a config with layers to spare.
        new = init.get("new_layers", [])
        count = max(new, default=1) + 1 - len(new)
        HybridSleepConfig(num_hidden_layers=count).save_pretrained(tmp_path)
        start = {"init.checkpoint": str(tmp_path)}
    run = load_run_config(recipe, start)
    assert run.output_dir == f"out/{recipe.stem}"
    config = run.model_config()
    if run.text is None:
        # The base of two stages sees a whole example at once.
        task = run.load_task()
        assert config.window == (task.length if recipe.stem == "attention_cpu" else task.window)
    else:
        assert run.text.length % config.window == 0 and config.sleep_schedule == "every_window"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.step=5",
            r"train must have keys out of accumulate, .*steps.*, got 'step' \(did you mean steps",
        ),
        (
            "trian.steps=5",
            r"a run must have keys out of init, model, output_dir, .*stages.*, got 'trian' ",
        ),
        ("task.parms={}", r"task must have keys out of name, params, repeats, got 'parms'"),
        ("model.hiden_size=5", r"model must have keys out of .*hidden_size.*, got 'hiden_size'"),
        ("model.hidden_size=0", r"model: hidden_size must be an integer of at least 1, got 0"),
        ("model.window=0", r"model: window must be an integer of at least 1, got 0"),
        ("model.sleep_attention=both", r"sleep_attention must be one of 'causal', 'bidirect"),
        (
            "model.vocab_size=2",
            r"model.vocab_size must be at least 3, the tokens of task 'rule110', got 2",
        ),
        ("model.hiden_size=5", r"got 'hiden_size' \(did you mean hidden_size"),
        ("model.dtype=bfloat16", r"model must have keys out of .*, got 'dtype'"),
        ("model.return_dict=false", r"model must have keys out of .*, got 'return_dict'"),
        ("model.weights_version=1", r"model must have keys out of .*, got 'weights_version'"),
        ("model={5: 1}", r"a key of model must be text, got 5"),
        ("model.rms_norm_eps=0", r"model: rms_norm_eps must be a finite number above 0, got 0"),
        ("model.rms_norm_eps=small", r"model.rms_norm_eps must be a number, got 'small'"),
        ("model.tie_word_embeddings='no'", r"tie_word_embeddings must be True or False, got 'no'"),
        ("model.hidden_size=1e2", r"hidden_size must be an integer of at least 1, got 100.0"),
        ("model.rope_parameters={rope_type: linear}", r"model: rope_param.* must have 'factor'"),
        ("model=5", r"model must be keys and values, got 5"),
        (
            "task=rule110",
            r"task must be keys and values, with keys out of name, params, repeats, got 'rule110'",
        ),
        ("task.name=rule30", r"task: name must be one of .*'rule110', .*, got 'rule30'"),
        ("task.params.width=2", r"task: width must be an integer of at least 3 .*, got 2"),
        (
            "task.params.wide=2",
            r"task: parameters of .* must be among width, states, steps, got wide=2",
        ),
        ("sleep_passes=0", r"sleep_passes must be an integer of at least 1, got 0"),
        ("sleep_passes={uniform: 3}", r"sleep_passes.uniform must be \[low, high\], got 3"),
        ("train.steps=0", r"train.steps must be an integer of at least 1, got 0"),
        ("train.steps=many", r"train.steps must be an integer of at least 1, got 'many'"),
        ("train.steps=1.5", r"train.steps must be an integer of at least 1, got 1.5"),
        ("train.steps=true", r"train.steps must be an integer of at least 1, got True"),
        ("train.steps=null", r"train.steps must be an integer of at least 1, got None"),
        ("train.batch_size=-8", r"train.batch_size must be an integer of at least 1, got -8"),
        ("train.accumulate=3", r"train.accumulate must be a divisor of train.batch_size=8, got 3"),
        ("train.lr_muon=0", r"train.lr_muon must be null or a finite number above 0, got 0"),
        ("train.lr_adamw=.nan", r"train.lr_adamw must be a finite number above 0, got nan"),
        ("train.lr_adamw=fast", r"train.lr_adamw must be a finite number above 0, got 'fast'"),
        (
            "train.weight_decay=-1",
            r"train.weight_decay must be a finite number of at least 0, got -1",
        ),
        ("train.warmup=7", r"train.warmup must be at most train.steps=6, got 7"),
        ("train.cooldown=2", r"train.cooldown must be a share of the steps, 0 to 1, got 2"),
        (
            "train.schedule=step",
            r"train.schedule must be one of 'constant', .*'trapezoid', got 'step'",
        ),
        ("train.grad_clip=0", r"train.grad_clip must be null or a finite number above 0, got 0"),
        ("train.grad_clip=x", r"train.grad_clip must be null or a finite number above 0, got 'x'"),
        ("train.eval_every=0", r"train.eval_every must be null or an integer of at least 1, got 0"),
        ("train.eval_depths=[]", r"train.eval_depths must be null or a list of depths, got \[\]"),
        (
            "train.eval_depths=[1, 0]",
            r"train.eval_depths\[1\] must be an integer of at least 1, got 0",
        ),
        (
            "train.eval_depths=[1, x]",
            r"train.eval_depths\[1\] must be an integer of at least 1, got 'x'",
        ),
        ("train.save_every=0", r"train.save_every must be null or an integer of at least 1, got 0"),
        ("train.seed=-1", r"train.seed must be an integer from 0 to 2\*\*32 - 1, got -1"),
        ("train.seed=4294967296", r"train.seed must be an integer from 0 to 2\*\*32 - 1, got 42"),
        (
            "train.steps=9223372036854775808",
            r"train.steps must be an integer of at most 2\*\*63 - 1, got 922",
        ),
        ("task.params={5: 1}", r"a key of task.params must be text, got 5"),
        ("sleep_passes={uniform: [1, 2001]}", r"uniform high must be at most 2000, got 2001"),
        ("train.dtype=float16", r"train.dtype must be one of 'float32', 'bfloat16', got 'float16'"),
        ("train.device=tpu", r"train.device must be one of 'auto', 'cpu', got 'tpu'"),
        (
            "train.activation_checkpointing=all",
            r"train.activation_checkpointing: granularity must be None, 'block', 'pass', 'window'",
        ),
        ("train.workers=-1", r"train.workers must be an integer of at least 0, got -1"),
        (
            "train.backprop_passes=0",
            r"train.backprop_passes must be null or an integer of at least 1, got 0",
        ),
        (
            "train.backprop_windows=x",
            r"backprop_windows must be null or an integer of at least 1, got 'x'",
        ),
        ("train.tensorboard=1", r"train must have keys out of .*report_to.*, got 'tensorboard'"),
        ("train.report_to=5", r"train.report_to must be text or a list of text, got 5"),
        ("train.trainable=some", r"train.trainable must be one of 'all', 'new_layers', got 'some'"),
        (
            "train.trainable=new_layers",
            r"trainable must be 'all' where init.new_layers names no layers",
        ),
        ("train.windows={0: 2}", r"train.windows must end at the model's window, 4, got 2"),
        (
            "train.windows={0: 2, 9: 4}",
            r"train.windows must change before train.steps=6, got step 9",
        ),
        ("train.windows={0: x}", r"train.windows.0 must be an integer of at least 1, got 'x'"),
        (
            "train.windows={x: 4}",
            r"a key of train.windows must be an integer of at least 0, got 'x'",
        ),
        ("text={files: [x], length: 8}", r"one of task and text must be given, got both"),
        ("stages=5", r"stages must be a list of mappings of dotted keys to values, got 5"),
        (
            "stages=[{output_dir: x}]",
            r"stages\[0\]: a key must begin with one of model, .*, got 'output_dir'",
        ),
        (
            "stages=[{train.steps: 0}]",
            r"stages\[0\]: train.steps must be an integer of at least 1, got 0",
        ),
        ("output_dir=''", r"output_dir must be the path of a folder, got ''"),
        ("output_dir=' '", r"output_dir must be the path of a folder, got ' '"),
        ("output_dir=", r"output_dir must be the path of a folder, got None \(YAML reads nothing"),
        ("output_dir=[a]", r"output_dir must be the path of a folder, got \['a'\]"),
        ("train.steps", r"override must be key=value, .*, got 'train.steps'"),
        (
            "output_dir.name=x",
            r"override 'output_dir.name': output_dir must hold keys, got 'out/small'",
        ),
    ],
)
def test_wrong_values_name_the_key_and_what_is_allowed(small, override, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_run_config(small, [override])
    assert str(small) in str(caught.value)


def test_an_override_opens_a_section_that_a_run_yaml_has_as_null():
    content = {"init": None, "train": {"steps": 1}}
    set_key(content, "init.checkpoint", "out/a")
    assert content == {"init": {"checkpoint": "out/a"}, "train": {"steps": 1}}


def test_all_that_is_wrong_is_said_at_once_in_one_line(small):
    wrong = ["train={steps: 0, batch_size: x, seeds: 3}", "task.name=5", "output_dir="]
    with pytest.raises(ValueError) as caught:
        load_run_config(small, {**dict(parse_overrides(wrong)), "task.name": 5})
    said = str(caught.value)
    for part in (
        "train.steps must be an integer of at least 1, got 0; ",
        "train.batch_size must be an integer of at least 1, got 'x'; ",
        "got 'seeds' (did you mean seed",
        "task.name must be text, got 5",
        "output_dir must be the path of a folder, got None",
    ):
        assert part in said
    assert "\n" not in said


@pytest.mark.parametrize("key", ["model", "train", "sleep_passes", "output_dir"])
def test_missing_keys_are_named(small, key):
    content = yaml.safe_load(SMALL)
    del content[key]
    small.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=f": {key} must be given: it has no default"):
        load_run_config(small)
    content = yaml.safe_load(SMALL)
    del content["train"]["steps"]
    small.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="train.steps must be given: it has no default"):
        load_run_config(small)


def test_files_that_are_no_run(small, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="config must be the YAML file of a run, got '.*none.yaml'"
    ):
        load_run_config(tmp_path / "none.yaml")
    with pytest.raises(
        FileNotFoundError, match="init.checkpoint='none' must be the folder .*, got no folder"
    ):
        load_run_config(small, ["init={checkpoint: none}"])
    with pytest.raises(
        FileNotFoundError, match="train.deepspeed must be a JSON file .*, got 'none.json'"
    ):
        load_run_config(small, ["train.deepspeed=none.json"])
    for text, message in [
        ("", "it must hold keys and values, got nothing"),
        ("- 1", "it must hold keys and values, got list"),
        ("a: [", "line 1, column 5: while parsing"),
        (SMALL.replace("out/small", "{{run}}"), "line 20: it must be plain YAML, got a template"),
        (SMALL + "task: {name: rule110}\n", "key 'task' must be given once, got it again in line"),
    ]:
        small.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_run_config(small)


def test_a_file_of_other_bytes(small):
    small.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())  # as some editors begin UTF-8
    assert load_run_config(small).output_dir == "out/small"
    small.write_bytes("# \u00e9\n".encode("latin-1") + SMALL.encode())
    with pytest.raises(ValueError, match="it must be UTF-8 text, got another byte at 2"):
        load_run_config(small)


def test_numbers_and_paths_of_a_run(small, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    run = load_run_config(small, ["model.rms_norm_eps=1e-5", "output_dir=~/a"])
    assert run.output_dir == "/h/a" and run.model_config().rms_norm_eps == 1e-5
    quoted = load_run_config(small, ["model.rms_norm_eps='1e-5'", "output_dir=/h/a"])
    assert quoted == run
    assert load_run_config(small, ["output_dir=2026-11-27"]).output_dir == "2026-11-27"


def test_the_command_ends_in_one_line_and_code_2(small, tmp_path):
    command = [sys.executable, "-m", "hybrid_sleep.training"]
    done = subprocess.run(
        [*command, str(small), "--quiet", "train.steps=0", f"output_dir={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: config") and done.stderr.count("\n") == 1
    assert "train.steps must be an integer of at least 1, got 0" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_gives_the_threads_back():
    from hybrid_sleep.training.run import threads

    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with threads(None):
        assert torch.get_num_threads() == before
