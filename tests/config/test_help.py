"""`--help` and the reference say of every key what the schema and its validation hold it to."""

import pytest
from omegaconf import OmegaConf

from gaccum_exp import cli
from gaccum_exp.config import schema
from gaccum_exp.config.allowed import Choices, allowed_of
from gaccum_exp.config.batch_sizes import BATCH_KEYS
from gaccum_exp.config.files import blocks
from gaccum_exp.config.help import asked_of, help_on
from gaccum_exp.config.keys import keys, of_block, opening_of
from gaccum_exp.errors import BadInputError
from tests.support import composed

SETS = ("train", "eval")
KEYS = {name: key for name, key in keys().items() if name.removeprefix("data.") not in SETS}
WORDS = {name: key.takes.split(", ") for name, key in KEYS.items() if name in (
    f"{block}.{one.name}" if block else one.name
    for block, kind in schema.BLOCKS.items()
    for one in schema.fields(kind)
    if isinstance(allowed_of(one), Choices)
)}  # fmt: skip


def test_every_key_of_the_configuration_is_described() -> None:
    """All that is composed but the open blocks' own, each with a type and a sentence."""
    config = OmegaConf.to_container(composed())
    composed_keys = {
        f"{block}.{key}" if isinstance(values, dict) else block
        for block, values in config.items()
        for key in (values if isinstance(values, dict) else [""])
        if block in schema.BLOCKS or not isinstance(values, dict)
    }
    assert set(KEYS) == composed_keys | {f"data.{key}" for key in BATCH_KEYS if key not in SETS}
    assert all(key.takes and key.default and key.says.endswith(".") for key in KEYS.values())


def test_a_default_that_is_said_is_the_one_composed() -> None:
    """Of the data block, the bundled digits', which have no `sort_by_length`."""
    config = composed()
    for key in KEYS.values():
        said = key.default.split(", ")[0] if key.name.startswith("data.") else key.default
        assert OmegaConf.create(f"x: {said}").x == OmegaConf.select(config, key.name, default=False)


def test_the_words_that_are_said_are_those_that_are_taken() -> None:
    """Another one is refused with just these."""
    assert len(WORDS) >= 16
    for name, words in WORDS.items():
        config = composed()
        OmegaConf.update(config, name, "zebra")
        with pytest.raises(BadInputError, match=f"{name}=zebra: not one of {', '.join(words)}$"):
            schema.validate(config)


def test_a_file_is_described_by_the_first_sentence_of_its_comment() -> None:
    """However it is broken into lines; an example that follows is none of it."""
    assert opening_of("criterion", "model_loss").endswith(" model(**micro_batch).loss.")
    assert opening_of("data", "digits").endswith(" no download; 1,442 to train on, 355 held out.")
    assert opening_of("data", "imagefolder").endswith(" a sub folder per class")


def test_help_on_a_key_says_type_default_and_what_it_does() -> None:
    """Values that stand beside it are not asked about."""
    asked = asked_of(["accum.steps", "seed=0,1", "accum.partial_window", "+model.hidden=3"])
    assert asked == ["accum.steps", "accum.partial_window"]
    said = help_on(asked)
    assert "takes integer, null or auto; by default 1" in said
    assert "micro-batches per window" in said
    assert "takes exact, drop, carry, error; by default exact" in said


def test_help_on_a_block_says_its_files_and_keys() -> None:
    """Of all blocks there are; of a file it shows the file, of an argument in which files it stands."""
    for block in {*blocks(), *schema.BLOCKS} - {"", "hydra"}:
        assert help_on([block]).startswith(block)
        assert of_block(block) or block == "experiment"
    assert "gpt: A decoder-only transformer" in help_on(["model"])
    assert "data.workers" in help_on(["data"])
    assert "_target_: gaccum_exp.models.gpt.GPT" in help_on(["model=gpt"])
    assert "model=gpt: 128 (of the residual stream" in help_on(["model.width"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("accum.stepz", "accum.stepz: no such key or block, did you mean 'accum.steps'?"),
        ("modle", "modle: no such key or block, did you mean 'model'?"),
        ("model=cnnn", "model=cnnn: not one of cnn, custom, gpt, mlp, timm, torchvision, tr"),
        ("model.widht", "model.widht: in no file of model, did you mean 'width'?"),
    ],
)
def test_help_on_nothing_that_there_is_is_refused(
    asked: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a line, with the nearest."""
    assert cli.main(["--help", asked]) == 2
    assert said in capsys.readouterr().err
