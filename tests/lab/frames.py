"""Frames as a worker and a studio send them."""

from __future__ import annotations

from typing import Any

from studio_worker.studio import wire

CAPABILITIES = wire.Capabilities(
    machine_name="box",
    username="me",
    agent_version="1.2.3",
    vram_total_gb=24,
    vram_threshold_gb=20.5,
    supported_models=("sd-cpp:*",),
    supported_models_per_kind={"image": ("sd-cpp:*",)},
)


CAPABILITIES_JSON = {
    "machineName": "box",
    "username": "me",
    "agentVersion": "1.2.3",
    "engine": "multi",
    "vramTotalGb": 24.0,
    "vramThresholdGb": 20.5,
    "autoEnabled": True,
    "autoStart": True,
    "supportedModels": ["sd-cpp:*"],
    "taskKinds": ["image"],
    "supportedModelsPerKind": {"image": ["sd-cpp:*"]},
}


SOURCE = {
    "engine": "sd-cpp",
    "files": [{"role": "model", "url": "https://models.example/m.safetensors", "filename": "m.safetensors"}],
    "cliDefaults": {"cfgScale": 4.0, "steps": 20, "width": 64, "height": 64},
}


CLAIM: dict[str, Any] = {
    "jobId": "j1",
    "gameId": "g",
    "assetName": "a",
    "model": "m",
    "vramGbEstimate": 4.0,
    "task": {"kind": "image", "prompt": "a castle"},
    "modelSource": SOURCE,
}


def claim(**changes: Any) -> dict[str, Any]:
    """CLAIM with some fields changed; ``None`` removes one."""
    return {key: value for key, value in {**CLAIM, **changes}.items() if value is not None}
