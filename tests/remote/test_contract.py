"""The contract suite of the embedded runtime, over a server process."""

from __future__ import annotations

import pytest

from tests.remote import contract

pytestmark = [pytest.mark.root, pytest.mark.anyio]

globals().update(contract.cases())
