"""Configuration of paced runs: many devices on one machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from cluster.section import Section


class PaceConfig(Section):
    """Passes take the time that a device profile says, not what they take here."""

    profile: str = Field(
        description="file of a device profile, or the name of one in `profiles` beside this file"
    )
    time_scale: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="stretches all times, where this machine computes slower than the profile says",
    )

    def resolved(self, base_dir: Path) -> PaceConfig:
        """The same with the profile's path, where the file is found from ``base_dir``."""
        names = (self.profile, *(f"profiles/{self.profile}.{kind}" for kind in ("yaml", "json")))
        for path in (base_dir / name for name in names):
            if path.is_file():
                return self.model_copy(update={"profile": str(path.resolve())})
        return self
