"""Ranks with another checkpoint or other options than the first: refused before anything is loaded, in one line."""

import pytest
import tiny
import world

from moeyard.engine.config import EngineConfig

BOUND_S = 60.0


def make_alike(group, paths, dtypes):
    from moeyard.engine.checkpoint import Checkpoint
    from moeyard.engine.parallel import check_alike

    config = EngineConfig(model=str(paths[group.rank]), dtype=dtypes[group.rank])
    try:
        check_alike(group, Checkpoint(paths[group.rank]).fingerprint, config, BOUND_S)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("files", "dtypes", "name"),
    [
        ("ab", ("float32", "float32"), "checkpoint"),
        ("aa", ("float32", "bfloat16"), "options"),
    ],
)
def test_ranks_that_differ_are_refused_with_one_line(tmp_path, files, dtypes, name):
    """`b` has the same tensors with other values."""
    paths = [tiny.save("qwen3_moe", tmp_path / file, seed=int(file == "b")) for file in files]
    line = f"rank 1 has another {name} than rank 0; all ranks need the same"
    assert world.run_world(2, make_alike, paths, dtypes) == [line, line]
