"""Configurations that would fail at the start are refused by the doctor, with a finding instead of a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reflora_dist.doctor import DoctorOptions, diagnose
from tests.test_doctor import FSDP1, FSDP2, found, written


def fsdp(version: int, **section: Any) -> dict[str, Any]:
    """An accelerate configuration with these keys in ``fsdp_config``."""
    return {**(FSDP1 if version == 1 else FSDP2), "fsdp_config": {"fsdp_version": version, **section}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (fsdp(2, fsdp_reshard_after_forward="FULL_SHARD"), "invalid truth value full_shard"),
    (fsdp(3), "fsdp_version: 3 is unknown"),
    (fsdp(2, fsdp_auto_wrap_policy="NOSUCH"), "Invalid auto wrap policy: NOSUCH"),
    (fsdp(1, fsdp_sharding_strategy="FULLSHARD"), "KeyError: 'FULLSHARD'"),
    ({**FSDP2, "mixed_precision": "bf17"}, "mixed_precision: bf17 is not supported"),
    ({**FSDP2, "mixed_precision": False}, "mixed_precision: false is not supported"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    diagnosis = diagnose([written(tmp_path, config)], DoctorOptions(num_nodes=1))
    assert found(diagnosis, "error", message), diagnosis.findings
