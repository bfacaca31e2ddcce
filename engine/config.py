"""Every option of the engine and of the server: its name, default, help text and choices, in one place.

The command line is generated from these dataclasses (`moeyard.__main__`), so an option that is not here does not exist.
Sizes are given as text (`"8GiB"`, `"512MiB"`, or a plain number of bytes) and read by `parse_size`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

FOR_SEVERAL_RANKS = {
    "dispatcher": "no token leaves it",
    "chunks": "no token leaves it",
    "expert_placement": "it has all experts",
    "redundant_experts": "it has all experts",
    "move_bytes": "it has all experts",
    "balance": "it computes everything",
    "guest_memory": "it computes everything",
    "rank_timeout": "it has no others to wait for",
    "collective_timeout": "it has no others to wait for",
    "router": "it gets every request",
    "ttft_target": "it gets every request",
}
"""The options that change nothing with one rank, and why. The others about ranks do: a lost one can be started again
(`on_rank_loss`), and its experts' loads recorded for more ranks (`placement`)."""

BALANCE = ("auto", "priced", "native", "eplb", "resplit", "llep", "moonep", "ultraep", "metro", "tempo")
WITHOUT_GUESTS = ("native", "eplb", "resplit", "metro", "tempo")
"""Planners that move no weights."""

RESIDENCY = ("auto", "predicted", "default", "decayed", "lfru", "lfu", "lru")
"""Policies (`scheduler.residency`). The first is the second where a predictor of next use is there, else the third; the
third is by decayed frequency, too."""

EXPERT_DTYPES = ("auto", "fp8", "int8", "int4", "plain")

MISSES = ("auto", "copy", "cpu")

BATCHING = ("auto", "affinity", "order")

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), metavar: str = "") -> Any:
    """A dataclass field with the text and the choices that the command line shows."""
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


