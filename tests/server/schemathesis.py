"""Run schemathesis against a server of `tiny`: `python -m tests.server.schemathesis PROGRAM [OPTION]...`.

PROGRAM is schemathesis's command, in a virtual environment of its own: it refuses the version of jsonschema-rs that
this project needs. Its exit code is returned.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Final

from lfm2vl_edge import Model
from lfm2vl_edge.server.service import Service
from tests.server.conftest import running, settings_of

CHECKS: Final = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("unsupported_method", "negative_data_rejection", "missing_required_header"),
)
OPTIONS: Final = ("--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing", "--seed", "17", "--no-color")


def main(program: str, *more: str) -> int:
    """Return schemathesis's exit code."""
    with (
        Model.open("tiny", cache=False) as model,
        running(Service(settings_of(timeout=30.0, defaults={"max_tokens": 4}), lambda: model)) as here,
    ):
        command = [program, "run", f"{here.url}/openapi.json", "--url", here.url, *OPTIONS, *more]
        code = subprocess.run(command).returncode
        assert here.send("GET", "/health").status == 200
        return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
