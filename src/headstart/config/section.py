"""What every part of the schema is made of: a closed, frozen section, and the kinds of numbers in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

PATHS = ("path", "adapter", "chat_template", "source", "data", "dir", "folder", "sync_dir")
"""Keys whose text may be looked up in the file system."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _usable(cls, value: Any, info: ValidationInfo) -> Any:
        """What the types allow and no machine takes: numbers beyond 64 bits, paths that no file system looks up."""
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and number.bit_length() > 63 for number in numbers):
            raise PydanticCustomError("unusable", "the largest whole number is 9,223,372,036,854,775,807")
        if info.field_name in PATHS and isinstance(value, str | Path):
            names = [len(name.encode()) for name in str(value).split("/")]
            if max(names) > 255 or sum(names) + len(names) > 4096 or "\0" in str(value):
                raise PydanticCustomError("unusable", "no file name has over 255 bytes, no path over 4,095 or a NUL")
        return value


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
