"""What own files say of themselves, checked before it is used: a damaged file is one sentence that names the entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Json, JsonValue, ValidationError

from ens.blocks.bounds import MAX_DEPTH
from ens.space import Choice

Options = dict[str, JsonValue]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Entries(BaseModel):
    """Entries of a file: of exactly the stated types, finite; others may stand beside them."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Recipe(Entries):
    """Metadata by which `create_network` builds the network that a file's weights belong to."""

    format: str
    network: str
    options: Json[Options]
    weights_sha256: Sha256


class Filling(Entries):
    """What fills one slot of a hybrid."""

    family: str
    depth: int = Field(ge=1, le=MAX_DEPTH)
    options: dict[str, bool | int | float | str]

    @property
    def choice(self) -> Choice:
        return Choice(self.family, self.depth, tuple(self.options.items()))


class HybridRecipe(Recipe):
    """The metadata of a hybrid: its teacher's, and the fillings of the replaced slots."""

    slots: Json[dict[str, Filling]]


Schema = TypeVar("Schema", bound=Entries)


def read_entries(schema: type[Schema], entries: Mapping[str, Any]) -> Schema:
    """The entries as an object; raises ValueError naming the first that is missing or wrong."""
    try:
        return schema.model_validate(entries)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"entry {'.'.join(map(str, first['loc'])) or 'at the top'}: {first['msg']}") from None
