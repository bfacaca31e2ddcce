"""The command line: options reach the configuration, mistakes are one line, nothing heavy is imported to say so."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeyard.__main__ import BENCHES, COMMANDS, build_parser, main
from moeyard.engine.config import EngineConfig, ServeConfig
from moeyard.launch.cli import Parser, add_options, config_from, flag

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "numba", "numpy", "zmq", "huggingface_hub")


def parse(cls, argv, **kwargs):
    parser = Parser(prog="test")
    add_options(parser, cls, **kwargs)
    return config_from(parser.parse_args(argv), cls)


def module(name, **contents):
    made = types.ModuleType(name)
    vars(made).update(contents)
    return made


@pytest.fixture
def served(monkeypatch):
    """The configurations that `moeyard serve` was started with."""
    configs = []

    def run(config):
        configs.append(config)
        return 0

    monkeypatch.setitem(sys.modules, "moeyard.launch.server", module("moeyard.launch.server", run=run))
    monkeypatch.delenv("MOEYARD_API_KEY", raising=False)
    return configs


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["generate", "--help"], ["plan", "--help"]])
def test_help_imports_nothing_heavy(argv):
    code = (
        "import sys, json\nfrom moeyard.__main__ import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: moeyard")
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_every_field_is_an_option_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(ServeConfig):
        assert flag(f.name) in text
        if f.name != "model":
            assert f.metadata["help"] in text
        for choice in f.metadata["choices"]:
            assert choice in text


def test_without_options_the_dataclass_decides(served):
    assert main(["serve"]) == 0
    assert served == [ServeConfig()]


@given(data=st.data())
def test_options_reach_the_configuration(data):
    values = {
        "model": data.draw(st.sampled_from(["a/b", "dir", "x y"])),
        "dtype": data.draw(st.sampled_from(["float32", "bfloat16"])),
        "threads": data.draw(st.integers(1, 99)),
        "max_batched_tokens": data.draw(st.integers(500, 10**6)),
        "memory_fraction": data.draw(st.floats(0.01, 1.0)),
        "prefix_cache": data.draw(st.booleans()),
        "trust_remote_code": data.draw(st.booleans()),
        "kv_memory": data.draw(st.sampled_from(["8GiB", "123"])),
        "port": data.draw(st.integers(0, 65535)),
        "api_key": data.draw(st.sampled_from(["k", "-k-"])),
    }
    values = {k: v for k, v in values.items() if data.draw(st.booleans())}
    argv = []
    for name, value in values.items():
        if isinstance(value, bool):
            argv.append(flag(name) if value else "--no-" + flag(name)[2:])
        else:
            argv.append(f"{flag(name)}={value}")
    config = parse(ServeConfig, argv)
    assert dataclasses.asdict(config) == dataclasses.asdict(ServeConfig()) | values


def test_model_is_positional_or_an_option():
    assert parse(EngineConfig, ["m"], model_positional=True).model == "m"
    assert parse(EngineConfig, ["--model", "m"], model_positional=True).model == "m"
    assert parse(EngineConfig, ["m", "--model", "m"], model_positional=True).model == "m"
    with pytest.raises(ValueError, match="MODEL is 'a' and --model is 'b'"):
        parse(EngineConfig, ["a", "--model", "b"], model_positional=True)


def test_api_key_comes_from_the_option_before_the_environment(served, monkeypatch):
    monkeypatch.setenv("MOEYARD_API_KEY", "from-env")
    main(["serve"])
    main(["serve", "--api-key", "given"])
    monkeypatch.setenv("MOEYARD_API_KEY", "")
    main(["serve"])
    assert [config.api_key for config in served] == ["from-env", "given", None]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["srve"], "unknown command 'srve'; did you mean serve?"),
        (["serve", "--prt", "80"], "unknown option --prt; did you mean --port?"),
        (["serve", "--prt=80"], "unknown option --prt; did you mean --port?"),
        (["serve", "--no-prefix-cach"], "unknown option --no-prefix-cach; did you mean --no-prefix-cache?"),
        (["serve", "--max-model", "5"], "unknown option --max-model; did you mean --max-model-len?"),
        (["generate", "--max-token", "5"], "unknown option --max-token; did you mean --max-tokens?"),
        (["bench", "thruput"], "unknown command 'thruput'; did you mean throughput?"),
        (["--versio"], "unknown option --versio; did you mean --version?"),
        (["serve", "--zzzzzzzz"], "unknown option --zzzzzzzz (see"),
        (["serve", "--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["serve", "--port", "x"], "argument --port: invalid int value: 'x'"),
        (["generate"], "the following arguments are required: PROMPT"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("moeyard: error: ") and expected in err


def test_options_are_never_guessed_from_a_prefix(served, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--max-num", "4"])
    assert "did you mean --max-num-seqs?" in capsys.readouterr().err
    assert served == []


def test_what_follows_a_double_dash_is_not_an_option():
    assert build_parser().parse_args(["generate", "--", "--x"]).prompt == "--x"
    assert build_parser().parse_args(["generate", "--x = y"]).prompt == "--x = y"


def test_a_value_out_of_range_is_one_line_and_code_2(served, capsys):
    assert main(["serve", "--max-num-seqs", "0"]) == 2
    assert capsys.readouterr().err == "moeyard: error: max_num_seqs is 0; it must be at least 1\n"
    assert served == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("model: no such\ndirectory"), 2, "model: no such directory"),
        (RuntimeError("boom"), 1, "RuntimeError: boom (--debug shows where)"),
        (KeyError(), 1, "KeyError: KeyError (--debug shows where)"),
        (OSError("port 80 is taken"), 1, "port 80 is taken"),
        (ModuleNotFoundError("No module named 'x'"), 1, "No module named 'x'; `moeyard doctor` lists what is missing"),
    ],
)
def test_no_stack_trace_without_debug(served, monkeypatch, capsys, error, code, line):
    def fail(config):
        raise error

    monkeypatch.setattr(sys.modules["moeyard.launch.server"], "run", fail)
    assert main(["serve"]) == code
    assert capsys.readouterr().err == f"moeyard: error: {line}\n"
    for argv in (["--debug", "serve"], ["serve", "--debug"]):
        assert main(argv) == code
        assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_quiet(served, monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["moeyard.launch.server"], "run", interrupt)
    assert main(["serve"]) == 130
    assert capsys.readouterr().err == ""


def test_the_exit_code_is_the_command_s(served, monkeypatch):
    monkeypatch.setattr(sys.modules["moeyard.launch.server"], "run", lambda config: 7)
    assert main(["serve"]) == 7


@pytest.mark.parametrize("bench", BENCHES)
def test_bench_takes_its_options_from_its_own_module(bench, monkeypatch, capsys):
    def add_arguments(parser):
        parser.add_argument("model", nargs="?")
        parser.add_argument("--rounds", type=int)

    def run(args):
        models.append(args.model)
        return args.rounds

    models = []
    name = f"moeyard.bench.{bench}"
    monkeypatch.setitem(sys.modules, name, module(name, add_arguments=add_arguments, run=run))
    assert main(["bench", bench, "--rounds", "3"]) == 3
    assert main(["bench", bench, "--rounds", "0", "m"]) == 0
    assert main(["bench", bench, "--rounds", "0", "--model", "m"]) == 0
    assert models == [None, "m", "m"]
    assert main(["bench", bench, "m", "--model", "n"]) == 2
    assert capsys.readouterr().err == "moeyard: error: MODEL is 'm' and --model is 'n'; give one of them\n"


def test_every_command_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in BENCHES)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == "moeyard 0.1.0\n"


def test_an_empty_api_key_is_an_error_not_an_open_server():
    with pytest.raises(ValueError, match="api_key is empty"):
        ServeConfig(api_key="")
