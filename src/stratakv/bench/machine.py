"""Where something was measured."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Machine:
    """What a reader needs to judge a number. No names, no paths."""

    cpu: str
    cores: int  # that this process may use
    threads: int  # that torch uses
    load: float  # average over the last minute, when the measurement began
    system: str
    python: str
    torch: str
    transformers: str
    stratakv: str

    @classmethod
    def here(cls) -> Machine:
        """This machine, now."""
        import torch
        import transformers

        from stratakv import __version__

        return cls(
            cpu=_cpu_name(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            load=round(os.getloadavg()[0], 2),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            stratakv=__version__,
        )

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return asdict(self)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
