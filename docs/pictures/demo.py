"""Draw demo.png, the picture at the top of the README: a chat in a terminal beside the loss curve of its model.

    python docs/pictures/demo.py

Both come from one real run, chitchat900 of docs/tutorial.md: the chat is copied from section 8, the curve is the upper
part of tutorial-loss.png, which train.py drew.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parent
CURVE_HEIGHT = 0.56  # of tutorial-loss.png: the loss; the learning rate and the gradient norm are below it
BACKGROUND, PROMPT, USER, REPLY = "#1b1f27", "#8b949e", "#e6edf3", "#7ee787"
CHAT = (
    (PROMPT, "$ python gen.py --chat"),
    (USER, "you:  Hello!"),
    (REPLY, "jojo: Hello! How can I help you today?"),
    (USER, "you:  My name is Priya."),
    (REPLY, "jojo: Nice to meet you, Priya! How are you?"),
    (USER, "you:  What is my name?"),
    (REPLY, "jojo: Your name is Priya."),
    (USER, "you:  What is the capital of France?"),
    (REPLY, "jojo: I'm sorry, I do not know that."),
    (REPLY, "      I am only good at small talk."),
)


def main() -> None:
    figure, (terminal, curve) = plt.subplots(
        1, 2, figsize=(12, 3.6), dpi=120, gridspec_kw={"width_ratios": (1, 1), "wspace": 0.02}
    )
    figure.subplots_adjust(left=0.005, right=0.995, top=0.99, bottom=0.01)
    terminal.set(xlim=(0, 1), ylim=(len(CHAT), -1.2), facecolor=BACKGROUND, xticks=[], yticks=[])
    for x, colour in enumerate(("#ff5f57", "#febc2e", "#28c840")):  # the buttons of a window
        terminal.plot(0.03 + 0.03 * x, -0.75, "o", color=colour, markersize=6)
    for line, (colour, text) in enumerate(CHAT):
        terminal.text(0.03, line, text, color=colour, family="monospace", fontsize=12.5, va="center")
    picture = plt.imread(FOLDER / "tutorial-loss.png")
    curve.imshow(picture[: round(picture.shape[0] * CURVE_HEIGHT)], aspect="auto", interpolation="lanczos")
    curve.axis("off")
    figure.savefig(FOLDER / "demo.png")


if __name__ == "__main__":
    main()