def parse_size(text: str, name: str = "size") -> int:
    """Bytes in `"8GiB"`, `"1.5GB"`, `"4096"`. Raises ValueError naming the option for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _UNITS:
        raise ValueError(f"{name}: cannot read {text!r} as a size; write for example 8GiB, 512MiB or 4096")
    return int(float(match.group(1)) * _UNITS[unit])


def parse_budget(text: str, total: int, name: str = "size") -> int:
    """Bytes in a size (`parse_size`) or in a share of `total` (`"25%"`). Raises ValueError naming the option."""
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share is None:
        return parse_size(text, name)
    if not 0 < float(share.group(1)) <= 100:
        raise ValueError(f"{name} is {text}; a share must be above 0% and at most 100%")
    return int(total * float(share.group(1)) / 100)


def format_size(size: float) -> str:
    """`1536` -> `1.5 KiB`; three significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine. Raises ValueError naming the field and the remedy."""

    model: str = option("", "checkpoint directory or Hub id (default: the small embedded checkpoint)")
    revision: str | None = option(None, "branch, tag or commit, for a Hub id")
    trust_remote_code: bool = option(False, "run model code that ships with the checkpoint")
    dtype: str = option(
        "auto",
        "type of weights and activations; auto takes the checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    expert_dtype: str = option(
        "auto",
        "type in which experts are kept, moved and read from memory: auto as the checkpoint has them, quantised or not;"
        " fp8, int8 and int4 are made of plain ones as they are loaded; plain dequantises them. Quantised ones on CPUs",
        choices=EXPERT_DTYPES,
    )
    device: str = option("auto", "auto takes CUDA when there is a GPU", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(None, "CPU threads (default: the cores this process may use)")
    max_model_len: int | None = option(None, "longest prompt plus output, in tokens (default: the model's)")
    max_num_seqs: int = option(128, "most requests that run at the same time")
    max_decode_seqs: int | None = option(
        None, "most requests that decode in one step, of those that run; the others take turns (default: all decode)"
    )
    max_batched_tokens: int = option(2048, "token budget of one step, prefill and decode together")
    block_size: int = option(16, "tokens in one KV block")
    memory_fraction: float | None = option(
        None,
        "share of the device's free memory that the KV cache may take once the weights are loaded (default: 0.9 on a"
        " GPU, 0.5 on a CPU, where other programs need memory too)",
    )
    kv_memory: str | None = option(None, "size of the KV cache (default: from --memory-fraction)", metavar="SIZE")
    expert_memory: str | None = option(
        None,
        "memory for experts, of each rank where there are several, as a size or a percentage of its experts (25%); the"
        " others are read from the checkpoint when they are needed (default: all experts are loaded)",
        metavar="SIZE",
    )
    host_memory: str | None = option(
        None,
        "host memory for experts that are not on the GPU, as a size or a percentage of all experts; the others are read"
        " from disk (default: what is free)",
        metavar="SIZE",
    )
    misses: str = option(
        "auto",
        "what becomes of an expert that is in host memory and not on the GPU when it is needed: it is copied (copy), or"
        " the CPU computes it where it is (cpu); auto chooses for each layer of a step by the times measured at start",
        choices=MISSES,
    )
    residency: str = option(
        "auto",
        "which experts stay in --expert-memory: the policy that chooses them; auto is predicted where a predictor was"
        " trained, else default",
        choices=RESIDENCY,
    )
    predictor: str = option(
        "auto",
        "what predicts the experts to come, where not all have room: auto (what was trained for this model, and what"
        " needs no training), none, or the file of a trained predictor",
        metavar="FILE",
    )
    batching: str = option(
        "auto",
        "which requests decode together where not all may (--max-decode-seqs): those that will probably need the same"
        " missing experts (affinity), or in order; auto is affinity where experts are read as they are needed, on one"
        " rank",
        choices=BATCHING,
    )
    prefix_cache: bool = option(True, "share KV blocks between requests with a common prefix")
    generation_config: str = option(
        "model",
        "sampling defaults: the checkpoint's generation_config.json, or none",
        choices=("model", "none"),
    )
    progress: bool = option(True, "progress bars on the terminal")
    ep: int | None = option(
        None,
        "expert-parallel ranks, one process and one device each (default: as many as the launcher started, or 1)",
    )
    launcher: str = option(
        "auto",
        "how ranks are started: processes on this machine, and under torchrun, srun or a LeaderWorkerSet those on the"
        " others too (auto, local); or actors on a Ray cluster",
        choices=("auto", "local", "ray"),
    )
    cluster_port: int | None = option(
        None, "port at which the ranks of other machines find the first one (default: from the launcher)"
    )
    dispatcher: str = option(
        "auto",
        "how tokens reach experts on other ranks; auto chooses for each step by the times measured at start",
        choices=("auto", "all_gather", "all_to_all"),
    )
    chunks: str = option(
        "auto",
        "parts into which a layer's tokens are cut, so that sending one part overlaps computing another; auto chooses"
        " by the times measured at start",
        choices=("auto", "1", "2", "4", "8"),
    )
    expert_placement: str = option(
        "linear",
        "which rank has which experts at start: neighbours together, in turn, or balanced by the loads in --placement",
        choices=("linear", "round_robin", "replicated"),
    )
    redundant_experts: int = option(0, "spare expert slots per rank and layer, for second copies of busy experts")
    placement: str | None = option(
        None,
        "file with the experts' recorded loads: read at start when it exists, written while serving and at the end",
        metavar="FILE",
    )
    move_bytes: str = option("256MiB", "most bytes of expert weights that a rank takes in per step", metavar="SIZE")
    balance: str = option(
        "auto",
        "planner that shares out each layer's rows among the ranks, moving weights for it where that pays; auto is"
        " priced, where tokens go by all-to-all and all experts are in memory; native leaves every expert at its home;"
        " the others are published ones, to compare with",
        choices=BALANCE,
    )
    guest_memory: str | None = option(
        None,
        "room on each rank for experts of other ranks that it helps with (default: of as many as it has, at most 8)",
        metavar="SIZE",
    )
    rank_timeout: float = option(
        10.0, "seconds without a sign of life after which a rank counts as lost", metavar="SECONDS"
    )
    collective_timeout: float = option(
        60.0, "seconds that a rank may wait in one exchange with the others", metavar="SECONDS"
    )
    on_rank_loss: str = option(
        "continue",
        "when a rank is lost: the others take over its experts and requests, or it is started again and they wait",
        choices=("continue", "restart"),
    )
    router: str = option(
        "dualmap",
        "how requests are given to ranks: by cached prefix and load, in turn, or by load alone",
        choices=("dualmap", "round_robin", "least_loaded"),
    )
    ttft_target: float = option(2.0, "time to first token that the router tries to keep, in seconds", metavar="SECONDS")
    trace: str | None = option(
        None, "write what every rank did when to this file, for Perfetto or chrome://tracing", metavar="FILE"
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.ep is not None and self.ep < 1:
            raise ValueError(f"ep is {self.ep}; it must be at least 1")
        if self.ep == 1:
            self.check_one_rank()
        if self.redundant_experts < 0:
            raise ValueError(f"redundant_experts is {self.redundant_experts}; it must not be negative")
        if self.cluster_port is not None and not 0 < self.cluster_port <= 65535:
            raise ValueError(f"cluster_port is {self.cluster_port}; it must be between 1 and 65535")
        for name in ("rank_timeout", "collective_timeout", "ttft_target"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.router != "dualmap" and self.ttft_target != EngineConfig.ttft_target:
            raise ValueError(
                f"ttft_target is {self.ttft_target}, but router {self.router} does not look at it; leave it out, or use"
                " --router dualmap"
            )
        if self.expert_placement == "replicated" and self.placement is None:
            raise ValueError("expert_placement replicated needs recorded loads; give their file with --placement")
        parse_size(self.move_bytes, "move_bytes")
        if self.guest_memory is not None:
            parse_size(self.guest_memory, "guest_memory")
            if self.balance in WITHOUT_GUESTS:
                raise ValueError(
                    f"guest_memory is of no use with balance {self.balance}, which has no guests; leave one out"
                )
            if self.dispatcher == "all_gather":
                raise ValueError(
                    "guest_memory is of no use with dispatcher all_gather, whose layers are not balanced; leave one out"
                )
        if self.balance not in ("auto", "native") and self.dispatcher == "all_gather":
            raise ValueError(
                f"balance {self.balance} needs to send tokens where a plan says, and dispatcher all_gather sends all to"
                " every rank; use --dispatcher auto or all_to_all"
            )
        for name in (
            "max_num_seqs",
            "max_decode_seqs",
            "max_batched_tokens",
            "block_size",
            "max_model_len",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens ({self.max_batched_tokens}) is below max_num_seqs ({self.max_num_seqs}): a step"
                " must have room for one token of each request; raise the first or lower the second"
            )
        if self.max_decode_seqs is not None and self.max_decode_seqs >= self.max_num_seqs:
            raise ValueError(
                f"max_decode_seqs ({self.max_decode_seqs}) is not below max_num_seqs ({self.max_num_seqs}), so it"
                " limits nothing; lower it, or raise max_num_seqs"
            )
        self._check_batching()
        if self.expert_memory is not None:
            parse_budget(self.expert_memory, 1, "expert_memory")
            self._check_nothing_moves()
            if self.residency == "predicted" and self.predictor == "none":
                raise ValueError(
                    "residency is predicted and predictor is none; leave one of them out, or use --residency default"
                )
        if self.host_memory is not None:
            parse_budget(self.host_memory, 1, "host_memory")
        for name in ("host_memory", "misses", "residency", "predictor"):
            value = getattr(self, name)
            if self.expert_memory is None and value != getattr(EngineConfig, name):
                raise ValueError(
                    f"{name} is {value}, which changes nothing while all experts are in memory; leave it out, or set"
                    " --expert-memory"
                )
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction is {self.memory_fraction}; it must be above 0 and at most 1")
        if self.kv_memory is not None:
            parse_size(self.kv_memory, "kv_memory")

    def check_one_rank(self) -> None:
        """Raises ValueError for an option that changes nothing with one rank and has not its default.

        Called where the number of ranks is known to be 1: `ep` None leaves it to the launcher.
        """
        for name, why in FOR_SEVERAL_RANKS.items():
            value = getattr(self, name)
            if value != getattr(EngineConfig, name):
                raise ValueError(
                    f"{name} is {value}, which changes nothing with one rank: {why}; leave it out, or use --ep 2 or"
                    " more"
                )

    def _check_batching(self) -> None:
        """Raises ValueError for a `batching` that has nothing to choose, or nothing to choose by."""
        if self.batching == "auto":
            return
        if self.max_decode_seqs is None:
            raise ValueError(
                f"batching is {self.batching}, and all requests that run decode in every step; leave it out, or set"
                " --max-decode-seqs"
            )
        if self.batching == "affinity":
            for name, unfit, remedy in (
                ("expert_memory", None, "set --expert-memory"),
                ("predictor", "none", "leave --predictor out"),
            ):
                if getattr(self, name) == unfit:
                    raise ValueError(
                        f"batching is affinity, which goes by the experts that are missing and predicted, and {name} is"
                        f" {'not set' if unfit is None else unfit}; use --batching order, or {remedy}"
                    )

    def _check_nothing_moves(self) -> None:
        """Raises ValueError for an option that is about weights on their way between ranks."""
        why = "with expert_memory no weights move between ranks, each reads what it needs"
        for name in ("guest_memory", "move_bytes"):
            if getattr(self, name) != getattr(EngineConfig, name):
                raise ValueError(f"{name} is {getattr(self, name)}, and {why}; leave one of the two out")
        if self.balance not in ("auto", "priced", *WITHOUT_GUESTS):
            raise ValueError(
                f"balance {self.balance} moves weights, and {why}; leave it out, or use priced, which then only shares"
                " out the rows of experts with several copies"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EngineConfig):
    """Options of the HTTP server, beside the engine's."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    api_key: str | None = option(None, "bearer key that requests must carry (default: $MOEYARD_API_KEY, or none)")
    served_model_name: str | None = option(None, "name shown by /v1/models (default: the model's path or id)")
    max_queued_tokens: int = option(
        131072, "prompt tokens that may wait for prefill; beyond it requests get 503 with Retry-After"
    )
    drain_timeout: float = option(30.0, "seconds that running requests get to finish on SIGTERM", metavar="SECONDS")
    start_timeout: float = option(1800.0, "seconds the engine may take to load", metavar="SECONDS")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be between 0 and 65535")
        if self.max_queued_tokens < 1:
            raise ValueError(f"max_queued_tokens is {self.max_queued_tokens}; it must be at least 1")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty; leave it out to serve without a key")
        for name in ("drain_timeout", "start_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")

    def engine_config(self) -> EngineConfig:
        """The engine's part of these options."""
        names = {f.name for f in dataclasses.fields(EngineConfig)}
        return EngineConfig(**{k: v for k, v in dataclasses.asdict(self).items() if k in names})


def _check_choices(config: Any) -> None:
    for f in dataclasses.fields(config):
        choices = f.metadata.get("choices", ())
        value = getattr(config, f.name)
        if choices and value not in choices:
            raise ValueError(f"{f.name} is {value!r}; choose one of {', '.join(choices)}")
