"""What a later layer's router will see, as a linear map of low rank of the residual stream: look-ahead's ridge.

The stream at layer l, normalised, is mapped to what the norm of layer l + d will make of it there, as far as the router
of that layer looks: within the space that its weights span. Such a ridge "tap" of low rank instead of the mean of what
the layers between add is in slotstream and others; ours is truncated by what matters to the router's scores.

T: tokens, D: hidden size, R: rank.
"""

from __future__ import annotations

import dataclasses
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DEPTH = 4
"""How many layers ahead a router is asked at most."""
VERSION = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell:
    """Of one layer, from one depth: normed = unit(stream) @ down_DR @ up_RD + bias_D, in float32."""

    down_DR: torch.Tensor
    up_RD: torch.Tensor
    bias_D: torch.Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamRidge:
    """`cells` by the layer that is asked and how many layers before; those that are not there go by the mean."""

    layers: int
    experts: int
    digest: str
    cells: dict[tuple[int, int], Cell]

    def normed(self, layer: int, ahead: int, stream_1TD: torch.Tensor) -> torch.Tensor | None:
        """[1, T, D] what the norm of a layer will make of the stream that is this one `ahead` layers before it; None
        where nothing was fitted that is better than the mean.
        """
        cell = self.cells.get((layer, ahead))
        if cell is None:
            return None
        normed_1TD = unit(stream_1TD) @ cell.down_DR @ cell.up_RD + cell.bias_D
        return normed_1TD.to(stream_1TD.dtype)

    def of(self, cells: set[tuple[int, int]]) -> StreamRidge:
        """Only these."""
        return dataclasses.replace(self, cells={at: cell for at, cell in self.cells.items() if at in cells})

    def to(self, device: torch.device) -> StreamRidge:
        """The same on another device."""
        moved = {
            at: Cell(down_DR=cell.down_DR.to(device), up_RD=cell.up_RD.to(device), bias_D=cell.bias_D.to(device))
            for at, cell in self.cells.items()
        }
        return dataclasses.replace(self, cells=moved)

    def save(self, path: str) -> None:
        """As .npz. Raises OSError."""
        arrays: dict[str, Any] = {"version": VERSION, "layers": self.layers, "experts": self.experts}
        arrays |= {"digest": self.digest, "stream_cells": np.array(sorted(self.cells)).reshape(-1, 2)}
        for (layer, ahead), cell in self.cells.items():
            for name in _ARRAYS:
                arrays[f"{name}_{layer}_{ahead}"] = getattr(cell, name).cpu().numpy()
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str, digest: str | None = None) -> StreamRidge:
        """Raises ValueError for a file that is not one, or was made for a model with another `digest`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["version"]) != VERSION:
                    raise ValueError(f"version {file['version']}, not {VERSION}")
                places = [(int(layer), int(ahead)) for layer, ahead in file["stream_cells"]]
                cells = {
                    at: Cell(**{name: torch.from_numpy(file[f"{name}_{at[0]}_{at[1]}"]) for name in _ARRAYS})
                    for at in places
                }
                found = cls(
                    layers=int(file["layers"]), experts=int(file["experts"]), digest=str(file["digest"]), cells=cells
                )
            hidden = {len(cell.bias_D) for cell in cells.values()}
            for (layer, ahead), cell in cells.items():
                if not (1 <= ahead <= DEPTH and ahead <= layer < found.layers):
                    raise ValueError(f"layer {layer} from {ahead} layers before")
                rank = cell.down_DR.shape[1]
                shapes = (*cell.down_DR.shape, *cell.up_RD.shape, *cell.bias_D.shape)
                size = len(cell.bias_D)
                if len(hidden) > 1 or shapes != (size, rank, rank, size, size):
                    raise ValueError("arrays whose shapes do not agree")
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}; this is no ridge of look-ahead") from error
        if digest is not None and digest != found.digest:
            raise ValueError(
                f"{path}: made for the model {found.digest or '(none)'}, not {digest}; make one for it with moeyard"
                " train-predictor"
            )
        return found


_ARRAYS = ("down_DR", "up_RD", "bias_D")


def unit(x: torch.Tensor) -> torch.Tensor:
    """[..., D] in float32, of mean square 1."""
    x = x.float()
    return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
