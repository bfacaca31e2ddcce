"""The checkpoint that the benches use when no model is given: Qwen3-MoE with random weights, made here and kept; or
Qwen3-Next, which has linear attention in three of four layers.

Speed does not depend on what the weights say, so nothing needs to be downloaded, and every machine measures the same
shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import string
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "bench_shape.json"  # written last: the shape, and the size of every file
END = "<|end|>"
_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class BenchShape:
    """Sizes of the checkpoint. Raises ValueError naming the field."""

    hidden: int = 1024
    layers: int = 8
    experts: int = 64
    top_k: int = 8
    expert_width: int = 512
    vocab: int = 32_000
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 64
    positions: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.name != "seed" and getattr(self, f.name) < 1:
                raise ValueError(f"{f.name} is {getattr(self, f.name)}; it must be at least 1")
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) is above experts ({self.experts})")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.vocab <= _BYTES:
            raise ValueError(f"vocab is {self.vocab}; it must be above {_BYTES}, one entry for each byte and an end")

    @property
    def name(self) -> str:
        return (
            f"qwen3-moe-h{self.hidden}-l{self.layers}-e{self.experts}k{self.top_k}-w{self.expert_width}"
            f"-v{self.vocab}-a{self.heads}x{self.kv_heads}x{self.head_dim}-p{self.positions}-s{self.seed}"
        )


@dataclass(frozen=True, kw_only=True)
class HybridShape(BenchShape):
    """Every fourth layer has full attention, the others linear attention; a shared expert beside the routed ones."""

    shared_width: int = 512
    linear_key_heads: int = 8
    linear_value_heads: int = 16
    linear_head_dim: int = 128

    @property
    def name(self) -> str:
        linear = f"{self.linear_key_heads}x{self.linear_value_heads}x{self.linear_head_dim}"
        return super().name.replace("qwen3-moe", "qwen3-next") + f"-w{self.shared_width}-l{linear}"


HYBRID = "hybrid"
"""In the place of MODEL: the hybrid shape."""
SHAPE_OPTIONS = ("hidden", "layers", "experts", "top_k", "expert_width", "vocab")


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """`--hidden` and the like, for the checkpoint that is made when MODEL is not given."""
    group = parser.add_argument_group(
        "shape of the checkpoint made when MODEL is not given, or is hybrid: linear attention in three layers of four"
    )
    for name in SHAPE_OPTIONS:
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=int,
            default=argparse.SUPPRESS,
            metavar="N",
            help=f"(default: {getattr(BenchShape(), name)})",
        )
    group.add_argument("--workdir", metavar="DIR", help="where it is kept (default: the user's cache folder)")


def resolve_model(args: argparse.Namespace) -> str:
    """MODEL, or the path of the bench checkpoint. Raises ValueError when both are described."""
    given = [name for name in SHAPE_OPTIONS if hasattr(args, name)] + (["workdir"] if args.workdir else [])
    if args.model and args.model != HYBRID:
        if given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} describes the checkpoint that is made when MODEL is not given;"
                f" leave out the option or {args.model!r}"
            )
        return str(args.model)
    kind = HybridShape if args.model == HYBRID else BenchShape
    shape = kind(**{name: getattr(args, name) for name in SHAPE_OPTIONS if hasattr(args, name)})
    return str(make_checkpoint(shape, Path(args.workdir) if args.workdir else user_cache()))


def user_cache() -> Path:
    """The platform's folder for files that can be made again."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "moeyard" / "bench"


def make_checkpoint(shape: BenchShape, workdir: Path) -> Path:
    """The checkpoint directory of `shape` under `workdir`; made unless it is there with every file whole."""
    path = workdir / shape.name
    if is_intact(path, shape):
        return path
    workdir.mkdir(parents=True, exist_ok=True)
    print(f"making the bench checkpoint in {path}", file=sys.stderr, flush=True)
    partial = Path(tempfile.mkdtemp(prefix=".making-", dir=workdir))
    try:
        _write(shape, partial)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def is_intact(path: Path, shape: BenchShape) -> bool:
    """Whether `path` holds all files of `shape`, each as long as when it was made."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if marker.get("shape") != dataclasses.asdict(shape):
        return False
    files = marker.get("files", {})
    return bool(files) and all((path / f).is_file() and (path / f).stat().st_size == n for f, n in files.items())


def _write(shape: BenchShape, path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    linear: dict[str, int] = {}
    if isinstance(shape, HybridShape):
        linear = {
            "shared_expert_intermediate_size": shape.shared_width,
            "linear_num_key_heads": shape.linear_key_heads,
            "linear_num_value_heads": shape.linear_value_heads,
            "linear_key_head_dim": shape.linear_head_dim,
            "linear_value_head_dim": shape.linear_head_dim,
        }
    config = AutoConfig.for_model(
        "qwen3_next" if linear else "qwen3_moe",
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.expert_width,
        intermediate_size=shape.expert_width * shape.top_k,
        vocab_size=shape.vocab,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        eos_token_id=shape.vocab - 1,
        **linear,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # Shards of the order of one layer, as in published checkpoints, where a shard is a small part of the whole.
    model.save_pretrained(path, max_shard_size="200MB")
    make_tokenizer(shape.vocab).save_pretrained(path)
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
    marker = {"shape": dataclasses.asdict(shape), "files": files}
    (path / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")


def make_tokenizer(vocab: int) -> Any:
    """A byte-level BPE tokenizer with `vocab` entries: the bytes, then runs of two and three printable characters,
    then the end token. It encodes any text and decodes any ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = string.ascii_letters + string.digits + string.punctuation
    pairs = [(a, b) for a in characters for b in characters]
    triples = ((a + b, c) for a, b in pairs for c in characters)
    merges = list(itertools.islice(itertools.chain(pairs, triples), vocab - len(alphabet) - 1))
    entries = [*alphabet, *(a + b for a, b in merges), END]
    if len(entries) != vocab:
        raise ValueError(f"vocab is {vocab}; it must be at most {len(entries)}")
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(entries)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
