"""The engine's process with an engine that needs no model: for tests of what is around it.

Output token i repeats the prompt's token i, or with a temperature follows from the seed. The prompt's first token may
be a `Command`. Calls are written, one JSON array a line, to the file in $FAKE_LOG.
"""

import json
import os
import sys
import time

from moeyard.engine.messages import Stats, TokenDelta
from moeyard.engine.params import SamplingParams
from moeyard.engine.worker import main

VOCAB_SIZE = 4096
MAX_MODEL_LEN = 256
KV_TOKENS = 4096


class Command:
    """First tokens of prompts that make something happen: refused, the step fails, the process ends, the step never
    ends, the request fails after its first token, there is never a token."""

    REFUSE, FAIL_STEP, EXIT, HANG, FAIL_REQUEST, NEVER = range(4000, 4006)


class FakeEngine:
    max_model_len = MAX_MODEL_LEN
    vocab_size = VOCAB_SIZE
    kv_tokens = KV_TOKENS

    def __init__(self, config):
        self.info = {"model": "fake"}
        self.write("config", config.model, config.dtype)
        match os.environ.get("FAKE_START"):
            case "refuse":
                raise ValueError("model: the checkpoint is not good; get another")
            case "fail":
                raise RuntimeError("no luck")
            case "exit":
                os._exit(7)
            case "hang":
                time.sleep(600)
        self.step_s = float(os.environ.get("FAKE_STEP_S", "0"))
        self.tasks = int(os.environ.get("FAKE_TEND", "0"))
        self.requests = {}
        self.steps = self.prefilled = self.generated = 0

    def write(self, *call):
        if path := os.environ.get("FAKE_LOG"):
            with open(path, "a") as file:
                file.write(json.dumps(call) + "\n")

    @property
    def has_work(self):
        return bool(self.requests)

    def tend(self):
        """$FAKE_TEND times there is something to do in the background."""
        if self.tasks:
            self.write("tend", self.tasks)
            self.tasks -= 1
        return bool(self.tasks)

    def remember(self):
        self.write("remember")

    def submit(self, submit):
        params = SamplingParams.from_dict(submit.params)
        self.write("submit", submit.request_id, params.to_dict(), submit.cache_salt)
        if submit.prompt_ids[0] == Command.REFUSE:
            raise ValueError("logit_bias: not today")
        self.requests[submit.request_id] = (submit.prompt_ids, params, [])

    def abort(self, request_id):
        self.write("abort", request_id)
        self.requests.pop(request_id, None)

    def step(self):
        time.sleep(self.step_s)
        self.steps += 1
        deltas = []
        for request_id, (prompt, params, output) in list(self.requests.items()):
            match prompt[0]:
                case Command.FAIL_STEP:
                    raise RuntimeError("a step went wrong")
                case Command.EXIT:
                    os._exit(3)
                case Command.HANG:
                    time.sleep(600)
                case Command.FAIL_REQUEST if output:
                    del self.requests[request_id]
                    deltas.append(
                        TokenDelta(request_id=request_id, token_ids=[], finish_reason="error", error="broken")
                    )
                    continue
                case Command.NEVER:
                    continue
            i = len(output)
            token = prompt[i % len(prompt)] if params.temperature == 0 else (params.seed * 31 + i * 7) % 4000
            output.append(token)
            self.generated += 1
            self.prefilled += len(prompt) if i == 0 else 0
            stops = token in params.stop_token_ids
            reason = "stop" if stops else "length" if len(output) == params.max_tokens else ""
            if reason:
                del self.requests[request_id]
            first = {"cached_tokens": 1, "queue_s": 0.25, "prefill_s": 0.5} if i == 0 else {}
            logprobs = [[-0.5, [[token, -0.5], [1, -2.0]][: params.logprobs]]] if params.logprobs is not None else None
            deltas.append(
                TokenDelta(
                    request_id=request_id,
                    token_ids=[token],
                    logprobs=logprobs,
                    finish_reason=reason,
                    stop_token=token if stops else None,
                    **first,
                )
            )
        if not deltas:
            time.sleep(0.01)
        return deltas

    def stats(self, with_experts):
        return Stats(
            running=len(self.requests),
            steps=self.steps,
            prompt_tokens=self.prefilled,
            generated_tokens=self.generated,
            expert_counts=[[self.steps, 1]] if with_experts else None,
        )


if __name__ == "__main__":
    sys.exit(main(factory=FakeEngine))
