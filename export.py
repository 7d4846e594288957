"""Write a model in the Hugging Face layout, and as GGUF for llama.cpp and Ollama, with its tokenizer and model card.

    python export.py models/chitchat5000.pt exported/chitchat
    python export.py models/chitchat5000.pt exported/chitchat --gguf q8_0

transformers' AutoModelForCausalLM and AutoTokenizer load the folder. It appears only when it is complete, and nothing
is uploaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError, option, parse_options, run_script
from common.files import TEMPORARY_SUFFIX, atomic_files, require_free_space, write_error
from exchange.model_card import model_card, modelfile

if TYPE_CHECKING:
    from model import GPTConfig
    from setup_tokenizer import Tokenizer

STAGING_NAME = "{}.export"
# Files of a model exported earlier into the same folder, which a program could read instead of this model's.
SUPERSEDED = (
    *("model*.gguf", "Modelfile", "model*.safetensors*", "pytorch_model*.bin", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("adapter_config.json", "adapter_model*"),  # transformers would add the adapter to the model
)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export, and where to write it."""

    checkpoint: str = option(
        None, "the model: a checkpoint, a Hugging Face folder, or gpt2", positional=True, nargs=None
    )
    out_dir: str = option(None, "the folder to write, new or empty", positional=True, nargs=None)
    gguf: str | None = option(
        None, "also write a GGUF file in this precision, and a Modelfile", choices=("f32", "bf16", "q8_0")
    )
    peft: bool = option(False, "write an adapter, without its base, for the peft package")
    force: bool = option(False, "write into a folder that is not empty, and overwrite files with the same names")


def export(options: ExportOptions) -> list[str]:
    """Write the export; returns the names of its files. After a UserError the folder is unchanged."""
    from exchange.gguf_file import require_gguf, write_gguf
    from exchange.hugging_face import check_exportable, complete_weights, to_hugging_face, write_safetensors
    from exchange.loading import load_checkpoint
    from generation.sampling import CHAT_SAMPLING, TEXT_SAMPLING
    from model import GPTConfig
    from setup_tokenizer import Tokenizer

    folder = Path(options.out_dir)
    check_folder(folder, options.force)
    if options.peft and options.gguf:
        raise UserError("--peft writes an adapter alone, and --gguf a whole model; leave one of them out")
    if options.peft:
        return export_adapter(options.checkpoint, folder)
    checkpoint = load_checkpoint(options.checkpoint, ("info", "model"))
    info = checkpoint["info"]
    config = GPTConfig(**info["model"])
    tokenizer = Tokenizer.from_info(info, options.checkpoint)
    check_exportable(options.checkpoint, config, tokenizer)
    if options.gguf:
        require_gguf(options.gguf, config, tokenizer)
    is_chat = info["format"] == "chat"
    sampling = CHAT_SAMPLING if is_chat else TEXT_SAMPLING
    weights = complete_weights(checkpoint["model"], config)
    n_bytes = sum(tensor.nbytes for tensor in weights.values())
    with staged_folder(folder, (2 if options.gguf else 1) * n_bytes + (16 << 20)) as staging:
        write_safetensors(staging / "model.safetensors", to_hugging_face(weights))
        gguf_file = f"model-{options.gguf}.gguf" if options.gguf else None
        if options.gguf and gguf_file:
            name = Path(options.checkpoint).stem
            write_gguf(staging / gguf_file, weights, config, options.gguf, is_chat, name, tokenizer)
            (staging / "Modelfile").write_text(modelfile(gguf_file, config.block_size, is_chat, sampling), "utf-8")
        card = model_card(info, Path(options.checkpoint).stem, folder.resolve().name, gguf_file, sampling)
        (staging / "README.md").write_text(card, "utf-8")
        for name, content in settings_files(config, is_chat, tokenizer).items():
            (staging / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        # The safetensors library makes its file readable by the owner only.
        shutil.copymode(staging / "README.md", staging / "model.safetensors")
        names = sorted(path.name for path in staging.iterdir())
    remove_superseded(folder, names)
    return names


def export_adapter(checkpoint: str, folder: Path) -> list[str]:
    """Write an adapter in PEFT's layout; returns the names of its files. Raises UserError for a model without one."""
    from exchange.loading import load_unmerged
    from exchange.peft import write_peft

    loaded = load_unmerged(checkpoint, ("info", "model"))
    if "base" not in loaded:
        raise UserError(f"{checkpoint} is not an adapter; leave --peft out, or make one with train.py --lora_rank")
    with staged_folder(folder, sum(tensor.nbytes for tensor in loaded["model"].values()) + (1 << 20)) as staging:
        write_peft(staging, loaded["info"], loaded["model"])
        shutil.copymode(staging / "adapter_config.json", staging / "adapter_model.safetensors")
        return sorted(path.name for path in staging.iterdir())


def settings_files(config: GPTConfig, is_chat: bool, tokenizer: Tokenizer) -> dict[str, dict]:
    """The JSON files by name. config.json comes last: without it no program loads the folder."""
    from exchange.hugging_face import config_json
    from exchange.tokenizer_files import tokenizer_config, tokenizer_json

    end_ids = [tokenizer.im_end, tokenizer.endoftext] if is_chat else [tokenizer.endoftext]
    return {
        "tokenizer.json": tokenizer_json(config.n_vocab, tokenizer),
        "tokenizer_config.json": tokenizer_config(config.n_vocab, config.block_size, is_chat, tokenizer),
        "generation_config.json": {
            "bos_token_id": tokenizer.endoftext,
            "eos_token_id": end_ids,
            "pad_token_id": tokenizer.endoftext,
        },
        "config.json": config_json(config, end_ids[0], tokenizer),
    }


def check_folder(folder: Path, force: bool) -> None:
    """Raise UserError for a file, and for a folder that is not empty unless `force` is set."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to export to")
    leftover = f".{STAGING_NAME.format(folder.name)}{TEMPORARY_SUFFIX}"  # of an export that was killed
    if not force and folder.is_dir() and any(path.name != leftover for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder, or overwrite its files with --force")


@contextlib.contextmanager
def staged_folder(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to fill; its files appear in `folder` when the block ends, and not before.

    A new folder appears as a whole. An existing one gets the files one by one and keeps its other files. Raises
    UserError if the disk is full or read-only.
    """
    exists = folder.is_dir()
    parent = folder if exists else folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        require_free_space(parent, needed_bytes, "the export")
        with atomic_files(parent, STAGING_NAME.format(folder.name)) as staging:
            content = staging if exists else staging / folder.name
            content.mkdir(exist_ok=True)
            yield content
            for path in content.iterdir():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
    except OSError as error:
        raise write_error(folder, error) from error


def remove_superseded(folder: Path, names: list[str]) -> None:
    """Remove files of an earlier export or another model that a program could load by mistake."""
    for pattern in SUPERSEDED:
        for path in folder.glob(pattern):
            if path.name not in names:
                path.unlink()
                print(f"removed {path}, which belonged to another model")


def main() -> None:
    options = parse_options(ExportOptions, __doc__)
    names = export(options)
    folder = Path(options.out_dir)
    total = sum((folder / name).stat().st_size for name in names)
    print(f"wrote {folder} ({total / 2**20:.1f} MiB): {', '.join(names)}")
    if options.peft:
        print(f"next: export its base, too, and load both with PeftModel.from_pretrained(base, {str(folder)!r})")
    else:
        print(f"next: {folder / 'README.md'} explains how to load and publish the model")


if __name__ == "__main__":
    run_script(main)
