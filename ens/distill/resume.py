"""States of unfinished trainings: their schemas, and what is said of one that is damaged or of another recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ens.networks.checkpoints import load_state
from ens.shortage import is_shortage


class ResumeMismatch(ValueError):
    """A checkpoint belongs to another configuration; the message lists the differences."""


class DamagedState(ValueError):
    """A state that cannot be gone on with; the message names the file, the reason and what to do."""


class _State(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, arbitrary_types_allowed=True)


class BestWeights(_State):
    """The best weights validated before the interruption, and what they reached in dB."""

    weights: dict[str, Tensor]
    step: int = Field(ge=0)
    psnr_db: float
    psnr_db_start: float


class TrainState(_State):
    """All that `train_network` goes on from."""

    recipe: dict[str, str]
    done: int = Field(ge=0)
    skipped: int = Field(ge=0)
    best: BestWeights | None
    params: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]


class PupilState(_State):
    """All that one surrogate in training goes on from."""

    params: dict[str, Tensor]
    skipped: int = Field(ge=0)
    optimizer: dict[str, Any]


class DistillState(_State):
    """All that a group of surrogates goes on from, by `slot/choice`."""

    recipe: str
    done: int = Field(ge=0)
    pupils: dict[str, PupilState]


State = TypeVar("State", TrainState, DistillState)


def read_resume(path: Path, kind: type[State], *, device: str = "cpu") -> State | None:
    """The state in a file, None where there is none; raises DamagedState."""
    with taken_up(path):
        state = load_state(path, device=device)
        return None if state is None else kind.model_validate(state)


@contextmanager
def taken_up(path: Path) -> Iterator[None]:
    """Whatever a damaged state makes of pickle, zip, schema and module, as DamagedState."""
    try:
        yield
    except ResumeMismatch:
        raise
    except Exception as error:
        if is_shortage(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DamagedState(f"{path}, the state of an unfinished training, is damaged ({lines[0][:200]}). The same "
                           "command with --restart begins this training again; all else stays") from error
