"""What all settings have in common: what a person writes is checked, and does not change afterwards."""

from typing import Any

from pydantic import BaseModel, ConfigDict

NOT_IN_KEY: dict[str, Any] = {"not_in_key": True}  # json_schema_extra of settings that do not change a stage's result


class Frozen(BaseModel):
    """Base of everything here: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    def decisive(self) -> list[str]:
        """Names of the fields that decide a stage's result, and so belong in its key."""
        extras = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        return [name for name, extra in extras.items() if not (isinstance(extra, dict) and extra.get("not_in_key"))]
