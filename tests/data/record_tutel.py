"""Record what a real Tutel gives: `python -m tests.data.record_tutel REVISION`, from the repository's root.

Needs Tutel importable (github.com/microsoft/Tutel, built for CPUs); REVISION is the commit it was built from, which
Tutel itself does not know. Writes `tutel.safetensors` (tensors) and `tutel.json` (settings, numbers, messages) beside
this file. The tests in tests/numerics/test_tutel_recorded.py hold our layer to them where Tutel is not installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "distributed"))


def main(revision: str) -> None:
    from pool import Pool
    from test_tutel_exchange import errors, worst

    from tests.numerics import tutel_cases as cases
    from tests.numerics import tutel_findings as found

    shared = cases.shared_tensors()
    tensors = {f"shared/{name}": value for name, value in shared.items()}
    for case in cases.CASES:
        seen = cases.observe(cases.live_layer(case, shared), case, shared)
        tensors |= {f"{case.name}/{name}": value.contiguous() for name, value in seen.items()}
    tensors |= {f"load_loss/{name}": value for name, value in found.load_loss().items()}
    tensors["doubles/y"] = found.doubles()
    save_file(tensors, HERE / "tutel.safetensors")
    pool = Pool(4)
    try:
        exchange = worst(pool.run(errors, "tutel"))
    finally:
        pool.close()
    about = {
        "tutel": revision,
        "torch": torch.__version__,
        "sizes": {
            "tokens": cases.NUM_TOKENS,
            "experts": cases.NUM_EXPERTS,
            "dim": cases.DIM,
            "hidden": cases.HIDDEN,
            "proj_dim": cases.PROJ,
        },
        "cases": {case.name: case.settings for case in cases.CASES},
        "sub_group_exchange": exchange,
        "findings": found.findings(),
        "capacities": found.capacities(),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    (HERE / "tutel.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
