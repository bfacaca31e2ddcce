"""Shared experts run early where that changes nothing, and only there."""

import pytest
import tiny
import torch
import world
from test_parity import prompts, reference
from test_ranks import facts_of, make_engine, run_until_done, submit
from torch import nn

from moeyard.engine.overlap import Overlap, find_overlap


class Block(nn.Module):
    """`routed + shared_experts(input)`; `overlap.run()` is what the layer calls once its tokens are on their way."""

    def __init__(self, kind="after"):
        super().__init__()
        self.kind = kind
        self.shared_experts = nn.Linear(4, 4)
        self.experts = nn.Identity()
        self.overlap = None
        self.calls = 0
        self.shared_experts.register_forward_hook(self._count)

    def _count(self, *_):
        self.calls += 1

    def route(self, x):
        if self.overlap is not None:
            self.overlap.run()
        return x.flatten().view_as(x) * 2

    def first(self, x, shared):
        """The rest of a block that has called its shared experts first."""
        if self.kind == "before, and used early":
            shared = shared.view(-1, 4)
        if self.kind == "before, in a list":
            shared = torch.cat([shared[:0], shared])
        if self.kind == "before, twice":
            shared = self.shared_experts(x)
        if self.kind == "before, input changed":
            x += 1
        if self.kind == "before and not routed":
            return x * 2 + shared
        routed = self.route(x)
        if self.kind == "before and after":
            shared = self.shared_experts(x)
        return routed + shared

    def forward(self, x, scale=1.0):
        if self.kind.startswith("before"):
            shared = self.shared_experts(x.flatten(0, 0) if self.kind == "before" else x)
            return self.first(x, shared)
        routed = self.route(x)
        if self.kind == "scaled input":
            return routed + self.shared_experts(x * scale)
        if self.kind == "part of the input":
            return routed + torch.cat([self.shared_experts(x[:1]), x[1:]])
        if self.kind == "changed in place":
            x += 1
            return routed + self.shared_experts(x)
        if self.kind == "twice":
            return routed + self.shared_experts(self.shared_experts(x))
        if self.kind == "never":
            return routed
        return routed + self.shared_experts(x.clone() if self.kind == "a copy" else x)


def watched(kind, calls=2, scale=3.0):
    block = Block(kind)
    plain = Block(kind)
    plain.load_state_dict(block.state_dict())
    block.overlap = Overlap(block, block.shared_experts)
    with torch.inference_mode():
        for _ in range(calls):
            block(torch.randn(3, 4), scale)
        block.overlap.settle()
    return block, plain


@pytest.mark.parametrize(
    ("kind", "enabled"),
    [
        ("after", True),
        ("a copy", True),
        ("before", True),
        ("before, and used early", False),
        ("before, in a list", False),
        ("before, input changed", False),
        ("before, twice", False),
        ("before and after", False),
        ("before and not routed", False),
        ("scaled input", False),
        ("part of the input", False),
        ("twice", False),
        ("never", False),
    ],
)
@torch.inference_mode()
def test_early_only_after_the_routing_and_with_the_blocks_input(kind, enabled):
    block, plain = watched(kind)
    assert block.overlap.enabled == enabled
    assert block.overlap.early_runs == 0  # not while it watches
    for tokens in (3, 1, 0):
        x = torch.randn(tokens, 4)
        assert torch.equal(block(x.clone(), 3.0), plain(x.clone(), 3.0))
    assert block.overlap.early_runs == (3 if enabled else 0)


@torch.inference_mode()
def test_the_shared_experts_run_once_and_before_the_layer_goes_on():
    block, _ = watched("after")
    original, order = block.overlap._original, []
    block.overlap._original = lambda x: order.append("shared") or original(x)
    route = block.route
    block.route = lambda x: (route(x), order.append("routed"))[0]
    block(torch.randn(3, 4))
    assert order == ["shared", "routed"]


@torch.inference_mode()
def test_one_call_that_differs_is_enough_against_it():
    block = Block("scaled input")
    block.overlap = Overlap(block, block.shared_experts)
    block(torch.randn(3, 4), scale=1.0)
    block(torch.randn(3, 4), scale=2.0)
    block.overlap.settle()
    assert not block.overlap.enabled


def test_nothing_watched_is_nothing_done():
    block, _ = watched("after", calls=0)
    assert not block.overlap.enabled


@torch.inference_mode()
def test_what_was_computed_early_is_not_for_the_next_call():
    block, plain = watched("after")
    block.kind = "never"  # computed early, and not used
    block(torch.ones(3, 4))
    block.kind = plain.kind = "before"
    x = torch.randn(3, 4)
    assert torch.equal(block(x), plain(x))


def test_the_layer_without_its_block_runs_nothing_early():
    """A rank without tokens calls the layer alone."""
    block, _ = watched("after")
    block.overlap.run()
    assert block.overlap.early_runs == 0


@torch.inference_mode()
def test_the_layer_alone_after_its_block_runs_nothing_early():
    block, _ = watched("after")
    block(torch.randn(3, 4))
    before = block.overlap.early_runs
    block.overlap.run()
    assert block.overlap.early_runs == before


@pytest.mark.parametrize("name", ["shared_experts", "shared_expert", "shared_mlp", "others"])
def test_which_child_is_found(name):
    model = nn.Module()
    model.block = nn.Module()
    model.block.experts = nn.Identity()
    model.block.add_module(name, nn.Linear(2, 2))
    assert (find_overlap(model, "block.experts") is not None) == (name != "others")


EARLY = {"deepseek_v3": True, "glm4_moe": True, "dots1": True, "qwen2_moe": True, "ernie4_5_moe": True}


def one_after_the_other(group, paths, texts, new_tokens):
    """An engine for each checkpoint: its layers with early runs, steps, and answers."""
    facts = []
    for path in paths:
        group = world.next_group(group)
        engine = make_engine(group, path)
        out = submit(engine, texts, new_tokens)
        run_until_done(engine, out)
        overlaps = [layer.overlap for layer in engine._experts.layers]
        early = [overlap.early_runs for overlap in overlaps if overlap is not None]
        facts.append((early, facts_of(engine)["stats"].steps, len(overlaps), list(out.values())))
        engine.close()
    group.close()
    return facts


def test_which_models_run_their_shared_experts_early(tmp_path):
    paths = [tiny.save(architecture, tmp_path / architecture) for architecture in EARLY]
    texts = prompts(131, 3, longest=30, seed=4)
    (facts,) = world.run_world(1, one_after_the_other, paths, texts, 6)
    for architecture, path, (early, steps, layers, out) in zip(EARLY, paths, facts, strict=True):
        assert early == [steps if EARLY[architecture] else 0] * layers, architecture
        assert out == reference(path, texts, 6), architecture


@torch.inference_mode()
def test_a_block_that_no_longer_routes_is_an_error():
    """It would have nothing in the place of what it called first."""
    block, _ = watched("before")
    assert block.overlap.deferred
    block.kind = "before and not routed"
    with pytest.raises(AssertionError, match="a routing that did not come"):
        block(torch.randn(3, 4))
