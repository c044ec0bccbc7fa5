"""The base of every section of the configuration."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys are errors; defaults and assignments are validated; infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True, allow_inf_nan=False)

    def held(self) -> dict[str, object]:
        """Keys on which the content of a checkpoint or the order of batches depends → values; none of what is off."""
        return {}
