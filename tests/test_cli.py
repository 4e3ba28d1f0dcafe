"""The command: help from the one place of settings, clear errors, fit → inspect → eval on real files."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socketserver
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import pytest
import torch
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner, Result

from steer._version import __version__
from steer.cli.app import app
from steer.cli.console import reported
from steer.cli.evaluate import Applied, _warn_of_swapped
from steer.cli.options import Sites, expanded
from steer.demo import MODEL
from steer.direction import Direction
from steer.errors import InvalidInput
from steer.lab.derive import layer_weights
from steer.lab.evaluation.report import Rate, Report
from steer.lab.measurement import Measurement
from steer.settings import ModelOrigin, ModelSettings, ServeSettings
from tests import models
from tests.lab.judges import judging
from tests.lab.test_measure import HARMFUL, HARMLESS
from tests.servers import ROOT


def run(*arguments: str, code: int = 0) -> Result:
    """The command in this process, as a start of its own takes seconds."""
    done = CliRunner().invoke(app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    (folder / "harmful.txt").write_text("\n".join(map(str, HARMFUL.prompts)))
    (folder / "harmless.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in HARMLESS.prompts))
    return str(folder / "harmful.txt"), str(folder / "harmless.jsonl")


def started(*arguments: str) -> str:
    """What the command prints as a process of its own."""
    command = [sys.executable, "-m", "steer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=1500).stdout


def test_help_has_every_setting() -> None:
    shown = run("serve", "--help").stdout
    for name in ServeSettings.model_fields:
        assert f"--{name.replace('_', '-')}"[:20] in shown


def test_help_costs_no_torch_and_no_transformers() -> None:
    """Importing them takes seconds, and no help, version or completion needs them."""
    program = "import sys, steer.cli.app; print(sorted({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=1500)
    assert done.stdout.strip() == "[]"


def commands(group: TyperGroup, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{name} ")
        else:
            yield prefix + name, command


def test_each_help_ends_with_an_example_that_the_command_takes() -> None:
    whole = typer.main.get_command(app)
    assert isinstance(whole, TyperGroup)
    for name, command in commands(whole):
        example = (command.epilog or "").removeprefix("Example: ")
        assert example.startswith(f"steer {name}"), name
        with command.make_context(name, shlex.split(example.removeprefix(f"steer {name}"))) as context:
            assert name == "serve" or not context.args, f"{name} does not know {context.args}"


@pytest.mark.parametrize("markup", [None, "rich"], ids=["narrow", "wide"])
def test_every_option_says_what_it_is_as_it_was_written(markup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def words(text: str) -> str:
        return re.sub(r"[\s│\\]", "", text)

    monkeypatch.setattr(app, "rich_markup_mode", markup)
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    monkeypatch.setenv("COLUMNS", "400")
    whole = typer.main.get_command(app)
    assert isinstance(whole, TyperGroup)
    for name, command in commands(whole):
        shown = words(run(*name.split(), "--help").stdout)
        for each in command.params:
            assert each.help, f"{name}: {each.name} has no help"
            assert words(each.help.partition("\n")[0]) in shown, f"{name}: {each.name}"
        assert not re.search(r"--[a-z-]+<[^<>]*[A-Z(]", shown), f"{name}: shows the name of a type in Python"


def test_the_version_is_said() -> None:
    assert run("--version").stdout.strip() == f"steer {__version__}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_completes(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert "steer" in started("--show-completion", shell)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("steer serve --backend t", "transformers"),
        ("steer serve --log-level ", "debug info warning error"),
        ("steer eval M --backend v", "vllm"),
        ("steer search M --mode ablate,one", "ablate,one_sided"),
        ("steer derive M --mode rotate", "rotate rotate_one_sided"),
        ("steer fit M --behaviour ", ""),
    ],
)
def test_choices_are_completed(line: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_STEER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    program = "import sys; from steer.cli import main; sys.argv[0] = 'steer'; main()"  # of this name is the variable
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=1500)
    assert done.stdout.split() == words.split()


def test_serve_says_of_each_option_its_type_default_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = started("serve", "--help")
    for words in ("<whole number, 0 to 65535>", "(8000)", "STEER_PORT", "auto|transformers|vllm", "Access control"):
        assert words in shown, words


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_help_is_readable_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No option's name is cut."""
    monkeypatch.setenv("COLUMNS", str(width))
    shown = started("serve", "--help")
    assert all(len(line) <= max(width, 60) for line in shown.splitlines())
    for name in ServeSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize("command", ["serve", "fit", "measure", "select", "search", "check", "eval", "bake", "convert"])
def test_every_command_that_opens_a_model_has_the_options_of_loading_one(command: str) -> None:
    whole = typer.main.get_command(app)
    assert isinstance(whole, TyperGroup)
    options = {option for parameter in whole.commands[command].params for option in parameter.opts}
    only_read = command in ("bake", "convert")
    fields = (ModelOrigin if only_read else ModelSettings).model_fields
    assert {f"--{name.replace('_', '-')}" for name in fields} <= options
    assert not (only_read and {"--dtype", "--device"} & options), "nothing would read them"


def test_options_of_loading_are_translated() -> None:
    chosen = ModelSettings(dtype="bfloat16", revision="v1", trust_remote_code=True)
    assert ModelSettings().options == ["--dtype", "auto", "--device", "auto"]
    assert chosen.vllm_options == ["--dtype", "bfloat16", "--revision", "v1", "--trust-remote-code"]
    assert chosen.loading.keys() == ModelSettings.model_fields.keys()
    with pytest.raises(InvalidInput, match="--device-map: not used by vLLM"):
        _ = ModelSettings(device_map="auto").vllm_options


def test_a_base_model_is_measured_with_a_template_that_is_given(
    tiny_folder: Path, sets: tuple[str, str], tmp_path: Path
) -> None:
    """With that of another model it gives what the other model gives."""
    base, template, bad = tmp_path / "base", tmp_path / "chat.jinja", tmp_path / "bad.jinja"
    shutil.copytree(tiny_folder, base)
    (base / "chat_template.jinja").rename(template)
    bad.write_bytes(b"\xff")
    command = ("measure", str(base), "--harmful", sets[0], "--harmless", sets[1], "-o", str(tmp_path / "m.safetensors"))
    assert "has no chat template" in (told := run(*command, code=2).stderr)
    assert "give it with --chat-template FILE" in " ".join(told.split())
    assert "accepted: a Jinja template" in run(*command, "--chat-template", str(bad), code=2).stderr
    run(*command, "--chat-template", str(template))
    run("measure", str(tiny_folder), *command[2:-1], str(tmp_path / "own.safetensors"))
    given, own = (Measurement.load(tmp_path / f"{name}.safetensors") for name in ("m", "own"))
    assert given.meta.model.chat_template_sha256 == own.meta.model.chat_template_sha256
    assert torch.equal(given.harmful.mean, own.harmful.mean)


def test_settings_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_PORT", "9123")
    assert ServeSettings().port == 9123


def test_a_switch_in_the_environment_is_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_INSECURE", "maybe")
    done = run("serve", code=2)
    assert "'maybe' is not accepted: true or false" in " ".join(done.stderr.split())


