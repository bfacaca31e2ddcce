"""The offline API: over a fake engine for its life and its arguments, over the real one for what it is for."""

import gc
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from fake_worker import Command

from moeyard import LLM, SamplingParams
from moeyard.engine.resolve import EMBEDDED
from moeyard.launch import frontend
from moeyard.launch.frontend import EngineError, RequestError
from moeyard.launch.local import LocalLauncher
from moeyard.launch.outputs import RequestOutput

BOUND_S = 30
FAKE = Path(__file__).with_name("fake_worker.py")
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


def wait_for(condition):
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def _runs_a_fake(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and str(FAKE) in process.cmdline()
    except psutil.NoSuchProcess:  # ended between being listed and being looked at
        return False


def workers():
    """Processes of fake engines that this one has started and that run."""
    return [child.pid for child in psutil.Process().children() if _runs_a_fake(child)]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Makes LLMs with a fake engine; `calls` has what reached it."""

    def make(model="", env=(), **options):
        def launcher(config, environ):
            return LocalLauncher(
                command=[sys.executable, "-P", str(FAKE)], env={"FAKE_LOG": str(tmp_path / "calls")} | dict(env)
            )

        monkeypatch.setattr(frontend, "choose_launcher", launcher)
        llm = LLM(model, **options)
        made.append(llm)
        return llm

    made = []
    make.calls = lambda: (tmp_path / "calls").read_text()
    yield make
    for llm in made:
        llm.close()


@pytest.fixture(scope="module")
def real():
    with LLM(dtype="float32", kv_memory="16MiB", max_model_len=256, threads=1) as llm:
        yield llm


class TestArguments:
    def test_prompts_of_all_kinds_in_their_order(self, fake):
        llm = fake()
        ids = llm.tokenizer("b c").input_ids
        outputs = llm.generate(["a b", {"prompt": "x"}, {"prompt_token_ids": ids}], GREEDY)
        assert [type(output) for output in outputs] == [RequestOutput] * 3
        assert [output.prompt for output in outputs] == ["a b", "x", None]
        assert outputs[2].prompt_token_ids == ids
        for output in outputs:
            assert output.outputs[0].token_ids == (output.prompt_token_ids * 4)[:4]
        (single,) = llm.generate("a b", GREEDY)
        assert single.outputs[0].token_ids == outputs[0].outputs[0].token_ids
        assert llm.generate([], GREEDY) == []

    def test_many_requests_keep_their_order(self, fake):
        prompts = [{"prompt_token_ids": [i]} for i in range(1, 101)]
        params = [SamplingParams(temperature=0.0, max_tokens=1 + i % 5) for i in range(100)]
        outputs = fake().generate(prompts, params)
        assert [o.outputs[0].token_ids for o in outputs] == [[i + 1] * (1 + i % 5) for i in range(100)]

    def test_without_parameters_the_checkpoint_decides(self, fake, tmp_path):
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "generation_config.json").write_text('{"temperature": 0.25, "top_k": 3}')
        llm = fake(str(model))
        assert llm.default_params() == SamplingParams(temperature=0.25, top_k=3)
        llm.generate({"prompt_token_ids": [1]})
        assert '"temperature": 0.25' in fake.calls()

    def test_what_is_not_a_prompt(self, fake):
        llm = fake()
        for prompt in (5, None, {"text": "a"}, {"prompt": 5}, {"prompt": "a", "prompt_token_ids": [1]}):
            with pytest.raises(ValueError, match="a prompt is a text"):
                llm.generate([prompt], GREEDY)

    def test_one_bad_prompt_stops_all_before_they_run(self, fake):
        llm = fake()
        with pytest.raises(ValueError, match=r"prompts\[1\]: the prompt has 999 tokens"):
            llm.generate([{"prompt_token_ids": [1]}, {"prompt_token_ids": [1] * 999}], GREEDY)
        with pytest.raises(ValueError, match="2 entries for 1 prompts"):
            llm.generate("a", [GREEDY, GREEDY])
        assert "submit" not in fake.calls()

    def test_a_request_that_fails_stops_the_others(self, fake):
        llm = fake()
        with pytest.raises(ValueError, match="not today"):
            llm.generate([{"prompt_token_ids": [first]} for first in (Command.NEVER, Command.REFUSE)], GREEDY)
        wait_for(lambda: '"abort"' in fake.calls())
        llm.generate({"prompt_token_ids": [1]}, GREEDY)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [("max_modle_len", "did you mean max_model_len"), ("tensor_parallel_size", "the options are model, revision")],
    )
    def test_unknown_options(self, name, hint):
        with pytest.raises(TypeError, match=f"no option '{name}'; {hint}"):
            LLM(**{name: 1})
        assert not workers()

    def test_bad_values_and_models(self):
        with pytest.raises(ValueError, match="dtype is 'float8'"):
            LLM(dtype="float8")
        with pytest.raises(ValueError, match=r"there is no directory '\./nowhere'"):
            LLM("./nowhere")
        assert not workers()

    def test_progress_bar(self, fake, capsys):
        llm = fake()
        llm.generate(["a", "b"], GREEDY)
        assert "2/2" in capsys.readouterr().err
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
        assert capsys.readouterr().err == ""
        fake(progress=False).generate(["a", "b"], GREEDY)
        assert capsys.readouterr().err == ""


class TestChat:
    def test_the_template_makes_the_prompt(self, fake):
        llm = fake()
        talk = [{"role": "user", "content": "def f():"}]
        (one,) = llm.chat(talk, GREEDY)
        assert one.prompt == "def f():\n"
        assert [output.prompt for output in llm.chat([talk, talk[:1]], GREEDY)] == ["def f():\n"] * 2

    def test_what_the_template_refuses(self, fake):
        llm = fake()
        with pytest.raises(ValueError, match="the chat template refused"):
            llm.chat([{"role": "user", "content": "a"}], GREEDY, chat_template="{{ raise_exception('no') }}")
        llm.tokenizer.chat_template = None
        with pytest.raises(ValueError, match="has no chat template"):
            llm.chat([{"role": "user", "content": "a"}], GREEDY)


class TestStream:
    def test_outputs_grow_and_stay_what_they_were(self, fake):
        llm = fake(env={"FAKE_STEP_S": "0.02"})
        seen = list(llm.stream("one two three", SamplingParams(temperature=0.0, max_tokens=9)))
        lengths = [len(output.outputs[0].token_ids) for output in seen]
        assert lengths == sorted(set(lengths)) and lengths[-1] == 9 and len(lengths) > 2
        assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]

    def test_leaving_it_aborts(self, fake):
        llm = fake(env={"FAKE_STEP_S": "0.02"})
        for _ in llm.stream("a", SamplingParams(max_tokens=200)):
            break
        gc.collect()
        wait_for(lambda: '"abort"' in fake.calls())

    def test_errors_come_before_the_first_output(self, fake):
        with pytest.raises(ValueError, match="the prompt is empty"):
            fake().stream({"prompt_token_ids": []})

    def test_closing_the_model_ends_it(self, fake):
        llm = fake(env={"FAKE_STEP_S": "0.02"})
        stream = llm.stream("a", SamplingParams(max_tokens=200))
        next(stream)
        llm.close()
        with pytest.raises(ValueError):
            for _ in stream:
                pass


class TestLife:
    def test_close_ends_the_process(self, fake):
        llm = fake()
        assert len(workers()) == 1
        llm.close()
        llm.close()
        assert not workers()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("moeyard")]
        with pytest.raises(ValueError, match="closed"):
            llm.generate("a", GREEDY)

    def test_with_block(self, fake):
        with fake() as llm:
            llm.generate("a", GREEDY)
        assert not workers()

    @pytest.mark.parametrize("where", ["here", "in its own loop"])
    def test_a_forgotten_one_ends_its_process(self, monkeypatch, where):
        command = [sys.executable, "-P", str(FAKE)]
        monkeypatch.setattr(frontend, "choose_launcher", lambda *_: LocalLauncher(command=command))

        async def collect():
            gc.collect()

        llm = LLM()
        loop = llm._loop
        llm.me = llm  # a cycle: only the collector finds it, in whatever thread it runs
        assert len(workers()) == 1
        del llm
        if where == "here":
            gc.collect()
        else:
            loop.run(collect())
        wait_for(lambda: not workers() and loop.closed)

    @pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "1 / 0"])
    def test_the_end_of_the_program_ends_it(self, ending, tmp_path):
        (tmp_path / "config.json").write_text("{}")  # no tokenizer: a light program
        program = textwrap.dedent(
            f"""
            import sys
            from moeyard import LLM, SamplingParams
            from moeyard.launch import frontend
            from moeyard.launch.local import LocalLauncher
            launcher = LocalLauncher(command=[sys.executable, "-P", {str(FAKE)!r}])
            frontend.choose_launcher = lambda *_: launcher
            llm = LLM({str(tmp_path)!r})
            stream = llm.stream({{"prompt_token_ids": [1]}}, SamplingParams(max_tokens=200))
            next(stream)
            print(launcher.pid, launcher._directory, flush=True)
            {ending}
            """
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        pid, directory = done.stdout.split()
        assert not psutil.pid_exists(int(pid)) and not Path(directory).exists()
        wanted = {"": 0, "raise SystemExit(3)": 3, "1 / 0": 1}[ending]
        assert done.returncode == wanted
        assert "Traceback" not in done.stderr or ending == "1 / 0"

    def test_a_start_that_fails_leaves_nothing(self, fake):
        with pytest.raises(ValueError, match="the checkpoint is not good"):
            fake(env={"FAKE_START": "refuse"})
        with pytest.raises(EngineError, match="no luck"):
            fake(env={"FAKE_START": "fail"})
        assert not workers()

    def test_a_dead_engine_is_told(self, fake):
        llm = fake()
        with pytest.raises(RequestError, match="exit code 3"):
            llm.generate({"prompt_token_ids": [Command.EXIT]}, GREEDY)
        with pytest.raises(ValueError, match="the engine is dead"):
            llm.generate("a", GREEDY)


class TestRealEngine:
    def test_greedy_text_is_that_of_transformers(self, real):
        from transformers import AutoModelForCausalLM

        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        (output,) = real.generate(["def main("], params)
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
        wanted = model.generate(
            torch.tensor([output.prompt_token_ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False
        )[0].tolist()
        assert output.prompt_token_ids + output.outputs[0].token_ids == wanted
        assert output.outputs[0].text == real.tokenizer.decode(wanted[len(output.prompt_token_ids) :])
        assert output.outputs[0].finish_reason == "length"

    def test_a_stream_ends_with_what_generate_gives(self, real):
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        *_, last = real.stream("import ", params)
        (whole,) = real.generate("import ", params)
        assert last.outputs == whole.outputs and last.finished

    def test_seeds_make_samples_reproducible(self, real):
        params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=8)
        (one,), (two,) = real.generate("class A", params), real.generate("class A", params)
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in two.outputs]
        assert len({tuple(o.token_ids) for o in one.outputs}) > 1

    def test_stop_string_and_logprobs(self, real):
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        (free,) = real.generate("def main(", params)
        text = free.outputs[0].text
        stop = text[4:7]
        (output,) = real.generate(
            "def main(",
            SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=(stop,), logprobs=2),
        )
        (one,) = output.outputs
        assert (one.text, one.stop_reason) == (text[: text.index(stop)], stop)
        assert all(len(entry.top) == 2 and entry.logprob == entry.top[0][1] <= 0 for entry in one.logprobs)
        assert [entry.token_id for entry in one.logprobs] == one.token_ids

    def test_the_engine_says_what_it_did(self, real):
        wait_for(lambda: real._frontend.stats.running == 0 and real._frontend.stats.steps > 0)
        stats = real._frontend.stats
        assert stats.kv_blocks_total > 0 and stats.generated_tokens > 0
        assert len(stats.expert_counts) == 8 and len(stats.expert_counts[0]) == 32
        assert real._frontend.ready.info["architecture"]
