"""Which tiles are chosen, and the files of tuned ones."""

import itertools
import json
from dataclasses import replace

import pytest

from moeyard.kernels import tile_config
from moeyard.kernels.tile_config import (
    ExpertTiles,
    TileShape,
    all_tiles,
    as_json,
    choose_tiles,
    expected_rows,
    file_name,
    load_tuned,
)

SMALL = TileShape(rows=16, columns=32, depth=64)
LARGE = TileShape(rows=64, columns=256, depth=64, group=8, warps=8, stages=4)


def test_more_rows_take_larger_tiles():
    rows = [choose_tiles(mean, 2).rows for mean in (0.1, 1, 8, 9, 16, 30, 64, 200, 10_000)]
    assert rows == sorted(rows) and rows[0] == 16 and rows[-1] == 128
    assert choose_tiles(4, 4) != choose_tiles(4, 2)


def test_deterministic_tiles_are_one():
    for itemsize in (2, 4):
        chosen = {choose_tiles(mean, itemsize, deterministic=True) for mean in (0.1, 5, 40, 10_000)}
        assert len(chosen) == 1
    tuned = {1: ExpertTiles(up=SMALL, down=SMALL)}
    assert choose_tiles(1, 2, tuned=tuned, deterministic=True) == choose_tiles(900, 2, deterministic=True)


def test_the_nearest_tuned_entry_is_taken():
    tuned = {4: ExpertTiles(up=SMALL, down=SMALL), 100: ExpertTiles(up=LARGE, down=LARGE)}
    chosen = [choose_tiles(mean, 2, tuned=tuned) for mean in (0, 4, 15, 30, 9000)]
    assert chosen == [tuned[4], tuned[4], tuned[4], tuned[100], tuned[100]]


@pytest.mark.parametrize("shared_bytes", [232_448, 166_912, 101_376, 65_536])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_into_shared_memory(shared_bytes, itemsize):
    for mean in (1, 10, 30, 90, 1000):
        for deterministic in (False, True):
            tiles = choose_tiles(mean, itemsize, deterministic=deterministic, shared_bytes=shared_bytes)
            assert max(s.shared_bytes(itemsize) for s in (tiles.up, tiles.down)) <= shared_bytes


def test_expected_rows():
    assert expected_rows(1, 2, 8) == pytest.approx(1)
    assert expected_rows(4096, 8, 128) == pytest.approx(256)
    assert expected_rows(3, 4, 4) == pytest.approx(3)
    assert expected_rows(7, 9, 4) == pytest.approx(63 / 4)  # more places than experts: flat rows of other ranks


def test_a_tuned_file_is_read_as_it_was_written(tmp_path):
    tuned = {4: ExpertTiles(up=SMALL, down=replace(SMALL, depth=128)), 100: ExpertTiles(up=LARGE, down=LARGE)}
    name = file_name("NVIDIA H200", "bfloat16", 128, 2048, 768, True)
    assert name == "NVIDIA_H200,bfloat16,E128,D2048,I768,gated.json"
    (tmp_path / name).write_text(json.dumps(as_json(tuned, "3.7.1")))
    assert load_tuned(name, tmp_path) == tuned
    assert load_tuned(name.replace("H200", "A100"), tmp_path) is None
    assert set(all_tiles(2, folder=tmp_path)) >= set(tuned.values())
    for itemsize, gated in ((2, False), (4, True)):
        assert not set(all_tiles(itemsize, gated, folder=tmp_path)) & set(tuned.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not a file of tuned tiles"),
        ("{}", "tiles: a list"),
        ('{"tiles": [{"rows_per_expert": 1.5}]}', "rows_per_expert: 1.5"),
        ('{"tiles": [{"rows_per_expert": 1, "up": {"rows": 16, "colums": 3}}]}', "unknown colums"),
    ],
)
def test_a_bad_file_is_named(text, message, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json.*{message}"):
        load_tuned("bad.json", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rows": 24}, "rows: 24"), ({"columns": 8}, "columns: 8"), ({"stages": 0}, "stages: 0"), ({"warps": 3}, "warps")],
)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
    with pytest.raises(ValueError, match=r"down\.rows"):
        ExpertTiles(up=SMALL, down=LARGE)


def test_every_choice_is_in_the_list_that_is_compiled():
    for itemsize in (2, 4):
        for mean in (0.5, 10, 20, 50, 500):
            for deterministic, gated, wide in itertools.product((False, True), repeat=3):
                tiles = choose_tiles(mean, itemsize, gated=gated, wide=wide, deterministic=deterministic)
                assert tiles in all_tiles(itemsize, gated, wide)
                assert (gated and wide) or tiles.up.columns <= 128
                assert wide or tiles.down.columns <= 128
    assert tile_config.SHARED_BYTES == 232_448
