"""Command lines generated from the schema, hostile by kind: a kind is a way to get something wrong."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from gaccum_exp.config import schema as config
from gaccum_exp.config.arguments import _FLAGS
from gaccum_exp.config.files import blocks, conf_dir, options

TINY = [
    "model=mlp", "model.hidden=[8]", "runtime.device=cpu", "runtime.threads=1", "train.steps=1",
    "audit.at_start=false", "tracking.log_weights=false", "data.eval._target_=null",
]  # fmt: skip
"""Before what is hostile: what is valid after all ends soon."""
VALUES = [
    "null", "''", "-1", "0", "1.5", "nan", "inf", "-inf", "1e300", "1000000000000", str(10**30), "true",
    "[]", "[1]", "[[1],[2]]", "{}", "{a:1}", "{a:{b:c}}", "two words", "'quoted'", '"', "'", "a'b",
    "ü×Σ", "a\nb",
    "\x1b[31mred", "x" * 3000, "../../x", "/dev/null", "/", "~", "~/x", "..", ".", "1,2", "a,b,c",
    "range(1,3)",
    "range(1,2,0)", "range(0,1000000000000)", "glob(*)", "glob(zzz*)", "choice(1,2)", "interval(0,1)",
    "int(a)",
    "shuffle(1,2)", "${nope}", "${seed}", "${model}", "${oc.env:NOPE}", "${nope:1}", "${", "$", "???",
    "\udcff",
    "=", "==", ":", "%s", "{0}", "\\", "#", "&&", "None", "False", "0x10", "1_000", "٣",
]  # fmt: skip
ELSEWHERE = ("/", "..", "../../x")
"""Folders that are nobody's to write to here, nor to read."""
TARGETS = [
    "math.pi", "os", "os._exit", "sys.exit", "os.abort_", "builtins.print", "builtins.object",
    "builtins.int",
    "nope", "nope.Net", "torch.nn.Nope", "torch.nn.Linear", "torch.optim.SGD", "torch.zeros",
    "collections.Counter",
    ".", "..a", "a..b", "5", "[1]", "null", "''", "a b", "time", "gaccum_exp.cli.main", "builtins.eval",
]  # fmt: skip
"""No callable, one that raises, one that gives something else, one that ends the process."""
HYDRA = [
    "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.launcher._target_",
    "hydra.sweeper._target_",
    "hydra.sweeper.max_batch_size", "hydra.sweeper.params", "hydra.launcher", "hydra.sweeper",
    "hydra.callbacks",
    "hydra.callbacks.sweep", "hydra.callbacks.sweep._target_", "hydra.job.name", "hydra.job.chdir",
    "hydra.job.num",
    "hydra.job.config.override_dirname.item_sep", "hydra.job.env_set", "hydra.output_subdir",
    "hydra.mode",
    "hydra.verbose", "hydra.searchpath", "hydra.job_logging.root.level", "hydra.job_logging.handlers",
    "hydra",
    "hydra.hydra_logging.version", "hydra.overrides.task", "hydra.runtime.output_dir", "hydra.nope",
    "hydra/launcher",
    "hydra/sweeper", "hydra/job_logging", "hydra/nope",
]  # fmt: skip
SEVERAL = [
    "a,b", "1,x", "0,1", "-1,1000000000000", "null,1", "glob(zzz*)", "glob(*)", "range(5,1)",
    "range(0,inf)", "range(0,1,0)", "range(0,9999999)", "choice()", "interval(0,1)", ",", "1,",
    "1,2,", "${nope},1", "[1],[2]", "tag(a,1,2)", "sort(2,1)",
]  # fmt: skip
OF_DATA = {
    "": ["model.hidden"],
    "fake": ["data.size", "data.image_size", "data.num_classes"],
    "ragged": ["data.size", "data.mean_length", "data.vocab_size", "data.length_cv", "model.layers"],
}
"""Sizes of data sets and models, by the data set."""
BUILT = ("model", "criterion", "optimizer", "scheduler", "strategy")
"""Blocks that are built by a target, beside the data sets."""
FILES = {
    "tab": b"a:\n\tb: 1\n", "open": b"a: [1, 2\n", "list": b"- 1\n- 2\n", "word": b"word\n",
    "empty": b"",
    "latin": b"name: caf\xe9\n", "zero": b"a: \x00\n", "twice": b"a: 1\na: 2\n",
    "tag": b"a: !!python/object:os.system {}\n",
    "defaults": b"defaults: 5\n", "circle": b"defaults: [circle]\n", "gone": b"defaults: [nope]\n",
    "self": b"_target_: ${.}\n",
    "interpolated": b"_target_: ${nope}\n", "global": b"# @package _global_\nseed: x\n",
    "package": b"# @package ..\na: 1\n",
}  # fmt: skip
"""Files of a block that are broken, by name."""


