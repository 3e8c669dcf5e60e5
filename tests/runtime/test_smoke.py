import pytest
pytestmark=[pytest.mark.root, pytest.mark.anyio]
async def test_a(box):
    r = await box.run("echo","hi")
    assert r.stdout==b"hi\n"
async def test_b(box):
    r = await box.run("sh", "-c", "sleep 0.1; exit 3")
    assert r.exit_code==3
