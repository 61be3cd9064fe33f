"""`gaccum_exp check` on scripts in which a framework runs the loop."""

from pathlib import Path

import pytest

from gaccum_exp.cli import main

SCRIPTS = Path(__file__).with_name("scripts")


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning's own, as in its tests
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize(
    ("package", "arguments", "status", "said"),
    [
        ("lightning", ["with_lightning.py", "4"], 0, ["Classifier", "equivalent (N = 4, mean)"]),
        ("lightning", ["with_lightning.py", "1"], 0, ["identical (N = 1"]),
        ("transformers", ["with_transformers.py"], 3, ["the model's own loss", "unequal denominators"]),
        ("accelerate", ["with_accelerate.py"], 0, ["model (Sequential)", "equivalent (N = 4, mean)"]),
    ],
)
def test_a_script_of_a_framework_is_judged(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    arguments: list[str],
    status: int,
    said: list[str],
) -> None:
    """From the first window on, also where a closure takes the passes inside the step."""
    pytest.importorskip(package, reason="the extra `peers` is not installed")
    for key in ("WORLD_SIZE", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # which Lightning leaves
        monkeypatch.setenv(key, "1")
        monkeypatch.delenv(key)
    name, *own = arguments
    found = main(["check", "--no-cost", str(SCRIPTS / name), *own])
    out = capsys.readouterr().out
    assert found == status, out
    assert [word for word in said if word not in out] == [], out
