"""An `EngineGroup` without processes: the test says what the ranks do, and sees all that is sent to them.

Output token i of a request repeats its prompt's token i, whichever rank computes it.
"""

import asyncio

from moeyard.engine.messages import Abort, Placed, Ready, Stats, Submit, TokenDelta, Tokens, encode, pack_delta
from moeyard.scheduler.placement import linear

EXPERTS, LAYERS = 8, 2
MAX_MODEL_LEN, VOCAB_SIZE, KV_TOKENS = 256, 4096, 4096


class FakeLauncher:
    def __init__(self, ranks=2):
        self.ranks = tuple(range(ranks))
        self.can_restart = True


class FakeGroup:
    def __init__(self, launcher, on_message, on_lost, on_joined, on_death, silence_timeout=0.0):
        self.state, self.dead_reason, self.trouble = "loading", "", ""
        self.members = tuple(launcher.ranks)
        slots = EXPERTS // len(self.members) + 1
        self.lost, self.clock_offset_ns = {}, {}
        self.tables = [linear(EXPERTS, len(self.members), slots).to_lists() for _ in range(LAYERS)]
        self.sent, self.wakes = [], 0
        self.running = {rank: {} for rank in launcher.ranks}  # what each rank has: Submit and its tokens
        self.on_message, self.on_lost, self.on_joined, self.on_death = on_message, on_lost, on_joined, on_death

    async def start(self, config, timeout, loads=None):
        self.config, self.loads = config, loads
        self.state = "serving"
        return {
            rank: Ready(max_model_len=MAX_MODEL_LEN - rank, vocab_size=VOCAB_SIZE, kv_tokens=KV_TOKENS - 16 * rank)
            for rank in self.members
        }

    def send(self, rank, message):
        encode(message)
        if rank not in self.members or self.state == "dead":
            return
        self.sent.append((rank, message))
        if isinstance(message, Submit):
            for other, requests in self.running.items():
                assert message.request_id not in requests, f"rank {other} has it already"
            self.running[rank][message.request_id] = (message, list(message.output_ids))
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                self.running[rank].pop(request_id, None)

    def broadcast(self, message):
        for rank in self.members:
            self.send(rank, message)

    def wake(self):
        self.wakes += 1

    async def close(self):
        self.state, self.dead_reason = "dead", self.dead_reason or "the engine is stopped"

    # What the test makes happen

    def messages(self, kind):
        return [(rank, message) for rank, message in self.sent if isinstance(message, kind)]

    def step(self, *ranks):
        """One token of every request on these ranks, or on all."""
        for rank in ranks or self.members:
            deltas = []
            for request_id, (submit, output) in list(self.running[rank].items()):
                first = {"cached_tokens": 1, "queue_s": 0.25, "prefill_s": 0.5}
                delta = TokenDelta(
                    request_id=request_id,
                    token_ids=[submit.prompt_ids[len(output) % len(submit.prompt_ids)]],
                    finish_reason="length" if len(output) + 1 == submit.params["max_tokens"] else "",
                    **first if len(output) == len(submit.output_ids) else {},
                )
                output += delta.token_ids
                deltas.append(pack_delta(delta))
                if delta.finish_reason:
                    del self.running[rank][request_id]
            if deltas:
                self.on_message(rank, Tokens(deltas=deltas))

    def lose(self, rank, why="killed by SIGKILL at layer 3 of step 17"):
        """The rank is gone and the others do not serve yet."""
        self.state, self.lost[rank] = "recovering", why
        self.trouble = f"rank {rank} was lost ({why})"
        self.members = tuple(member for member in self.members if member != rank)
        self.running[rank] = {}
        self.on_lost(rank)
        if not self.members:
            self.die("no rank is left")

    def recover(self, *back):
        """The ranks that are left serve, and `back` again."""
        self.members = tuple(sorted((*self.members, *back)))
        self.tables = [linear(EXPERTS, len(self.members), EXPERTS).to_lists() for _ in range(LAYERS)]
        self.state = "serving"
        for rank in back:
            del self.lost[rank]
            self.on_joined(rank)

    def die(self, reason):
        self.state, self.dead_reason = "dead", reason
        self.on_death(reason)

    def report(self, rank, **values):
        self.on_message(rank, Stats(**values))

    def place(self, place, moved=1000):
        self.tables = place.tables
        self.on_message(self.members[0], Placed(version=place.version, moved=moved, tables=place.tables))


async def settle():
    """Lets everything that can run, run."""
    for _ in range(20):
        await asyncio.sleep(0)