@cache
def keys() -> list[str]:
    """Return every dotted key of the schema, as the default files compose it."""
    config.register()
    GlobalHydra.instance().clear()
    found: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for key in map(str, node):
            found.append(f"{prefix}{key}")
            child = None if OmegaConf.is_missing(node, key) else node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                walk(child, f"{prefix}{key}.")

    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for data in ("digits", "fake", "ragged"):
            walk(compose("config", [f"data={data}", *TINY]), "")
    return sorted(set(found))


def broken_files(folder: Path) -> None:
    """Write the broken files, of each block, below `folder/mine`."""
    for block in (*blocks(), "."):
        (folder / "mine" / block).mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            (folder / "mine" / block / f"{name}.yaml").write_bytes(text)
    (folder / "mine" / "model" / "folder.yaml").mkdir(exist_ok=True)


def _value(draw: random.Random) -> list[str]:
    return [*TINY, f"{draw.choice(keys())}={draw.choice(VALUES)}"]


def _values(draw: random.Random) -> list[str]:
    return [*TINY, *(f"{draw.choice(keys())}={draw.choice(VALUES)}" for _ in range(draw.randint(2, 4)))]


def _prefix(draw: random.Random) -> list[str]:
    key = draw.choice([draw.choice(keys()), f"{draw.choice(keys())}.x", "new", "new.x", "hydra", ""])
    value = draw.choice([*VALUES, "1", "mlp"])
    return [*TINY, draw.choice([f"+{key}={value}", f"++{key}={value}", f"~{key}", f"~{key}={value}"])]


def _typo(draw: random.Random) -> list[str]:
    key = list(draw.choice([*keys(), *blocks()]))
    for _ in range(draw.randint(1, 2)):
        place = draw.randrange(len(key))
        key[place : place + draw.randint(0, 1)] = draw.choice(["", ".", "x", key[place], "@", "/", " "])
    return [*TINY, f"{''.join(key)}={draw.choice(['1', 'cnn', *VALUES])}"]


def _block(draw: random.Random) -> list[str]:
    block = draw.choice([*blocks(), "train", "sweep", "experiment"])
    other = draw.choice(
        [*VALUES, *options(draw.choice(blocks())), "resnet18", "ViT_B_16", "mlp.yaml", "../mlp"]
    )
    return [
        *TINY[2:],
        f"{draw.choice(['', '', '+', '++'])}{block}{draw.choice(['', '', '@x', '@'])}={other}",
    ]


def _flag(draw: random.Random) -> list[str]:
    flags = [
        *_FLAGS,
        *(short for short, _ in _FLAGS.values() if short),
        "--exp",
        "--multi",
        "-x",
        "--",
        "-",
    ]
    words = [
        "job",
        "hydra",
        "all",
        "config",
        "defaults",
        "nope",
        "optimizer",
        "mine",
        "/dev/null",
        "x=1",
        "install=bash",
    ]
    few = [draw.choice([draw.choice(flags), draw.choice(words)]) for _ in range(draw.randint(1, 4))]
    return [*few, *draw.choice([[], ["seed=x"], ["accum.steps=1,2"], ["~seed"], ["accum.stepz=1"]])]


