"""Schemathesis over the whole OpenAPI document: no 5xx, no status that is not documented, answers as described.

HUTCH_EXAMPLES sets how many requests are made up for each operation.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.conftest import IMAGE

if TYPE_CHECKING:
    from tests.server.conftest import Served

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]

EXAMPLES = int(os.environ.get("HUTCH_EXAMPLES", "10"))
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance, content_type_conformance]


@schemathesis.serializer("application/x-tar")
def as_tar(context: Any, value: Any) -> bytes:
    """What is made up for an archive is sent as it is."""
    return value if isinstance(value, bytes) else str(value).encode()


def test_documented(served: Served, box: str) -> None:
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    failed = []
    operations = [found.ok() for found in document.get_all_operations()]  # type: ignore[union-attr]  # an Err would raise
    assert len(operations) > 85
    assert {"/v1/x/boxes/{box}/exec", "/v1/boxes/{box_id}/attach"} <= {operation.path for operation in operations}
    for operation in operations:
        try:
            _try(operation, box)
        except (AssertionError, FailureGroup) as error:
            failed.append(f"{operation.label}: {error}")
    assert not failed, "\n\n".join(failed)


def _try(operation: Any, box: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def attempt(case: Any) -> None:
        bodies = [case.body, case.body.get("spec")] if isinstance(case.body, dict) else []
        for body in bodies:
            if not isinstance(body, dict):
                continue
            for field in ("image", "reference"):
                if isinstance(body.get(field), str) and body[field]:
                    body[field] = IMAGE  # no registry is asked for names made up
            if operation.path.endswith("/bootstrap"):
                body["flavour"] = "none"  # nor is a mirror
        for name in ("box", "box_id"):
            if name in case.path_parameters and operation.method != "delete":
                case.path_parameters[name] = box
        case.call_and_validate(checks=CHECKS, timeout=20)

    attempt()
