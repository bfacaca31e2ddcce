"""A rank's process without an engine: it speaks the messages, notices dead peers, and misbehaves as it is told.

It does what files in $FAKE_DIR and its options in $FAKE_RANKS (JSON, `{"rank": {option: value}}`) say:

`pid-N` is written by rank N, and `heard-N` gets the name of each message that it takes. While `do-N` exists, holding
words, rank N follows them:
    hush    no heartbeats        deaf   takes no messages      stuck   never says Broken     break  says Broken once
    fatal   says Fatal and ends  exit   ends with code 5       garbage sends what is no message
    numb    does not notice dead peers
Options at start: `version`, `number` (the rank that it calls itself), `die_at` ("configure", "store", "form",
"load"), `no_hello`, `no_store`, `no_join`, `refuse` (a user's error), `old_wire` (speaks another protocol version),
`once` (the options hold for the first process of this rank only).

Like a rank that waits in an exchange, it notices a dead peer only when it has been woken; that the front end says that
the group is broken it notices always.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import msgpack
import psutil
import zmq

import moeyard
from moeyard.engine import messages as m

POLL_MS = 10
BEAT_S = 0.05
STEP, LAYER = 17, 3
DIRECTORY = Path(os.environ.get("FAKE_DIR", "."))


class FakeRank:
    def __init__(self, args):
        self.rank = args.rank
        self.parent = args.parent
        self.pid_file = DIRECTORY / f"pid-{self.rank}"
        self.options = json.loads(os.environ.get("FAKE_RANKS", "{}")).get(str(self.rank), {})
        if self.options.get("once") and self.pid_file.exists():
            self.options = {}
        self.pid_file.write_text(str(os.getpid()))
        self.context = zmq.Context()
        self.main = self.connect(args.connect, f"rank-{self.rank}")
        self.beat = self.connect(args.connect, f"beat-{self.rank}")
        self.beats = self.loaded = self.woken = False
        self.epoch = 0
        self.broken = 0
        self.peers = {}
        self.tables = None
        self.beat_at = 0.0

    def connect(self, endpoint, identity):
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, identity.encode())
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.IPV6, 1)
        socket.connect(endpoint)
        return socket

    def say(self, message):
        self.main.send(m.encode(message))

    def end(self, code):
        self.main.close()
        self.beat.close()
        self.context.term()
        sys.exit(code)

    def maybe_die(self, moment):
        if self.options.get("die_at") == moment:
            os._exit(9)

    @property
    def words(self):
        try:
            return (DIRECTORY / f"do-{self.rank}").read_text().split()
        except FileNotFoundError:
            return []

    def run(self):
        if not self.options.get("no_hello"):
            number = self.options.get("number", self.rank)
            version = self.options.get("version", moeyard.__version__)
            hello = m.Hello(pid=os.getpid(), version=version, rank=number)
            if self.options.get("old_wire"):
                self.main.send(msgpack.packb([m.VERSION - 1, *msgpack.unpackb(m.encode(hello))[1:]]))
            else:
                self.say(hello)
        while os.getppid() == self.parent:
            words = self.words
            if "exit" in words:
                self.end(5)
            if "fatal" in words:
                self.say(m.Fatal(error="RuntimeError: no luck"))
                self.end(1)
            if "garbage" in words:
                self.main.send(b"garbage")
                time.sleep(0.05)
            if "hush" not in words:
                self.maybe_beat()
            if "deaf" not in words and self.main.poll(POLL_MS):
                self.take(m.decode(self.main.recv()))
            self.look_at_peers(words)
        self.end(1)

    def maybe_beat(self):
        now = time.monotonic()
        if self.beats and now - self.beat_at >= BEAT_S:
            self.beat_at = now
            beat = m.Beat(rank=self.rank, step=STEP, layer=LAYER, phase="wait", clock=time.monotonic_ns())
            self.beat.send(m.encode(beat))
        while self.beat.poll(0):
            answer = m.decode(self.beat.recv())
            assert isinstance(answer, m.Heard)
            self.broken = max(self.broken, answer.broken)

    def take(self, message):
        name = type(message).__name__
        with (DIRECTORY / f"heard-{self.rank}").open("a") as file:
            file.write(f"{name}\n")
        match message:
            case m.Configure():
                self.maybe_die("configure")
                self.tables = message.tables
                self.beats = message.config["ep"] > 1
                if self.options.get("refuse"):
                    self.say(m.Fatal(error="model: the checkpoint is not good; get another", user=True))
                    self.end(1)
                if message.config["ep"] == 1:
                    self.load()
            case m.Form(address=""):
                self.maybe_die("store")
                if not self.options.get("no_store"):
                    self.say(m.Store(epoch=message.epoch, address="127.0.0.1:1"))
            case m.Form():
                self.maybe_die("form")
                if not self.options.get("no_join"):
                    self.join(message)
            case m.Wake():
                self.woken = True
            case m.Submit():
                delta = m.TokenDelta(request_id=message.request_id, token_ids=[self.rank])
                self.say(m.Tokens(deltas=[m.pack_delta(delta)]))
            case m.Place():
                self.say(m.Placed(version=message.version, moved=1, tables=message.tables))
            case m.Ping():
                self.say(m.Pong(number=message.number))
            case m.Shutdown():
                self.end(0)

    def join(self, form):
        self.epoch, self.woken = form.epoch, False
        self.peers = {r: int((DIRECTORY / f"pid-{r}").read_text()) for r in form.members if r != self.rank}
        tables = [[list(form.members)]] if self.loaded else None
        self.say(m.Joined(epoch=form.epoch, tables=tables))
        if not self.loaded:
            self.load()

    def load(self):
        self.maybe_die("load")
        self.loaded = True
        self.say(
            m.Ready(max_model_len=100, vocab_size=10, kv_tokens=50, info={"tables": [[[0]]], "again": self.tables})
        )

    def look_at_peers(self, words):
        if not self.epoch or "stuck" in words:
            return
        error = "I was told so" if "break" in words else ""
        told = not error and self.broken >= self.epoch
        if told:
            error = "the front end said so"
        elif self.woken and "numb" not in words:
            dead = [rank for rank, pid in self.peers.items() if not alive(pid)]
            error = error or (f"connection closed by rank {dead[0]}" if dead else "")
        if error:
            if "break" in words:
                (DIRECTORY / f"do-{self.rank}").unlink()
            self.say(m.Broken(epoch=self.epoch, step=STEP, layer=LAYER, phase="wait", error=error, told=told))
            self.epoch = 0


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--connect")
    for name in ("--parent", "--rank", "--local-rank", "--local-ranks"):
        parser.add_argument(name, type=int)
    FakeRank(parser.parse_args()).run()


if __name__ == "__main__":
    main()
