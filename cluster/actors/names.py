"""Names of the Serve deployments, as they appear in configurations, logs and discovery."""

from __future__ import annotations

ROUTER = "Router"
TARGET_REPLICA = "TargetReplica"
DRAFTER = "Drafter"
