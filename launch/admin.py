"""`/admin/placement`: where the experts are, and a new placement for them, while requests are served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import Body, FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from .errors import JSON
from .frontend import FrontEnd, RequestError

PATH = "/admin/placement"


class PlacementRequest(BaseModel):
    """Either `planner`, for all MoE layers or some, or the `tables` themselves: `[layer][rank][slot]`, -1 for empty."""

    model_config = ConfigDict(extra="forbid", strict=True)

    planner: Literal["linear", "round_robin", "replicated", "incremental"] | None = None
    max_moves: Annotated[int, Field(ge=0)] | None = Field(
        None, description="of planner incremental: slots that may change in each layer"
    )
    layers: list[int] | None = None
    tables: list[list[list[int]]] | None = None
    wait: bool = Field(True, description="answer when the experts are in place, not when they begin to move")

    def check(self) -> None:
        """Raises RequestError for fields that do not go together."""
        if (self.planner is None) == (self.tables is None):
            raise RequestError("give either planner or tables", param="planner", code="missing_field")
        for name in ("max_moves", "layers"):
            if self.tables is not None and getattr(self, name) is not None:
                raise RequestError(f"{name} belongs to planner, not to tables", param=name)
        if self.planner == "incremental" and self.max_moves is None:
            message = "max_moves is required with planner incremental: the slots that may change in each layer"
            raise RequestError(message, param="max_moves", code="missing_field")
        if self.planner != "incremental" and self.max_moves is not None:
            raise RequestError("max_moves belongs to planner incremental", param="max_moves")


FIELDS = {PATH: tuple(PlacementRequest.model_fields)}
"""Names that a body may have, for suggestions."""


class Admin:
    """The handlers. `check_ready` raises while requests cannot be taken."""

    def __init__(self, frontend: FrontEnd, check_ready: Callable[[], None]) -> None:
        self._frontend = frontend
        self._check_ready = check_ready

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(PATH, self.placement, methods=["GET"], response_model=None)
        app.add_api_route(PATH, self.place, methods=["POST"], response_model=None)

    async def placement(self) -> Response:
        """Where the experts are, how even that is, and whether they move."""
        self._check_ready()
        return JSON(self._frontend.placements.describe(self._frontend.loads))

    async def place(self, body: Annotated[PlacementRequest, Body()]) -> Response:
        """Moves the experts; answers with the placement's version and how many slots get another expert."""
        self._check_ready()
        body.check()
        version, changed = self._frontend.place(
            planner=body.planner, max_moves=body.max_moves, layers=body.layers, rows=body.tables
        )
        if body.wait:
            await self._frontend.placements.wait()
        answer: dict[str, Any] = {"version": version, "changed_slots": changed}
        return JSON(answer)