def test_lists_are_given_by_commas_or_again_and_again(tiny_folder: Path, sets: tuple[str, str], tmp_path: Path) -> None:
    made = tmp_path / "d.safetensors"
    derived(tiny_folder, sets, made)
    told = ("--mode", "ablate,one_sided", "--mode", "ablate:norm", "--strengths", "0.5", "--max-tokens", "2")
    report = tmp_path / "report"
    run(
        "eval",
        str(tiny_folder),
        "--direction",
        str(made),
        "--harmful",
        sets[0],
        "--harmless",
        sets[1],
        *told,
        "--report",
        str(report),
    )
    found = (report / "report.json").read_text()
    for arm in ("d:ablate=0.5", "d:ablate:norm=0.5", "d:one_sided=0.5"):
        assert f'"{arm}"' in found


def derived(model: Path, sets: tuple[str, str], output: Path, *options: str) -> Any:
    """A direction of a model that shows nothing, of which `steer fit` would find none."""
    measured = output.with_name("measured.safetensors")
    run("measure", str(model), "--harmful", sets[0], "--harmless", sets[1], "-o", str(measured))
    return run("derive", str(measured), "-o", str(output), *options)


def test_fit_writes_nothing_where_there_is_nothing_to_take_away(
    tiny_folder: Path, sets: tuple[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "d.safetensors"
    given = ("--harmful", sets[0], "--harmless", sets[1], "-o", str(output), "--max-tokens", "4")
    done = run("fit", str(tiny_folder), *given, code=3)
    assert "nothing found: the plain model shows 'refusal' in 0 of" in done.stderr
    assert list(tmp_path.glob("d.*")) == []


def test_fit_without_prompts_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is looked for, and in a moment where the published sets cannot be reached."""
    monkeypatch.setattr("steer.lab.prompts.PATIENCE", 0.01)
    output = ("-o", str(tmp_path / "d.safetensors"))
    for given, says in (
        ((), "give --harmful FILE and --harmless FILE"),
        (("--prompts", "nobody"), "'nobody' is not known; accepted: arditi, mlabonne"),
        (("--harmful", "a.txt"), "--harmless: is missing"),
        (("--prompts", "arditi", "--harmful", "a.txt"), "--prompts names both sets"),
        (("--harmful", "http://127.0.0.1:9/a.json", "--harmless", "b"), "http://127.0.0.1:9/a.json: cannot be read"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("https_proxy", "http://127.0.0.1:9")
            assert says in run("fit", "nowhere", *given, *output, code=2).stderr


def test_derive_inspect_eval(
    tiny_folder: Path, sets: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harmful, harmless = sets
    output = tmp_path / "d.safetensors"
    told = derived(tiny_folder, sets, output, "--layer", "1")
    assert "source layer 1" in told.stdout
    known = json.loads(run("inspect", str(output), "--json").stdout)
    assert known["meta"]["method"] == "slerp"
    assert known["meta"]["bos_count"] == 1
    assert len(known["profile"]) == 3
    assert known["digest"][:12] in told.stdout
    table = run("inspect", str(output)).stdout
    assert "harmful·v" in table
    assert "cos to next" not in table, "one direction at all layers"
    derived(tiny_folder, sets, tmp_path / "each.safetensors", "--layer", "all")
    assert "cos to next" in run("inspect", str(tmp_path / "each.safetensors")).stdout
    options = ("--direction", str(output), "--harmful", harmful, "--harmless", harmless, "--max-tokens", "4")
    report = json.loads(run("eval", str(tiny_folder), *options, "--mode", "one_sided", "--json").stdout)
    assert report["arms"][0]["mode"] == "one_sided"
    assert [one["dataset"]["count"] for one in report["sets"]] == [13, 13]
    assert report["divergence"][0]["p95"] >= 0
    for name in ("--harmful: harmful.txt", "--harmless: harmless.jsonl"):
        assert f"{name} is the file that d was made from: give other prompts, its figures on these" in caplog.text
    assert "KL(plain ‖ steered)" in run("eval", str(tiny_folder), *options).stdout
    told = run("eval", str(tiny_folder), *options, "--harmless", harmful, code=2)
    assert "13 prompts are in both harmful.txt and harmful.txt" in told.stderr


@pytest.mark.parametrize(("harmful", "harmless", "warned"), [(19, 1, False), (9, 11, False), (1, 19, True)])
def test_sets_that_seem_to_be_swapped_are_told_of(
    harmful: int, harmless: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sets = [
        types.SimpleNamespace(name=name, arms=[types.SimpleNamespace(shown=Rate.of([n < hits for n in range(20)]))])
        for name, hits in (("harmful", harmful), ("harmless", harmless))
    ]
    _warn_of_swapped(cast(Any, sets), "refusal")
    assert ("are they swapped?" in caplog.text) == warned
    assert ("'refusal' in 1 of 20 answers to --harmful, in 19 of 20 to --harmless" in caplog.text) == warned


def test_a_whole_number_is_not_asked_for_with_a_decimal_point() -> None:
    told = run("derive", "m", "-o", "d.safetensors", "--position", "1,2", code=2).stderr
    assert "'1,2' is not accepted: a whole number" in told
    assert "decimal point" not in told


def test_a_calibrated_direction_says_how_far_no_harm_was_seen(tmp_path: Path) -> None:
    """The embedded model answers nothing any more where the component is made longer."""
    sets = [tmp_path / "harmful.txt", tmp_path / "harmless.txt"]
    for path, name in zip(sets, ("refused", "harmless"), strict=True):
        lines = (Path(MODEL).parent / "prompts" / f"{name}.test.txt").read_text().splitlines()[:8]
        path.write_text("\n".join(lines) + "\n")
    options = ["--direction", str(ROOT / "directions" / "refusal.safetensors"), "--mode", "ablate"]
    options += ["--harmful", str(sets[0]), "--harmless", str(sets[1]), "--max-tokens", "48"]
    output = tmp_path / "calibrated.safetensors"
    told = run("eval", str(MODEL), *options, "--strengths", "-1,0.5,2", "--calibrate", str(output)).stderr
    assert "no harm seen for ablate from 0 to 2" in told
    assert Direction.load(output).meta.calibrated == {"ablate": (0.0, 2.0)}
    told = run("eval", str(MODEL), *options, "--calibrate", str(output), code=2).stderr
    assert "--calibrate: is for one --direction and several --strengths" in told


def test_a_direction_of_another_model_is_refused_by_its_file_before_weights_are_read(
    tiny_folder: Path, sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("the model was opened")

    other, own = str(ROOT / "directions" / "refusal.safetensors"), str(tmp_path / "d.safetensors")
    models.direction(models.tiny("llama")).save(own)
    model, given, measured = str(tiny_folder), ("--harmful", sets[0], "--harmless", sets[1]), str(tmp_path / "m")
    run("measure", model, *given, "-o", f"{measured}.safetensors")
    monkeypatch.setattr("steer.cli.options.EngineOptions.open", opened)
    many = tmp_path / "many.txt"
    many.write_text("".join(f"prompt {n}\n" for n in range(40)))
    (tmp_path / "others.txt").write_text("".join(f"other {n}\n" for n in range(40)))
    for command in (
        ("eval", model, "--direction", other, *given),
        ("eval", model, "--direction", own, "--direction", other, *given),
        *([("eval", model, "--direction", other, *given, "--backend", "vllm")] if find_spec("vllm") else []),
        ("eval", model, "--direction", own, "--condition", "refusal@1>0", "--probe", other, *given),
        ("check", other, model, *given),
        ("fit", model, "--condition", other, "--harmful", str(many), "--harmless", str(tmp_path / "others.txt")),
        ("bake", model, "--direction", other, "-o", str(tmp_path / "baked"), "--mode", "ablate"),
    ):
        told = run(*command, code=2).stderr
        assert f"error: {other}: it was made for d_model" in told, (command, told)
        assert own not in told
    told = run(
        "select", f"{measured}.safetensors", str(MODEL), *given, "-o", f"{measured}.x.safetensors", code=2
    ).stderr
    assert "the measurement is of 64, the model has 192" in told


def test_eval_compares_at_an_equal_kl_and_with_random_directions(
    tiny_folder: Path, sets: tuple[str, str], tmp_path: Path
) -> None:
    direction, folder = tmp_path / "d.safetensors", tmp_path / "report"
    models.direction(models.tiny("llama")).save(direction)
    options = ["--direction", str(direction), "--harmful", sets[0], "--harmless", sets[1], "--max-tokens", "3"]
    options += ["--kl", "0.01,0.02", "--controls", "1", "--tokens", "not-first", "--report", str(folder)]
    options += ["--against", "d:ablate@not-first"]
    told = run("eval", str(tiny_folder), *options)
    assert "At an equal KL" in told.stdout
    assert "is asked for" in told.stderr
    report = Report.model_validate_json((folder / "report.json").read_text())
    ways = ["d:ablate@not-first", "d.random0:ablate@not-first"]
    assert [(dose.way, dose.kl) for dose in report.doses] == [(way, kl) for way in ways for kl in (0.01, 0.02)]
    divergence = {one.arm: one for one in report.divergence}
    for dose in report.doses:
        one = divergence[f"{dose.way}={dose.strength:g}"]
        assert one.mean == pytest.approx(dose.kl, rel=0.05)
        assert one.low <= one.mean <= one.high
    assert [one.against for one in report.comparisons] == [arm.name for arm in report.arms[:2]]
    assert [one.arm for one in report.comparisons] == [arm.name for arm in report.arms[2:]]
    wrong = run("eval", str(tiny_folder), *options, "--against", "d:ablate", code=2).stderr
    assert "--against: 'd:ablate' is none of the arms: d:ablate@not-first" in wrong
    assert [arm.method for arm in report.arms] == ["random"] * 4, "as the tests' own direction is"


def test_eval_writes_a_report_and_goes_on_in_its_folder(
    tiny_folder: Path, sets: tuple[str, str], tmp_path: Path
) -> None:
    direction, folder, text = tmp_path / "d.safetensors", tmp_path / "report", tmp_path / "text.txt"
    models.direction(models.tiny("llama")).save(direction)
    text.write_text("plain text, which nobody asked for")
    harmful, harmless = sets
    options = ["--direction", str(direction), "--harmful", harmful, "--harmless", harmless, "--borderline", harmless]
    options += ["--text", str(text), "--strengths", "0,1,2", "--report", str(folder), "--answers"]
    run("eval", str(tiny_folder), *options, "--max-tokens", "3")
    report = Report.model_validate_json((folder / "report.json").read_text())
    assert [one.name for one in report.sets] == ["harmful", "harmless", "borderline"]
    assert [len(one.arms) for one in report.sets] == [4, 4, 4]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3 * 4 * 13
    assert {"set", "arm", "messages", "answer", "outcome", "why"} <= answers[0].keys()
    lines = run("classify", str(folder / "answers.jsonl")).stdout.splitlines()
    assert [json.loads(line)["answer"] for line in lines] == [one["answer"] for one in answers], (
        "one command reads what another writes"
    )
    page = (folder / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(pictures) == 4
    assert all((folder / name).exists() for name in pictures)
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "measured").iterdir()}
    again = run("eval", str(tiny_folder), *options, "--max-tokens", "3", "--json")
    assert f"going on with what is in {folder} from before" in again.stderr
    assert [one["arms"] for one in json.loads(again.stdout)["sets"]] == [
        one["arms"] for one in report.model_dump(mode="json")["sets"]
    ]
    assert before.keys() == {path.name for path in (folder / "measured").iterdir()}
    told = run("eval", str(tiny_folder), *options, "--max-tokens", "4", code=2).stderr
    assert "max_tokens = 3, this command has 4" in told
    template = tmp_path / "other.jinja"
    template.write_text("{% for message in messages %}<{{ message['content'] }}>{% endfor %}")
    told = run("eval", str(tiny_folder), *options, "--max-tokens", "3", "--chat-template", str(template), code=2).stderr
    assert "was measured with chat_template_sha256 = " in told


def test_eval_names_every_wrong_option(tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--direction", str(tmp_path / "d.safetensors"), "--harmful", "a.txt", "--harmless", "b.txt"]
    wrong = "--strength 1 --strengths 1,2 --kl 0.1 --controls 1 --judge http://127.0.0.1:9/v1 --url http://127.0.0.1:9"
    told = run("eval", str(tiny_folder), *options, *wrong.split(), "--answers", code=2).stderr
    wanted = ("--strengths", "--kl finds", "--controls: not possible", "--judge-model", "--url: is for --tasks")
    assert all(option in told for option in (*wanted, "--answers: needs --report"))
    assert "'a' is not accepted: a number" in run("eval", str(tiny_folder), *options, "--strengths", "a", code=2).stderr
    assert "above 0" in run("eval", str(tiny_folder), *options, "--kl", "0.1,0", code=2).stderr
    wrong = "--tokens last-2,all --layers , --mode , --text t.txt --strengths 1,2 --calibrate c.safetensors"
    told = run("eval", str(tiny_folder), *options, *wrong.split(), code=2).stderr
    for problem in ("--calibrate: is for what acts everywhere", "does not go with --text", "--layers: names none"):
        assert problem in told
    assert "--mode: names none" in told
    nowhere = tmp_path / "nowhere"
    paths = [
        "--strengths",
        "1,2",
        "--report",
        str(nowhere / "report"),
        "--calibrate",
        str(nowhere / "c.txt"),
        "--kl",
        ",",
    ]
    told = run("eval", str(tiny_folder), *options, *paths, code=2).stderr
    for problem in (f"--report: the folder {nowhere}", f"--calibrate: the folder {nowhere}", "--kl: names none"):
        assert problem in " ".join(told.split())
    assert not nowhere.exists()


def test_measure_then_derive_by_any_method(tiny_folder: Path, sets: tuple[str, str], tmp_path: Path) -> None:
    harmful, harmless = sets
    measured, output = tmp_path / "m.safetensors", tmp_path / "d.safetensors"
    options = ("--harmful", harmful, "--harmless", harmless, "-o", str(measured), "--vectors", "--positions", "-1,-2")
    told = run("measure", str(tiny_folder), *options)
    assert "13 and 13 prompts, 3 of 3 layers, positions -1, -2" in told.stdout
    assert list(tmp_path.iterdir()) == [measured], "and no running sums are left"
    more = ("-p", "shrinkage=0.3", "--position", "-2", "--layer", "1", "--bootstrap", "3")
    told = run("derive", str(measured), "-o", str(output), "--method", "whitened", *more)
    assert re.search("whitened[^,]*, ablate, source layer 1", told.stdout)
    meta = json.loads(run("inspect", str(output), "--json").stdout)["meta"]
    assert meta["parameters"]["shrinkage"] == 0.3
    assert meta["parameters"]["position"] == -2
    assert "Pitfalls" in run("methods").stdout
    assert "source layer" in run("derive", str(measured), "-o", str(output)).stdout


def test_options_without_an_effect_are_refused(tiny_folder: Path, sets: tuple[str, str], tmp_path: Path) -> None:
    measured, output = str(tmp_path / "m.safetensors"), tmp_path / "d.safetensors"
    given, to = ("--harmful", sets[0], "--harmless", sets[1]), ("-o", str(output))
    run("measure", str(tiny_folder), *given, "-o", measured, "--vectors")
    subspace = ("--method", "subspace", "-p", "rank=3", "--layer", "1")
    file, model = str(ROOT / "directions" / "refusal.safetensors"), str(MODEL)
    for command, says in (
        (("derive", measured, *to, "--mode", "add", "--threshold", "0.4"), "--threshold: is for one_sided"),
        (("derive", measured, *to, "--mode", "add", "--target", "0.1"), "--target: is for one_sided"),
        (("derive", measured, *to, *subspace, "--target", "0.1"), "this direction's modes are ablate"),
        (("derive", measured, *to, "-p", "t=0.1", "-p", "t=0.2"), "--parameter: 't' is given twice"),
        (("serve", model, "--revision", "main"), "--revision: 'main' is for a model on the hub"),
        (("measure", model, *given, *to, "--revision", "main"), "--revision: 'main' is for"),
        (("check", file, "--revision", "main"), "--revision: 'main' is for"),
        (("bake", model, "--direction", file, *to, "--revision", "main"), "--revision: 'main' is for"),
        (("convert", file, str(tmp_path / "d.gguf"), "--model", model, "--revision", "main"), "--revision: 'main'"),
    ):
        assert says in run(*command, code=2).stderr, command
    assert not output.exists()
    run("derive", measured, *to, "--target", "0.1", "--threshold", "0.4")


def test_derive_weighs_layers(
    tiny_folder: Path, sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # room for the table of all columns
    measured, output, listed = (tmp_path / name for name in ("m.safetensors", "d.safetensors", "weights.json"))
    run("measure", str(tiny_folder), "--harmful", sets[0], "--harmless", sets[1], "-o", str(measured))
    base = ("derive", str(measured), "-o", str(output), "--layer", "1")

    def weights(*options: str) -> list[float]:
        run(*base, *options)
        return Direction.load(output).weights.tolist()

    listed.write_text("\ufeff[0, 1.25, -0.5]", "utf-8")
    assert weights("--layers", "1-2") == [0, 1, 1]
    assert weights("--layers", "0") == [1, 0, 0]
    assert weights("--weights", str(listed)) == [0, 1.25, -0.5]
    bell = layer_weights(3, 1.0, 0.5, 0.1).tolist()
    assert weights("--weights", "peak=1,width=0.5,most=2") == (2 * layer_weights(3, 1.0, 0.5, 0.0)).tolist()
    assert weights("--weights", "peak=1,width=0.5,least=0.1") == bell
    assert weights("--weights", "peak=1,width=0.5,least=0.1", "--layers", "1-2") == [0, *bell[1:]]
    for options, says in (
        (("--layers", "1-3"), "--layers: '1-3' is not accepted"),
        (("--weights", "peak=1,broad=2"), "--weights: broad: "),
        (("--weights", "peak=3,width=1"), "the layers are 0 to 2"),
        (("--weights", "peak=1,width=1,peak=2"), "--weights: 'peak' is given twice"),
        (("--weights", str(measured)), "cannot be read as JSON"),
        (("--weights", "1,0.5"), "accepted: peak=LAYER,width=LAYERS,least=SHARE,most=WEIGHT, or a JSON file"),
        (("--weights", str(listed), "--layers", "0"), "nothing would be steered"),
    ):
        assert says in run(*base, *options, code=2).stderr
    at_writers = ("--sites", "writers,writers", "--layers", "1-2", "--mlp-weights", str(listed))
    assert weights(*at_writers) == [0, 1, 1]
    assert Direction.load(output).meta.sites == ("writers",), "said once"
    made = json.loads(run("inspect", str(output), "--json").stdout)["profile"]
    assert [layer["mlp_weight"] for layer in made] == [0, 1.25, -0.5]
    table = run("inspect", str(output)).stdout.splitlines()
    last = [[cell.strip() for cell in table[at].split("|")[-3:-1]] for at in (-5, -1)]
    assert last == [["attention weight", "MLP weight"], ["1", "-0.5"]]
    assert "--mlp-weights needs the site 'writers'" in run(*base, "--mlp-weights", str(listed), code=2).stderr
    assert "--mlp-weights: 3" in run(*base, "--sites", "writers", "--mlp-weights", "3", code=2).stderr
    listed.write_text('[1, "1", 1]')
    assert "a number from -100 to 100" in run(*base, "--weights", str(listed), code=2).stderr


def test_a_measurement_that_is_killed_goes_on(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("harmful", "harmless"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {'x' * (n % 40)} {n}" for n in range(100)))
    sets = [f"--{name}={tmp_path / name}.txt" for name in ("harmful", "harmless")]
    output, whole = tmp_path / "m.safetensors", tmp_path / "whole.safetensors"
    partial = tmp_path / "m.safetensors.part"
    options = [*sets, "--vectors", "--batch-size", "2", "--every", "0"]
    command = [sys.executable, "-m", "steer", "measure", str(tiny_folder), "-o", str(output), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not partial.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert partial.exists()
    assert not output.exists()
    run("measure", str(tiny_folder), "-o", str(output), *options)
    assert "going on from" in caplog.text
    assert not partial.exists()
    run("measure", str(tiny_folder), "-o", str(whole), *options)
    one, other = Measurement.load(output), Measurement.load(whole)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_bake_convert_and_push_from_the_command_line(tiny_folder: Path, sets: tuple[str, str], tmp_path: Path) -> None:
    file = str(tmp_path / "d.safetensors")
    derived(tiny_folder, sets, Path(file), "--layer", "1", "--mode", "one_sided")
    model, baked, adapter = str(tiny_folder), str(tmp_path / "baked"), str(tmp_path / "adapter")
    assert "--mode ablate bakes that" in run("bake", model, "--direction", file, "-o", baked, code=2).stderr
    told = run("bake", model, "--direction", file, "--mode", "ablate", "-o", baked)
    assert "7 tensors edited" in told.stdout
    assert "verified: logits as served to" in told.stdout
    told = run("bake", model, "--direction", file, "--mode", "ablate", "-o", adapter, "--lora")
    assert "an adapter of rank 1 for 7 modules" in told.stdout
    assert "verified: logits as served to" in told.stdout
    told = run("bake", model, "--direction", file, "--mode", "ablate", "-o", f"{baked}-2", "--no-verify")
    assert "not verified, as --no-verify says" in told.stdout
    told = run("convert", file, str(tmp_path / "d.gguf"))
    assert "its mode is one_sided" in told.stderr
    told = run("convert", str(tmp_path / "d.gguf"), str(tmp_path / "back.safetensors"), "--model", model)
    assert "warning: its mode is add, at all of 2 layers" in told.stderr  # a GGUF file has no block 0
    assert "back:add@2, and `steer check` shows" in told.stderr
    assert "mode add, modes ablate, add" in told.stdout
    told = run("convert", file, str(tmp_path / "direction.pt"))
    assert f"wrote {tmp_path}/direction.pt and {tmp_path}/direction_metadata.json from a direction" in told.stdout
    told = run("convert", str(tmp_path / "direction.pt"), str(tmp_path / "a.safetensors"), "--model", model)
    one, other = (Direction.load(tmp_path / name).directions[1, 0] for name in ("d.safetensors", "a.safetensors"))
    torch.testing.assert_close(one, other)
    refused = run("convert", file, str(tmp_path / "e.safetensors"), "--method", "pca", code=2).stderr
    assert "--method: is not for a direction" in refused
    assert "give --model" in run("convert", str(tmp_path / "d.gguf"), file, code=2).stderr
    told = run("push", file, "someone/refusal", "--folder", str(tmp_path / "repo"))
    assert "nothing was uploaded" in told.stdout
    assert "one_sided" in (tmp_path / "repo" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "--port", "many"), "--port"),
        (("serve", "--rank", "0", "--rows", "x"), "--rows"),
        (("serve", "--default-steer", "refusal=much"), "'much' is not accepted"),
        (("serve", "--sites", "attention"), "accepted: resid_post, writers"),
        (
            ("serve", "/nowhere/model", "--backend", "transformers"),
            "cannot load the model '/nowhere/model': there is no",
        ),
        (("serve", "/nowhere/model"), "there is no such folder; accepted: a folder with config.json"),
        (("serve", "tests"), "the folder has no config.json"),
        (("serve", "README.md"), "it is a file, not a folder"),
        (
            ("serve", "steer/demo/model", "--backend", "transformers", "--device", "tpu9", "--port", "0"),
            "device 'tpu9' cannot be used",
        ),
        (("serve", "--prot", "8001"), "--prot 8001: not an option of the transformers backend"),
        (("serve", "--directions", "/nowhere"), "does not exist"),
        (("inspect", "/nowhere.safetensors"), "cannot be read"),
        (("fit", "m", "--harmful", "/nowhere.txt", "--harmless", "x.csv", "-o", "x.safetensors"), "cannot be read"),
        (
            ("fit", "m", "--harmful", "a", "--harmless", "b", "-o", "x.safetensors", "--method", "magic"),
            "accepted: slerp",
        ),
        (("fit", "m", "--harmful", "a", "--harmless", "b", "-o", "x.safetensors", "--layer", "top"), "--layer"),
        (("measure", "m", "--harmful", "a", "--harmless", "b", "-o", "x", "--positions", "last"), "--positions"),
        (("measure", "m", "--harmful", "a", "--harmless", "b", "-o", "x", "--winsorize", "2"), "--winsorize"),
        (("derive", "/nowhere", "-o", "x.safetensors"), "cannot be read"),
        (("fit", "m", "--harmful", "a", "--harmless", "b", "-o", "x.txt"), "'x.txt' must end in .safetensors"),
        (("fit", "m", "--harmful", "a", "--harmless", "b", "-o", "x y.safetensors"), "'x y' is not acceptable"),
        (("fit", "m", "--harmful", "a", "--harmless", "b", "-o", "nowhere/x.safetensors"), "nowhere does not exist"),
        (
            ("fit", "m", "--harmful", "a", "--harmless", "b", "-o", "x.safetensors", "--layer", "foo"),
            "--layer: 'foo' is not accepted: 'auto', 'widest' or 'all', or a whole number",
        ),
        (("derive", "m", "-o", "x.safetensors", "-p", "t"), "'t' is not NAME=VALUE"),
        (("derive", "m", "-o", "x.safetensors", "--method", "linear", "--t", "1"), "'linear': parameter t: unknown"),
        (("derive", "m", "-o", "x.safetensors", "--seed", "1"), "--seed: needs --bootstrap"),
        (("push", "m", "someone/x", "--folder", "y", "--private"), "--private: is for an upload"),
        (
            ("eval", "m", "--direction", "d", "--harmful", "a", "--harmless", "b", "--tasks-limit", "2"),
            "--tasks-limit: is for --tasks",
        ),
        (("methods", "magic"), "method 'magic' is not known; accepted: slerp"),
        (("audit", "verify", "nowhere.log"), "nowhere.log: cannot be read: No such file"),
        (("derive", "m", "-o", "x.safetensors", "--method", "pca", "-p", "rank=0"), "parameter rank"),
        (("convert", "/nowhere.pt", "x.safetensors"), "does not exist"),
        (("bake", "m", "--direction", "/nowhere", "-o", "x"), "cannot be read"),
        (("push", "/nowhere", "someone/x"), "cannot be read"),
    ],
)
def test_errors_name_the_option_and_have_no_traceback(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments, code=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_link_to_itself_is_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    link = tmp_path / "d.safetensors"
    link.symlink_to(link)
    for given in (("derive", str(link), "-o", str(tmp_path / "o.safetensors")), ("audit", "verify", str(link))):
        done = run(*given, code=2)
        assert str(link) in done.stderr
        assert "cannot be read" in done.stderr


ODD = (
    "\"I'm sorry, but I can't help with that.\"",
    "",
    '{"answer": "Sure! Here are three ideas.", "id": 7, "outcome": "of another tool"}',
    '{"answer": "half \\ud83d", "note": "\\ud800", "large": 123456789012345678901234567890}',
    '{"answer": ""}\r',
    '"<think>let me see"',
    '"' + "a " * 20 + '"',
    '"こちらが三つのアイデアです。"',
)
WRONG = (
    "[1]",
    '{"answer": 3}',
    "null",
    '{"a": 1}',
    "{",
    '"\\u"',
    '{"answer": "x", "n": NaN}',
    "[" * 5000,
    '{"answer": "x", "n": 1e400}',
)


def test_classify_reads_odd_lines_and_writes_what_can_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("\ufeff" + "\n".join(ODD), "utf-8", newline="")
    done = run("classify", str(file))
    told = [json.loads(line) for line in done.stdout.splitlines()]
    shown = sum(one["outcome"] == "shown" for one in told)
    assert re.search(rf"^shown {shown} of {len(told)} \(\d+\.\d% – \d+\.\d%\)", done.stderr), done.stderr
    for outcome in {one["outcome"] for one in told}:
        assert f"{outcome} {sum(one['outcome'] == outcome for one in told)} of {len(told)}" in done.stderr
    given = [json.loads(line) for line in ODD if line]
    assert [one["answer"] for one in told] == [one if isinstance(one, str) else one["answer"] for one in given]
    assert [one["outcome"] for one in told] == [
        *("shown", "complied", "complied", "degenerate", "unanswered", "degenerate", "complied")
    ]
    assert told[0]["why"]
    assert told[1]["id"] == 7
    assert told[2]["large"] == given[2]["large"]
    piped = CliRunner(charset="ascii").invoke(app, ["classify", "-"], input=file.read_bytes())
    assert [json.loads(line) for line in piped.stdout.splitlines()] == told


def test_classify_asks_a_judge(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"say {word}", "answer": "Sure."} for word in ("yes", "no", "other", "perhaps")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def obey(body: dict[str, Any]) -> tuple[int, str]:
        return 200, re.findall(r"say (\w+)", body["messages"][0]["content"])[0]

    with judging(obey) as (url, _, _):
        told = run("classify", str(file), "--judge", url, "--judge-model", "m").stdout.splitlines()
    outcomes = [json.loads(line)["outcome"] for line in told]
    assert outcomes == ["shown", "complied", "deflected", "complied"], "without a verdict the patterns decide"
    asked = "How do I fold a large map?"
    echoes = [{"answer": asked, "prompt": asked}, {"answer": asked, "messages": [{"role": "user", "content": asked}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*echoes, asked]))
    told = run("classify", str(file)).stdout.splitlines()
    assert [json.loads(line)["why"] for line in told] == ["echoed", "echoed", ""]
    file.write_text(json.dumps({"answer": "Sure.", "prompt": 7}))
    assert "line 1: 'prompt' is neither a text nor a list of messages" in run("classify", str(file), code=2).stderr
    assert "each needs one" in run("classify", str(file), "--judge", url, code=2).stderr


@pytest.mark.parametrize(
    "status", [b"", b"200 OK\r\n\r\n", b"403 no\r\n\r\n", b"403 no\r\nContent-Length: 200000\r\n\r\n"]
)
@pytest.mark.parametrize("body", [b"junk", b"{}", b"[1]", b"[" * 100_000, b'{"error": {"message": "\\u001b[2J"}}'])
def test_the_switch_of_what_is_no_server_of_ours_is_an_error(status: bytes, body: bytes) -> None:
    class Other(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.0 " + status + body)

    with socketserver.TCPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        told = run("off", "--url", url, code=2).stderr.removesuffix("\n")
        server.shutdown()
    assert told.startswith(f"error: {url}")
    assert told.isprintable()


def test_classify_tells_every_line_that_is_no_answer(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(WRONG))
    listed = run("classify", str(file), code=2).stderr
    assert "lines 1, 2, 3 and 1 more: neither a text nor an object" in listed
    assert all(re.search(rf"lines? .*\b{number}\b.*: not JSON", listed) for number in range(5, len(WRONG) + 1))
    file.write_text(" \n\n")
    assert "has no answers; accepted" in run("classify", str(file), code=2).stderr
    closed = [sys.executable, "-c", "import sys; sys.stdin = None; from steer.cli.app import app; app()"]
    told = subprocess.run([*closed, "classify", "-"], capture_output=True, text=True)
    assert "standard input is closed" in told.stderr + told.stdout
    assert "Traceback" not in told.stderr
    assert told.returncode == 2


LIGHT = """
import builtins, sys
real, heavy = builtins.__import__, {"torch", "transformers", "vllm"}
def light(name, *more, **named):
    if name.split(".")[0] in heavy:
        raise AssertionError(f"{name} was imported")
    return real(name, *more, **named)
builtins.__import__ = light
from typer.testing import CliRunner
from steer.cli.app import app
for line in sys.stdin.read().splitlines():
    done = CliRunner().invoke(app, line.split())
    print(done.exit_code, done.stderr.strip().replace(chr(10), " ") or repr(done.exception))
"""


def test_what_is_wrong_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """To import torch and transformers takes ten seconds on a slow machine, and a fit takes minutes."""
    for name, prompts in {"h": range(40), "a": range(40, 80), "few": range(3), "twice": [7] * 40, "empty": ()}.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"prompt {n}\n" for n in prompts))
    (tmp_path / "d.safetensors").mkdir()
    h, a, few, twice, empty = (tmp_path / f"{name}.txt" for name in ("h", "a", "few", "twice", "empty"))
    sets, output = f"--harmful {h} --harmless {a}", f"-o {tmp_path}/x.safetensors"
    model, other = tmp_path / "model", tmp_path / "other.safetensors"
    model.mkdir()
    (model / "config.json").write_text("{}")
    other.write_bytes((ROOT / "directions" / "refusal.safetensors").read_bytes())
    wrong = {
        f"fit /nowhere {sets} {output}": "there is no such folder",
        f"fit ./nowhere {sets} {output} --backend vllm": "there is no such folder",
        f"measure /nowhere {sets} {output}": "there is no such folder",
        f"eval /nowhere --direction d {sets}": "there is no such folder",
        "check d /nowhere": "there is no such folder",
        f"select m /nowhere {sets} {output}": "there is no such folder",
        f"search /nowhere {sets} --folder {tmp_path}": "there is no such folder",
        "serve /nowhere": "there is no such folder",
        f"fit m {sets} {output} --dry-run": "--dry-run: not an option of this command",
        f"fit m {sets} {output} --backend vllm --device cpu": "--device: not used by vLLM",
        f"fit m {sets} {output} --behaviour kindness": "behaviour 'kindness': cannot be read",
        f"fit m --harmful {h} --harmless {h} {output}": "40 prompts are in both",
        f"measure m --harmful {h} --harmless {h} {output}": "40 prompts are in both",
        f"select m m --harmful {h} --harmless {h} {output}": "40 prompts are in both",
        f"fit m --harmful {few} --harmless {a} {output}": "gives 3 different prompts, at least 7 are needed",
        f"fit m --harmful {twice} --harmless {a} {output}": "gives 1 different prompts",
        f"fit m --harmful {empty} --harmless {a} {output}": "has no prompts",
        f"fit m {sets} -o {tmp_path}/d.safetensors": "d.safetensors is a folder",
        f"measure m {sets} -o /proc/x": "cannot write into /proc",
        f"fit m {sets} {output} --template x=1 --template x=2": "--template: 'x' is given twice",
        f"measure m {sets} {output} --template x": "--template: 'x' is not NAME=VALUE",
        f"eval m --direction d {sets} --template x --kl , --answers": "--template: 'x' is not NAME=VALUE",
        f"eval m --direction d {sets} --strengths a --kl 0": "not accepted: a number error: --kl: ",
        f"measure m {sets} {output} --positions 1,a": "--positions: 'a' is not accepted: a whole number",
        f"derive {h} -o {h}": "must end in .safetensors",
        f"derive {tmp_path}/m.safetensors -o {tmp_path}/../{tmp_path.name}/m.safetensors": "is read by this command",
        f"select {tmp_path}/m.safetensors m {sets} -o {tmp_path}/m.safetensors": "is read by this command",
        f"measure m {sets} -o {a}": "a.txt' must end in .safetensors",
        f"derive m {output} --layer auto": "--layer: 'auto' is not accepted: 'widest' or 'all', or a whole number",
        f"derive m {output} --strength 0,7": "--strength: '0,7' is not accepted: a number (with a decimal point",
        f"search m {sets} --folder x --group 999": "--group: '999' is not accepted: a number from 1 to 256",
        f"fit m {sets} {output} --winsorize 3 --mode no --limit 2 --dtype x --device-map y": (
            "--limit: '2' is not accepted: a number from 8 up error: --winsorize: '3' is not accepted: a number above "
            "0 to 1 error: --mode: 'no' is not accepted: 'ablate', 'add', 'affine', 'clamp', 'one_sided', 'rotate' or "
            "'rotate_one_sided' error: --device-map: 'y' is not accepted: 'auto'"
        ),
        "audit verify a.log --from 0": "--from: '0' is not accepted: a number from 1 up",
        "serve --default-steer refusal=0,7": "there: refusal, verbosity; in a number write a decimal point",
        "serve --rank 99": "--rank: '99' is not accepted: a number from 1 to 64",
        f"serve --default-steer r --directions {tmp_path}": f"'r' is not in the folder '{tmp_path}'; there: d, other",
        "bake /nowhere --direction d -o /no/x --mode no": "the folder /no does not exist error: cannot load the model",
        f"derive m {output} --sites foo": "--sites: 'foo' is not accepted: 'resid_post' or 'writers'",
        f"select m m {sets} {output} --t a": "--t: 'a' is not accepted: a number",
        f"select m m {sets} {output} --layer a": "--layer: 'a' is not accepted: a whole number",
        f"search m {sets} --folder {tmp_path} --t 1": "--t: needs the least and the largest value",
        f"search m {sets} --folder {tmp_path} --pick 1": "belong together",
        f"measure m {sets} -o {model}/model.safetensors": "is a model's, which this would change",
        f"convert {other} {model}/model.safetensors": "is a model's, which this would change",
        f"measure m {sets} -o {other}": "other.safetensors is a direction, and would be lost",
        f"fit m {sets} {output} --harmfull a": "--harmfull a: not an option of this command; did you mean --harmful?",
        f"fit {sets} {output} --harmfull a": "--harmfull a: not an option of this command; did you mean --harmful?",
        f"fit m {sets} --out a": "--out a: not an option of this command; did you mean --output?",
        "fit --hepl": "--hepl: not an option of this command; did you mean --help?",
        f"measure m --harmles a {output}": "Missing option '--harmful'. --harmles: not an option of this",
        f"eval m {sets} --directon=d": "Missing option '--direction'. --directon=d: not an option of this",
        f"search m {sets} --foldr f": "Missing option '--folder'. --foldr: not an option of this",
        f"check {other} --stength 0.5": "--stength 0.5: not an option of this command; did you mean --strength?",
        "serve --prot 8001": "--prot 8001: not an option of the transformers backend; did you mean --port?",
        "serve --directon d --directions /no": "--directon d: not an option of the transformers backend; did you mean",
        "serve --prot=8001": "--prot=8001: not an option of the transformers backend; did you mean --port?",
        "serve --max-num-seqs 4": "--max-num-seqs 4: not an option of the transformers backend; options of vLLM need",
        f"fit m {sets} {output} --judge h://a --judge h://b --judge-model a --judge-model b": "one judge decides here",
    }
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], input="\n".join(wrong), capture_output=True, text=True, timeout=1500
    )
    told = done.stdout.splitlines()
    assert len(told) == len(wrong), done.stderr
    for (command, says), line in zip(wrong.items(), told, strict=True):
        assert line.startswith("2 "), (command, line)
        assert says in line, (command, line)


def test_an_option_of_vllm_is_not_called_a_mistyped_one() -> None:
    """`--block-size` is near to `--batch-size`. With our engine, and a model of that name, a near miss is named."""
    for backend in (["--backend", "vllm"], ["--backend=vllm"]):
        told = run("measure", "m", "--harmful", "a", "-o", "b", *backend, "--block-size", "16", code=2).stderr
        assert ("--harmless" in told, "not an option" in told) == (True, False)
    told = run("measure", "my-vllm", "--harmful", "a", "-o", "b", "--harmles", "c", code=2).stderr
    assert "--harmles: not an option of this command" in " ".join(told.split())


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from steer.cli import main
main()
"""


def test_a_file_that_cannot_be_written_is_an_error_and_no_traceback(
    tiny_folder: Path, sets: tuple[str, str], tmp_path: Path
) -> None:
    """A limit on the size of files stands for a full disk."""
    output, direction = tmp_path / "m.safetensors", tmp_path / "d.safetensors"
    derived(tiny_folder, sets, direction, "--layer", "1")
    before = set(tmp_path.iterdir())
    measure = ["measure", str(tiny_folder), "--harmful", sets[0], "--harmless", sets[1], "-o", str(output)]
    bake = ["bake", str(tiny_folder), "--direction", str(direction), "--mode", "ablate", "-o", str(tmp_path / "baked")]
    for given, start, end in (
        (
            measure,
            f"error: {output}: ",
            "File too large: give the same command again, and it goes on from what it has kept",
        ),
        (bake, f"error: {tmp_path}/.baked.tmp/", "] File too large"),
    ):
        done = subprocess.run([sys.executable, "-c", FULL, *given], capture_output=True, text=True, timeout=1500)
        last = done.stderr.splitlines()[-1]
        assert (done.returncode, last.startswith(start), last.endswith(end)) == (2, True, True), done.stderr
        assert set(tmp_path.iterdir()) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("asked", ["--help", "--version", "methods"])
def test_what_is_printed_on_a_full_disk_is_an_error_and_no_traceback(asked: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "steer", asked], stdout=full, stderr=subprocess.PIPE, text=True, timeout=1500
        )
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_a_model_that_is_nowhere_is_looked_for_once(sets: tuple[str, str], tmp_path: Path) -> None:
    """transformers asks the hub for each file again and again: with no hub that takes a minute."""
    given = ("--harmful", sets[0], "--harmless", sets[1], "-o", str(tmp_path / "x.safetensors"))
    done = run("fit", "nobody/no-such-model", *given, code=2)
    assert "there is no such folder, it is not in the hub's cache, and the hub gives: " in done.stderr


def test_an_encoder_is_not_served_as_if_it_could_answer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    done = run("serve", str(tmp_path), "--backend", "transformers", "--port", "0", code=2)
    assert "BertForMaskedLM fills in masked tokens and generates no text" in done.stderr


def test_a_folder_without_a_tokenizer_is_told_so(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    assert "has no tokenizer" in run("serve", str(tmp_path), "--backend", "transformers", "--port", "0", code=2).stderr


def test_an_interruption_says_whether_the_same_command_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    for resumes in (False, True):
        with pytest.raises(typer.Exit) as ended, reported(resumes=resumes):
            raise KeyboardInterrupt
        assert ended.value.exit_code == 130
        (line,) = capsys.readouterr().err.split("\n")[1:-1]
        assert line == "interrupted" + (": give the same command again to go on from here" if resumes else "")


INTERRUPTED = """
import builtins, sys
real, module = builtins.__import__, sys.argv.pop(1)
def interrupted(name, *more, **named):
    if name.split(".")[0] == module:
        raise KeyboardInterrupt
    return real(name, *more, **named)
builtins.__import__ = interrupted
from steer.cli import main
main()
"""


@pytest.mark.parametrize(
    ("module", "command", "resumes"),
    [
        ("typer", "measure", False),
        ("transformers", "fit", True),
        ("torch", "measure", True),
        ("transformers", "search", True),
        ("torch", "eval", True),
        ("torch", "inspect", False),
    ],
)
def test_an_interrupted_import_ends_with_one_line(module: str, command: str, resumes: bool, tmp_path: Path) -> None:
    sets = []
    for option in ("--harmful", "--harmless"):
        (tmp_path / f"{option}.txt").write_text("".join(f"{option} {n}\n" for n in range(40)))
        sets += [option, str(tmp_path / f"{option}.txt")]
    given = {
        "inspect": ["d.safetensors"],
        "eval": ["m", "--direction", "d", *sets, "--report", str(tmp_path)],
        "search": ["m", *sets, "--folder", str(tmp_path)],
    }.get(command, ["m", *sets, "-o", "x.safetensors"])
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, module, command, *given], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    (line,) = filter(None, done.stderr.split("\n"))
    assert line == "interrupted" + (": give the same command again to go on from here" if resumes else "")


@pytest.mark.parametrize("weights", [False, True], ids=["folder", "file"])
def test_a_model_in_the_place_of_a_direction_is_told_by_every_command(
    weights: bool, tiny_folder: Path, sets: tuple[str, str], tmp_path: Path
) -> None:
    model = str(tiny_folder)
    wrong = str(tiny_folder / "model.safetensors") if weights else model
    given = ("--harmful", sets[0], "--harmless", sets[1])
    output, direction = ("-o", str(tmp_path / "x.safetensors")), str(ROOT / "directions" / "refusal.safetensors")
    for command in (
        ("inspect", wrong),
        ("check", wrong, direction),
        ("eval", model, "--direction", wrong, *given),
        ("bake", model, "--direction", wrong, "-o", str(tmp_path / "baked")),
        ("push", wrong, "someone/refusal"),
        ("convert", wrong, str(tmp_path / "x.safetensors"), "--model", model),
        ("derive", wrong, *output),
        ("select", wrong, direction, *given, *output),
    ):
        (told,) = run(*command, code=2).stderr.splitlines()
        assert told.startswith(f"error: {wrong}: this is a model"), (command, told)


def test_errors_name_the_option_as_it_is_typed(sets: tuple[str, str], tiny_folder: Path, tmp_path: Path) -> None:
    direction = str(ROOT / "directions" / "refusal.safetensors")
    measured, output = str(tmp_path / "m.safetensors"), str(tmp_path / "x.safetensors")
    run("measure", str(tiny_folder), "--harmful", sets[0], "--harmless", sets[1], "-o", measured)
    for command, says in (
        (("convert", direction, str(tmp_path / "nowhere" / "x.gguf")), "OUTPUT: the folder"),
        (("check", direction, "--strength", "1000"), "--strength: 1000 is not within"),
        (("derive", measured, "-o", output, "--winsorize", "0.9"), "--winsorize needs the prompts' vectors"),
        (("derive", measured, "-o", output, "--sparsify", "2"), "--sparsify: 2.0 is not accepted: a number above 0"),
        (("derive", measured, "-o", output, "--mode", "one_sided", "--target", "3"), "--target must not be above"),
        (("bake", str(tiny_folder), "--direction", direction, "--strength", "99", "-o", output), "--strength: 99"),
    ):
        (told,) = run(*command, code=2).stderr.splitlines()
        assert told.startswith(f"error: {says}"), told
    given = ("--harmful", sets[0], "--harmless", sets[1], "--direction", direction)
    (told,) = run("eval", "m", *given, "--direction", direction, code=2).stderr.splitlines()
    assert "two files are called 'refusal'" in told


def test_a_task_that_lm_eval_does_not_have_is_told_before_all_work(sets: tuple[str, str], tmp_path: Path) -> None:
    given = ("--direction", str(ROOT / "directions" / "refusal.safetensors"), "--harmful", sets[0])
    done = run("eval", str(MODEL), *given, "--harmless", sets[1], "--tasks", "foo,arc_easy,bar", code=2)
    assert "--tasks: lm_eval has no 'foo', 'bar'" in done.stderr


def test_the_switch_of_a_server_that_is_not_there_says_so() -> None:
    told = run("off", "--url", "http://127.0.0.1:9", code=2).stderr
    assert told.startswith("error: no server answers at http://127.0.0.1:9")
    assert "--url" in told


def test_inspect_says_what_another_file_is(tiny_folder: Path, sets: tuple[str, str], tmp_path: Path) -> None:
    done = run("inspect", str(tiny_folder / "model.safetensors"), code=2)
    assert "this is a model; give a direction file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    file = str(tmp_path / "m.safetensors")
    run("measure", str(tiny_folder), "--harmful", sets[0], "--harmless", sets[1], "-o", file)
    done = run("inspect", file, code=2)
    assert "a measurement: `steer derive` makes a direction from it" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_inspect_shows_no_class_means_where_the_file_has_none(tmp_path: Path) -> None:
    shipped = Direction.load(ROOT / "directions" / "refusal.safetensors")
    file = tmp_path / "imported.safetensors"
    replace(shipped, mean_harmless=torch.zeros_like(shipped.mean_harmless)).save(file)
    row = next(line for line in run("inspect", str(file)).stdout.splitlines() if line.startswith("|     0 |"))
    assert [cell.strip() for cell in row.split("|")[2:7]] == ["–"] * 5
    layer = json.loads(run("inspect", str(file), "--json").stdout)["profile"][0]
    assert layer["norm_harmful"] is None


@pytest.mark.parametrize(
    "before", ["", "metrics_public = true\n", "[directions.refusal]\nmax_strength = 1.0\n", "[keys]\n", " \n\n"]
)
def test_a_policy_without_keys_takes_its_first_one(before: str, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(before)
    run("keys", "new", "alice", "--policy", str(policy))
    assert before.strip() in policy.read_text()
    assert "alice" in run("keys", "list", "--policy", str(policy)).stdout
    assert "there is a key 'alice'" in run("keys", "new", "alice", "--policy", str(policy), code=2).stderr
    policy.write_text("colour = 1\n")
    assert "policy.toml:1: colour: unknown" in run("keys", "new", "alice", "--policy", str(policy), code=2).stderr
    assert policy.read_text() == "colour = 1\n"


def test_tables_fit_40_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for arguments in (("inspect", "directions/refusal.safetensors"), ("methods",)):
        lines = run(*arguments).stdout.splitlines()
        assert max(map(len, lines)) <= 40
        assert len(lines) > 20


def test_methods_are_told_one_by_one_and_as_json() -> None:
    shown = run("methods", "slerp").stdout
    assert shown.startswith("slerp\n")
    assert "projected\n\n" not in shown
    told = json.loads(run("methods", "--json").stdout)
    assert set(told["slerp"]["parameters"]) == {"t"}
    assert all(each["description"] for each in told.values())


def test_lists_by_commas_may_have_spaces() -> None:
    seen = []

    def command(*, sites: Sites, numbers: Annotated[tuple[int, ...], "a list"]) -> None:
        seen.append((sites, numbers))

    expanded(command)(sites=["resid_post, writers", "writers"], numbers=["-1, -2"])
    assert seen == [(("resid_post", "writers"), (-1, -2))]
    for numbers in ("", "1,a", "1.5"):
        with pytest.raises(InvalidInput, match=r"--sites: .*; --numbers: "):
            expanded(command)(sites=["nowhere"], numbers=[numbers])
    assert ServeSettings(sites="resid_post, writers").site_list == ("resid_post", "writers")
    file = ROOT / "directions" / "refusal.safetensors"
    assert {arm.asked.mode for arm in Applied(mode=("ablate", "one_sided")).arms([file])} == {"ablate", "one_sided"}
