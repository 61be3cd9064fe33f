"""A model of transformers: of an architecture with new weights, or from a folder of weights.

It computes its loss itself (`criterion=model_loss`), or puts out `.logits` for any criterion. Nothing is
downloaded. With LoRA (Hu et al. 2021, arXiv 2106.09685) the weights stay as they are, and low-rank
adapters beside them are trained alone.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from gaccum_exp.errors import BadInputError, nearest, with_extra

TASKS = ("causal", "classifier")
PEFT_TASKS = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS"}


def transformers_model(
    name: str,
    task: str = "causal",
    config: Mapping[str, Any] | None = None,
    lora: int | Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """Return a model that predicts the next token, or one label for a sequence.

    Args:
        name: an architecture by its `model_type`, for example `gpt2`, `llama` or `bert`, with new
            weights; or the path of a folder as `save_pretrained` writes it, with the weights in it.
        task: `causal` or `classifier`.
        config: values of the architecture's configuration in place of its own, for example
            {n_layer: 2}. Beside these, nothing is cached (`use_cache`), and padding is token 0 for a
            classifier whose architecture names none.
        lora: rank of the adapters, or arguments of `peft.LoraConfig`, for example
            {r: 8, lora_alpha: 16, target_modules: [c_attn]}; null: all weights are trained.
        num_classes: number of tokens of a causal model, and of labels of a classifier. That of a
            folder's causal model is its own, and may be larger.

    Raises:
        BadInputError: there is no such architecture, folder or value, or an extra is missing.
    """
    if task not in TASKS:
        raise BadInputError(f"model.task={task}: not one of {', '.join(TASKS)}{nearest(task, TASKS)}")
    with with_extra("model=transformers", "transformers", "transformers"):
        import transformers as hf

    kind: Any = hf.AutoModelForCausalLM if task == "causal" else hf.AutoModelForSequenceClassification
    folder = None if name in hf.CONFIG_MAPPING else _folder(name, list(hf.CONFIG_MAPPING))
    said: Any = hf.AutoConfig.for_model(name) if folder is None else _config_of(folder, hf)
    if folder is not None and task == "causal":
        _require_tokens(name, said, num_classes)
    elif num_classes is not None:
        setattr(said, "vocab_size" if task == "causal" else "num_labels", num_classes)
    said.use_cache = False
    if task == "classifier" and getattr(said, "pad_token_id", None) is None:
        said.pad_token_id = 0  # by which it finds the last token of a sequence
    _set(said, config or {})
    if folder is None:
        _forget_tokens_beyond(said)
    try:
        if folder is None:
            model: nn.Module = kind.from_config(said)
        else:
            with _no_progress_bar(hf.utils.logging):
                model = kind.from_pretrained(folder, config=said, local_files_only=True, dtype="float32")
    except Exception as error:  # of an architecture without such a head, of values, of files
        raise BadInputError(f"model.name={name}: {_said(error)}") from error
    if task == "causal":
        # Which it takes anyway, with a warning where the name of its class says less.
        vars(model)["loss_type"] = "ForCausalLM"
    return model.train() if lora is None else _with_adapters(model, lora, task)


def _folder(name: str, known: list[str]) -> str:
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return str(path)
    if path.is_dir():
        raise BadInputError(
            f"model.name={name}: the folder has no config.json, as save_pretrained writes it"
        )
    raise BadInputError(
        f"model.name={name}: no architecture of transformers{nearest(name, known)}, and no folder; "
        "nothing is downloaded: give the folder that save_pretrained or a download has written"
    )


def _config_of(folder: str, hf: Any) -> Any:
    try:
        return hf.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise BadInputError(f"model.name={folder}: its config.json: {_said(error)}") from error


def _require_tokens(name: str, config: Any, num_classes: int | None) -> None:
    """Refuse data with more tokens than a folder's model has."""
    tokens = int(config.get_text_config().vocab_size)
    if num_classes is not None and num_classes > tokens:
        raise BadInputError(
            f"model.num_classes={num_classes}: the weights of {name} know {tokens} tokens; give data "
            "that its own tokenizer has made"
        )


def _set(config: Any, given: Mapping[str, Any]) -> None:
    """Set values of a configuration, and refuse those that it does not know: it would keep any."""
    for key, value in given.items():
        if not hasattr(config, key):
            known = [*config.to_dict(), *config.attribute_map]
            raise BadInputError(
                f"model.config.{key}: {type(config).__name__} has no such value{nearest(key, known)}"
            )
        setattr(config, key, value)


def _forget_tokens_beyond(config: Any) -> None:
    """Let an architecture of fewer tokens than the published one have no special ones beyond them."""
    for key in ("bos_token_id", "eos_token_id"):
        token, tokens = getattr(config, key, None), getattr(config, "vocab_size", None)
        if isinstance(token, int) and isinstance(tokens, int) and token >= tokens:
            setattr(config, key, None)


@contextmanager
def _no_progress_bar(logging: Any) -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _with_adapters(model: nn.Module, lora: int | Mapping[str, Any], task: str) -> nn.Module:
    """Return the model with adapters, which alone are trained, beside a classifier's new last layer."""
    with with_extra(f"model.lora={lora}", "peft", "transformers"):
        import peft

    given = {"r": lora} if isinstance(lora, int) else dict(lora)
    known = [field.name for field in fields(peft.LoraConfig)]
    for key in given:
        if key not in known:
            raise BadInputError(
                f"model.lora.{key}: LoraConfig takes no such argument{nearest(key, known)}"
            )
    layers = sorted(
        {name.rpartition(".")[2] for name, of in model.named_modules() if _holds_weights(of)}
    )
    try:
        adapters = peft.LoraConfig(task_type=PEFT_TASKS[task], **given)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # it corrects that by itself
            warnings.filterwarnings("ignore", category=FutureWarning)  # of one package about the other
            adapted: nn.Module = peft.get_peft_model(model, adapters)
    except Exception as error:  # of values, and of architectures that it knows no modules of
        raise BadInputError(
            f"model.lora={lora}: {_said(error)}; this model's layers are {', '.join(layers)} "
            "(model.lora={r:8,target_modules:[…]})"
        ) from error
    return adapted.train()


def _holds_weights(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