def _hydra(draw: random.Random) -> list[str]:
    sweep = draw.choice([[], [], ["-m", "seed=1,2"]])
    key = draw.choice(HYDRA)
    value = draw.choice([*VALUES, "here", "basic", "joblib_", "DEBUG"])
    if key.endswith(".dir") and value in ELSEWHERE:  # said in so many words
        value = "here"
    return [*sweep, *TINY, f"{draw.choice(['', '', '', '+', '++', '~'])}{key}={value}"]


def _sweep(draw: random.Random) -> list[str]:
    several = draw.choice(SEVERAL)
    key = draw.choice([*keys(), "sweep_id", "hydra.job.num", "model", "data", "+new", "~seed", "task"])
    return ["-m", *TINY, f"{key}={several}", *draw.choice([[], ["sweep.vectorize=seed"], ["seed=1,2"]])]


def _target(draw: random.Random) -> list[str]:
    block = draw.choice([*BUILT, "data.train", "data.eval"])
    name = draw.choice(["x", "_args_", "_partial_", "_convert_", "status"])
    more = f"{name}={draw.choice(['0', 'true', '[1]'])}"
    beside = draw.choice([[], [f"+{block}.{more}"]])
    custom = [f"{block}=custom"] if block in ("model", "criterion", "optimizer") else []
    return [*TINY[2:], *custom, f"{block}._target_={draw.choice(TARGETS)}", *beside]


def _syntax(draw: random.Random) -> list[str]:
    letters = list(f"{draw.choice(keys())}={draw.choice(VALUES)}")
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(letters) + 1)
        letters[place : place + draw.randint(0, 1)] = draw.choice(
            "=+~@.,'\"[]{}()$:\\ \t\n-#%ü\u2028\u202e\x01"
        )
    return [*TINY, "".join(letters)]


def _word(draw: random.Random) -> list[str]:
    some = [
        *VALUES,
        "--uri",
        "--out",
        "--experiment",
        "--nope",
        "-h",
        "--uri=5",
        "--out=/dev/null",
        "20990101-000000-abcdef",
    ]
    few = [word for word in draw.choices(some, k=draw.randint(0, 3)) if word not in ELSEWHERE]
    return [draw.choice(["report", "deliver", "reprot", "help"]), *few]


def _file(draw: random.Random) -> list[str]:
    name, block = draw.choice([*FILES, "folder", "nope"]), draw.choice(blocks())
    chosen = draw.choice([[f"{block}={name}"], [f"+{block}@x={name}"], ["--config-name", name]])
    return [
        *TINY[2:],
        draw.choice(["--config-dir=mine", "--config-dir=mine", "--config-path=mine"]),
        *chosen,
    ]


def _size(draw: random.Random) -> list[str]:
    huge = [str(10**n) for n in (9, 10, 12, 18, 30, 400)] + ["2147483648", "1e12", "-1000000000000"]
    numbers = [
        "accum.steps", "data.global_batch_size", "data.micro_batch_size", "data.eval_batch_size",
        "data.workers", "runtime.threads", "runtime.memory_budget_gib", "audit.controls",
        "accum.max_grad_norm", "audit.every_steps", "train.eval_every_steps",
    ]  # fmt: skip
    data = draw.choice([*OF_DATA])
    chosen = (
        [*TINY[2:], f"data={data}", f"model={'gpt' if data == 'ragged' else 'cnn'}"] if data else TINY
    )
    few = draw.sample([*numbers, *OF_DATA[data]], draw.randint(1, 2))
    sizes = [f"[{draw.choice(huge)}]" if key == "model.hidden" else draw.choice(huge) for key in few]
    return [*chosen, *(f"{key}={size}" for key, size in zip(few, sizes, strict=True))]


KINDS: dict[str, Callable[[random.Random], list[str]]] = {
    "a value that the key does not take": _value,
    "several of them": _values,
    "+, ++ and ~": _prefix,
    "a key or file misspelt": _typo,
    "a block that is null, a number, another's file": _block,
    "Hydra's flags": _flag,
    "Hydra's own configuration": _hydra,
    "sweeps": _sweep,
    "targets": _target,
    "signs where none belong": _syntax,
    "report and deliver": _word,
    "broken files": _file,
    "absurd sizes": _size,
}
