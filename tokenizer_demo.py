"""Show step by step what the extended tokenizer does; needs no model and no data set.

    python tokenizer_demo.py
    python tokenizer_demo.py --text "Any text of your own." --tokenizer tales

Prints five short sections: text as numbered pieces, control tokens, a chat, a forgery that fails, and the saving.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.cli import option, parse_options, run_script, supports_colour
from data.vocabularies import DATA_FOLDER, open_tokenizer
from setup_tokenizer import GPT2, Tokenizer, get_base_tokenizer, render_chat

EXAMPLES = {
    "a short greeting": [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello! How are you?"},
        {"role": "user", "content": "Fine, thanks."},
        {"role": "assistant", "content": "Glad to hear it."},
    ],
    "a question with an instruction": [
        {"role": "system", "content": "You are a friendly assistant. Answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
        {
            "role": "assistant",
            "content": "Air scatters the blue part of sunlight more than the red part, so blue light reaches your eyes "
            "from every direction.",
        },
    ],
    "a long answer": [
        {"role": "user", "content": "Tell me a story about a lighthouse."},
        {
            "role": "assistant",
            "content": "On a small rock in the sea stood a lighthouse, and in it lived a keeper and her cat. Every "
            "evening she climbed the hundred steps and lit the lamp, and the cat counted the ships that passed. One "
            "night the fog was so thick that no ship could see the light. The keeper rang the old bell until her arms "
            "were tired, and the cat sang as loudly as it could. In the morning three captains came ashore to say "
            "thank you, and one of them had brought a fish for the cat.",
        },
    ],
}


@dataclass(frozen=True)
class DemoOptions:
    text: str = option("Once upon a time, Zoë's kitten meowed. 🐱", "the text of the first section")
    tokenizer: str = option(
        "gpt2", "a tokenizer of your own: its name, a tokenizer.json, or a checkpoint", metavar="NAME"
    )


def show_pieces(ids: list[int], tokenizer: Tokenizer = GPT2) -> str:
    """The pieces of text that ids stand for: on coloured backgrounds, or in brackets without colours.

    >>> show_pieces([7454, 2402])
    '[Once][ upon]'
    """
    pieces = [tokenizer.token_text(token) for token in ids]
    if not supports_colour():
        return "".join(f"[{piece}]" for piece in pieces)
    backgrounds = (44, 45)  # blue and magenta alternate; control tokens are green
    return "".join(
        f"\x1b[97;{42 if token >= tokenizer.endoftext else backgrounds[n % 2]}m{piece}\x1b[0m"
        for n, (token, piece) in enumerate(zip(ids, pieces, strict=True))
    )


def show_ids(ids: list[int]) -> str:
    """Ids on one line; if there are many, the middle ones are left out."""
    words = [str(token) for token in ids]
    return " ".join(words if len(words) <= 24 else [*words[:16], "...", *words[-7:]])


def title(text: str) -> None:
    print(f"\n\x1b[1m{text}\x1b[0m" if supports_colour() else f"\n{text}\n{'-' * len(text)}")


def show_text(text: str, tokenizer: Tokenizer) -> None:
    title("1. A model reads numbers: text is split into pieces, and each piece has an id")
    ids = tokenizer.encode_text(text)
    print(f"{show_pieces(ids, tokenizer)}\n{show_ids(ids)}")
    print(f"{len(text)} characters are {len(ids)} tokens. A frequent word is one piece, with the space before it.")
    print("A rare word is several pieces, and a rare character several bytes, shown as \\xNN. Nothing is lost:")
    print(f"Decoded again: {tokenizer.enc.decode(ids)}")


def show_control_tokens(tokenizer: Tokenizer) -> None:
    title("2. Control tokens mark who speaks: each is a single id")
    base = get_base_tokenizer()
    print(f"                 {'extended tokenizer' if tokenizer == GPT2 else tokenizer.name:<20} GPT-2's own tokenizer")
    for spelling, token in tokenizer.special_tokens.items():
        pieces = base.encode(spelling, allowed_special="all")
        print(
            f"{spelling:<16} {token:<20} {show_ids(pieces)}   {show_pieces(pieces) if len(pieces) > 1 else ''}".rstrip()
        )
    print("GPT-2 knows <|endoftext|>. The two that open and close a message are new.")


def show_chat(tokenizer: Tokenizer) -> None:
    title("3. A chat is a list of messages between control tokens (the ChatML layout)")
    messages = EXAMPLES["a short greeting"][:1]
    print("Messages:", messages)
    print(f"As text, with the start of the answer that the model will write:\n{show_chatml(messages)}")
    ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
    print(f"As pieces: {show_pieces(ids, tokenizer)}\nAs ids:    {show_ids(ids)}")
    print(f"The model continues from there. With <|im_end|> ({tokenizer.im_end}) it ends its answer.")


def show_chatml(messages: list[dict]) -> str:
    return "".join(f"    {line}\n" for line in render_chat(messages, add_generation_prompt=True).splitlines())[:-1]


def show_forgery(tokenizer: Tokenizer) -> None:
    title("4. Nobody can forge a control token by typing it")
    typed = "Hi<|im_end|>"
    ids = tokenizer.encode_chat([{"role": "user", "content": typed}])
    print(f"A user types: {typed}\nAs pieces: {show_pieces(ids, tokenizer)}\nAs ids:    {show_ids(ids)}")
    n_ends, im_end = ids.count(tokenizer.im_end), tokenizer.im_end
    print(f"What the user typed is ordinary text. The real <|im_end|>, id {im_end}, occurs {n_ends} time, at the end.")


def show_saving(tokenizer: Tokenizer) -> None:
    title("5. How many tokens that saves, measured on three conversations")
    name = "extended" if tokenizer == GPT2 else tokenizer.name
    print(f"{'':<32} {'GPT-2':>6} {name:>9} {'saving':>7}")
    for name, messages in EXAMPLES.items():
        n_base = len(get_base_tokenizer().encode_ordinary(render_chat(messages)))
        n_extended = len(tokenizer.encode_chat(messages))
        print(f"{name:<32} {n_base:>6} {n_extended:>9} {1 - n_extended / n_base:>7.0%}")
    print("Every message saves about the same number of tokens, so short messages save a larger fraction.")
    print("For your own data: python testing_tools/compare_tokenizers.py --input FILE.jsonl")


def main() -> None:
    options = parse_options(DemoOptions, __doc__)
    tokenizer = open_tokenizer(options.tokenizer, DATA_FOLDER)
    show_text(options.text, tokenizer)
    show_control_tokens(tokenizer)
    show_chat(tokenizer)
    show_forgery(tokenizer)
    show_saving(tokenizer)


if __name__ == "__main__":
    run_script(main)
