"""The two text files of an export: the model card (README.md) and Ollama's Modelfile."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from common.numbers import significant
from data.dataset import data_parts

# The licences that the hub has identifiers for.
HUB_LICENCES = {"mit", "apache-2.0", "cdla-sharing-1.0", "cdla-permissive-2.0", "cc0-1.0", "odc-by"}
HUB_LICENCES |= {f"cc-by{kind}-{version}" for kind in ("", "-sa", "-nc", "-nc-sa") for version in ("3.0", "4.0")}
ENGLISH = ("story", "dailydialog", "chat", "chitchat", "education")  # the data sets of the prepare scripts

CHAT_EXAMPLE = """messages = [{"role": "user", "content": "Hello! How are you?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

TEXT_EXAMPLE = """inputs = tokenizer("<|endoftext|>Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


class Sampling(Protocol):
    """The default settings for generating with the model (generation.sampling.Sampling)."""

    @property
    def temperature(self) -> float: ...

    @property
    def top_k(self) -> int | None: ...


def model_card(info: Mapping, name: str, folder_name: str, gguf_file: str | None, sampling: Sampling) -> str:
    """README.md of an export: front matter for the hub, then data, training, use and limits."""
    is_chat = info["format"] == "chat"
    sections = [
        _front_matter(info),
        f"# {name}\n\n{_summary(info)}",
        f"## Data\n\n{_data(info)}",
        f"## Training\n\n{_training(info)}",
        f"## Use\n\n{_use(folder_name, is_chat, gguf_file, sampling)}",
        f"## Limits\n\n{_limits(info, is_chat)}",
        f"## Publish\n\n{_publish(folder_name)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(info: Mapping) -> str:
    parts = data_parts(info.get("data") or {})
    licences = list(dict.fromkeys(part.get("licence") or "not stated" for part in parts))
    known = licences[0].lower().replace(" ", "-") if len(licences) == 1 else None
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if known in HUB_LICENCES:
        lines.append(f"license: {known}")
    elif licences != ["not stated"]:  # a licence without an identifier, or several that all apply
        lines += ["license: other", f"license_name: {json.dumps(', '.join(licences))}"]
    if all(part.get("name") in ENGLISH for part in parts):
        lines += ["language:", "- en"]
    if datasets := list(dict.fromkeys(filter(None, map(_hub_dataset, parts)))):
        lines += ["datasets:", *(f"- {dataset}" for dataset in datasets)]
    tags = ["gpt2", "jojo", *(["conversational", "chatml"] if info["format"] == "chat" else [])]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _hub_dataset(data: Mapping) -> str | None:
    """The data set's name on the hub, if its source begins with one."""
    first = re.split(r"[\s:]", str(data.get("source", "")), maxsplit=1)[0]
    return first if re.fullmatch(r"[\w.-]+/[\w.-]+", first) else None


def _summary(info: Mapping) -> str:
    shape = info["model"]
    kind = "chat model (ChatML)" if info["format"] == "chat" else "model that continues text"
    made = "Trained" if info.get("data") else "Exported"
    own = info.get("tokenizer", {})
    vocabulary = f"the vocabulary {own['name']}" if "json" in own else "GPT-2's vocabulary"
    return (
        f"A {kind} with GPT-2's architecture: {shape['n_layer']} layers, {shape['n_head']} heads, width "
        f"{shape['n_embd']}, a window of {shape['block_size']:,} tokens, and {vocabulary} with ChatML's control "
        f"tokens ({shape['n_vocab']:,} ids). {made} with Jojo, a GPT-2 from scratch in PyTorch."
    )


def _data(info: Mapping) -> str:
    data = info.get("data") or {}
    if not data:
        return f"Not recorded: the weights were not trained here ({info.get('origin', 'unknown')})."
    return "\n\n".join("\n".join(_data_of_part(part)) for part in data_parts(data))


def _data_of_part(part: Mapping) -> Iterator[str]:
    share = f"; {100 * part['weight']:.4g} % of the training rows" if "weight" in part else ""
    yield f"- Data set: {part['name']}; source: {part.get('source', 'unknown')}{share}"
    only = " Not for commercial use; this applies to models trained on it, too." if part.get("non_commercial") else ""
    yield f"- Licence of the data: {part.get('licence', 'not stated')}.{only}"
    for split in ("train", "val"):
        counts = part["splits"][split]
        # A data set without a .json has only its number of tokens.
        documents = f"{counts['documents']:,} documents, " if "documents" in counts else ""
        yield f"- {split}: {documents}{counts['tokens']:,} tokens"


def _training(info: Mapping) -> str:
    rows = []
    config = info.get("config") or {}
    if adapter := info.get("adapter"):
        base = Path(adapter["base"]).name
        rows.append(f"- An adapter (LoRA, rank {adapter['rank']}), merged with {base}, whose licence also applies")
    elif config.get("init_from"):
        rows.append(f"- Started from the weights of {Path(config['init_from']).name}, whose licence also applies")
    if info.get("iter_num") is not None:
        rows.append(f"- Iterations: {info['iter_num']:,}; tokens seen: {info['tokens_seen']:,}")
    if info.get("elapsed_s") is not None:
        rows.append(f"- Time: {info['elapsed_s'] / 60:.1f} minutes ({config.get('device')}, {config.get('dtype')})")
    names = {"train_loss": "Training loss of the last iteration", "val_loss": "Validation loss"}
    for key, label in {**names, "best_val_loss": "Best validation loss"}.items():
        if info.get(key) is not None:
            rows.append(f"- {label}: {info[key]:.4f} nats per token (perplexity {significant(math.exp(info[key]), 4)})")
    if info.get("val_losses"):
        own = ", ".join(f"{name} {loss:.4f}" for name, loss in info["val_losses"].items())
        rows.append(f"- The validation loss is the mean over the data sets, weighted by their shares; last: {own}")
    if config.get("loss_on") == "assistant":
        rows.append("- On conversations, only the assistant's tokens count for the loss")
    return "\n".join(rows) or "Not recorded."


def _use(name: str, is_chat: bool, gguf_file: str | None, sampling: Sampling) -> str:
    example = CHAT_EXAMPLE if is_chat else TEXT_EXAMPLE
    example = example.replace("TEMPERATURE", str(sampling.temperature)).replace("TOP_K", str(sampling.top_k))
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f"{example}"
    )
    text = f"In the parent folder:\n\n```python\n{python}\n```"
    if gguf_file:
        text += (
            f"\n\nllama.cpp: `llama-cli -m {gguf_file}`. Ollama, in this folder: "
            f"`ollama create {name} -f Modelfile && ollama run {name}`."
        )
    return text


def _publish(folder_name: str) -> str:
    return (
        "This folder was only written locally. To upload it to the Hugging Face Hub, run in its parent folder:"
        f"\n\n```bash\nhf auth login\nhf upload YOUR_NAME/{folder_name} {folder_name}\n```"
    )


def _limits(info: Mapping, is_chat: bool) -> str:
    rows = ["- It is a small model: it makes up facts and can repeat anything from its data, including unkind text."]
    rows.append(f"- Its context is {info['model']['block_size']:,} tokens; shorten longer input.")
    if is_chat:
        rows.append(
            "- If a message contains the text of a control token, such as `<|im_end|>`, transformers' "
            "`apply_chat_template` turns it into that token, so a user can forge turns. Jojo's own `encode_chat` keeps "
            "it as text. Elsewhere, remove `<|im_start|>`, `<|im_end|>` and `<|endoftext|>` from what users type."
        )
    return "\n".join(rows)


def modelfile(gguf_file: str, block_size: int, is_chat: bool, sampling: Sampling) -> str:
    """Ollama's Modelfile for a GGUF file in the same folder: chat template (in Go's syntax), stop tokens, sampling."""
    lines = [f"FROM ./{gguf_file}"]
    if is_chat:
        turns = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        lines += [f'TEMPLATE """{turns}<|im_start|>assistant\n"""', 'PARAMETER stop "<|im_end|>"']
    else:
        lines.append('TEMPLATE """<|endoftext|>{{ .Prompt }}"""')
    lines += ['PARAMETER stop "<|endoftext|>"', f"PARAMETER num_ctx {block_size}"]
    lines += [f"PARAMETER temperature {sampling.temperature}", f"PARAMETER top_k {sampling.top_k}"]
    return "\n".join(lines) + "\n"
