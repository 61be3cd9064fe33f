"""Tables, pictures, weights and a package."""

import csv
import random
import shutil
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import gaccum_exp

shutil.copy(Path(gaccum_exp.__file__).parents[1] / "tests/docs/given/my_pkg.py", ".")
draw = np.random.default_rng(0)


def table(name, columns, rows):
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


kinds = ["setosa", "versicolor", "virginica"]
table("flowers.csv", ["petal", "sepal", "species"], [
    (f"{draw.normal(k):.2f}", f"{draw.normal(2 * k):.2f}", kinds[k]) for k in draw.integers(3, size=150)
])  # fmt: skip
table("houses.csv", ["area", "rooms", "district", "garden", "price"], [
    (f"{area:.0f}", int(area // 30), random.choice(["north", "south"]), int(area) % 2, f"{3 * area:.0f}")
    for area in draw.uniform(40, 200, size=150)
])  # fmt: skip


def picture(path, size=40, mask=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    if mask:
        values = draw.integers(4, size=(size, size), dtype=np.uint8)
        values[: draw.integers(size)] = 255
    else:
        values = draw.integers(256, size=(size, size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


for split, count in (("train", 4), ("val", 2)):
    for k in range(count):
        for kind in ("cat", "dog"):
            picture(Path("photos", split, kind, f"{k}.png"))
        picture(Path("scenes", split, "images", f"{k}.png"))
        picture(Path("scenes", split, "masks", f"{k}.png"), mask=True)

weights = Path("weights")
weights.mkdir()
save_file(timm.create_model("resnet18", num_classes=10).state_dict(), weights / "resnet18.safetensors")
small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2)).save_pretrained(weights / "my-llama")
