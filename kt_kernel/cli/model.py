"""What the MODEL of `kt run` turns out to be: the demo, a directory, a GGUF file, or a name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_kernel.cli import settings
from kt_kernel.cli.errors import CommandError
from kt_kernel.planning.models_dir import find_model as find_local
from kt_kernel.planning.registry import Entry, load_registry

DEMO = "demo"
DEMO_DTYPE = "float32"
"""Of everything but the experts. In bfloat16, which our linear layers take, the demo is faster, but so small
a model then loses near ties: asked for the capital of France it begins with "L'Etoile" (2026-11-30)."""

_EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Model:
    """A checkpoint directory, or a model in GGUF, and the name under which the server offers it."""

    path: Path
    served_name: str
    dtype: str | None
    """What the server is to compute in; None leaves it to the checkpoint's configuration."""


@dataclass(frozen=True)
class Found:
    """`entry`: what the registry knows of it, if it was called by a name; `missing`: the hub id of a model
    that must be downloaded first, "" if it is here.
    """

    model: Model
    entry: Entry | None = None
    missing: str = ""


def find_model(name: str) -> Found:
    """The model that `name` means, the demo built if need be.

    Raises:
        CommandError: it is not on this machine; the sentence has the command that downloads it.
        KTError: it cannot be used.
    """
    if name == DEMO:
        return Found(demo_model())
    found = planned_model(name)
    if found.missing:
        raise CommandError(
            f"{name!r} is not on this machine: kt model download {found.missing} gets it; --dry-run shows "
            "first whether it would fit."
        )
    return found


def planned_model(name: str) -> Found:
    """The same without building or requiring anything; a model of the registry need not be here.

    Raises:
        CommandError: nothing is known under this name.
        KTError: it cannot be used.
    """
    if name == DEMO:
        return Found(planned_demo_model())
    if Path(name).expanduser().exists() or name.startswith((".", "/", "~")):
        return Found(local_model(name))
    entry, folders = load_registry().find(name), model_folders()
    for known_as in (name, *(entry.hub if entry else ())):
        if (path := find_local(known_as, folders)) is not None:
            model = local_model(str(path))
            return Found(Model(model.path, _short(known_as), model.dtype), entry)
    if entry is not None:
        hub_id = name if name in entry.hub else next(iter(entry.hub), entry.name)
        return Found(Model(Path(hub_id), _short(hub_id), None), entry, hub_id)
    if name.count("/") == 1 and not name.endswith(".gguf"):
        raise CommandError(
            f"There is no directory {name!r}, and the model of this name is not on this machine: "
            f"kt model download {name} gets it."
        )
    return Found(local_model(name))


def model_folders() -> list[str]:
    """Of the user's settings: folders with models, and where downloads go."""
    values = settings.load()
    download = values.get("download-folder")
    return [*values.get("model-folders", ()), *([download] if download else ())]


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def demo_model() -> Model:
    """The demo checkpoint, built if need be.

    Raises:
        DemoError: it cannot be built.
    """
    from kt_kernel.demo import ensure_demo_checkpoint

    return Model(ensure_demo_checkpoint(), DEMO, DEMO_DTYPE)


def planned_demo_model() -> Model:
    """The demo checkpoint as `demo_model` would give it, without building it.

    Raises:
        DemoError: its source package is missing.
    """
    from kt_kernel.demo import demo_checkpoint_path
    from kt_kernel.demo.gguf_source import find_source

    return Model(demo_checkpoint_path(find_source()), DEMO, DEMO_DTYPE)


def local_model(name: str) -> Model:
    """The checkpoint in directory `name`, or the GGUF file of that name, or in that directory.

    Raises:
        CommandError: no such directory, no readable config.json in it, or no routed experts.
        KTError: the GGUF file is damaged, or cannot be served from it alone.
    """
    from kt_kernel.gguf_model import find_gguf, served_name

    path = Path(name).expanduser()
    if (file := find_gguf(path)) is not None:
        return Model(file, served_name(file), None)
    if not path.is_dir():
        raise CommandError(
            f"There is no directory {name!r}: give '{DEMO}', the directory of a downloaded checkpoint, a "
            ".gguf file, or a model's name (kt model list)."
        )
    config = _read_config(path)
    text_config = config.get("text_config", {})  # multimodal checkpoints nest the language model
    if not any(config.get(key) or text_config.get(key) for key in _EXPERT_COUNT_KEYS):
        raise CommandError(
            f"{path}/config.json ({config.get('model_type', 'no model_type')}) names no routed experts "
            f"(looked for {', '.join(_EXPERT_COUNT_KEYS)}): kt run serves mixture-of-experts models."
        )
    return Model(path.resolve(), path.resolve().name, None)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(
            f"{path} holds no config.json: MODEL must be the directory of a Hugging Face checkpoint."
        ) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{file} cannot be read ({error}): download the checkpoint again.") from error
    if not isinstance(config, dict):
        raise CommandError(f"{file} holds a {type(config).__name__}, expected an object: download it again.")
    return config
