"""Words for the pictures: varied prompts for one combination, and a tokenizer that knows their words.

The tokenizer is a byte-level CLIP one with a vocabulary of its own: every word used here is one token,
anything else falls apart into letters, so that no text is ever refused.
"""

from __future__ import annotations

import numpy as np
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

MAX_TOKENS = 32  # the text encoder's length, start and end included; the longest prompt here has 24
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"

# The first word is the one the package names; the others are what people also call it.
OBJECT_WORDS: dict[str, tuple[str, ...]] = {
    "potion": ("potion", "potion bottle", "flask", "elixir"),
    "sword": ("sword", "blade"),
    "shield": ("shield",),
    "key": ("key",),
    "heart": ("heart", "life heart"),
    "gem": ("gem", "diamond", "crystal", "jewel"),
    "mushroom": ("mushroom", "toadstool"),
    "tree": ("tree", "pine tree", "fir"),
    "chest": ("chest", "treasure chest"),
    "ghost": ("ghost", "spirit"),
    "star": ("star",),
    "fish": ("fish",),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "cyan": ("cyan", "turquoise", "teal"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
}
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "grass": ("grass", "meadow"),
    "sky": ("sky", "cloudy sky"),
    "stone": ("stone", "stone wall", "dungeon"),
    "night": ("night", "night sky", "dark"),
    "sand": ("sand", "desert", "beach"),
    "white": ("white", "plain white"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "grass": ("on grass", "in the grass", "on a meadow"),
    "sky": ("in the sky", "against the sky", "in the clouds"),
    "stone": ("on stone", "against a stone wall", "in a dungeon"),
    "night": ("at night", "in the night", "under the stars at night"),
    "sand": ("on sand", "in the sand", "on the beach", "in the desert"),
    "white": ("on white", "on a white background", "on plain white"),
}
STYLES = (
    "game sprite",
    "pixel art",
    "game asset",
    "icon",
    "game icon",
    "sprite",
    "64x64",
    "item",
    "high quality",
    "simple",
    "detailed",
    "2d game art",
    "cartoon",
    "clean outline",
)
ADJECTIVES = (
    "cute",
    "small",
    "big",
    "shiny",
    "magic",
    "old",
    "little",
    "pretty",
    "single",
    "ancient",
    "glowing",
    "round",
)
TEMPLATES = (
    "a {colour} {thing}, {ground} background, game sprite",
    "{colour} {thing}, {ground} background",
    "a {colour} {thing} {place}",
    "{colour} {thing} {place}",
    "{ground} background, a {colour} {thing}",
    "a picture of a {colour} {thing} {place}",
    "the {thing} is {colour}, {ground} background",
    "a {thing} in {colour}, {place}",
)
OTHER_WORDS = (
    "an",
    "with",
    "and",
    "of",
    "to",
    "for",
    "by",
    "no",
    "not",
    "blurry",
    "bad",
    "low",
    "drawing",
    "image",
    "render",
    "art",
    "style",
    "colored",
    "coloured",
    "bright",
    "light",
    "centered",
    "isolated",
)


def _pick(rng: np.random.Generator, words: tuple[str, ...], first_share: float) -> str:
    """The first word with that probability, else any."""
    return words[0] if rng.random() < first_share else str(words[rng.integers(len(words))])


def _noise_word(rng: np.random.Generator) -> str:
    return "".join(chr(97 + int(letter)) for letter in rng.integers(0, 26, rng.integers(2, 7)))


def random_prompt(rng: np.random.Generator, colour: str, thing: str, background: str) -> str:
    """One way of asking for the picture; now and then a word is left unsaid, or a stray one slips in."""
    template = str(TEMPLATES[0] if rng.random() < 0.2 else TEMPLATES[rng.integers(len(TEMPLATES))])
    said_background = rng.random() < 0.94
    if not said_background:
        template = "a {colour} {thing}"
    adjective = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]} " if rng.random() < 0.15 else ""
    said_colour = rng.random() < 0.95
    if not said_colour:
        template = template.replace("{colour} {thing}", "{thing}").replace(" in {colour}", "")
        template = template.replace("is {colour}", "is here")
    if rng.random() < 0.03:
        template = "{ground} background"
    prompt = template.format(
        colour=_pick(rng, COLOUR_WORDS[colour], 0.85),
        thing=adjective + _pick(rng, OBJECT_WORDS[thing], 0.8),
        ground=_pick(rng, BACKGROUND_WORDS[background], 0.8),
        place=PLACES[background][rng.integers(len(PLACES[background]))],
    )
    if rng.random() < 0.4:
        prompt += ", " + STYLES[rng.integers(len(STYLES))]
    if rng.random() < 0.08:
        words = prompt.split(" ")
        words.insert(int(rng.integers(len(words) + 1)), _noise_word(rng))
        prompt = " ".join(words)
    return prompt


def vocabulary_words() -> list[str]:
    """Every word that deserves a token, the important ones first."""
    phrases: list[str] = []
    for table in (OBJECT_WORDS, COLOUR_WORDS, BACKGROUND_WORDS, PLACES):
        phrases += [phrase for options in table.values() for phrase in options]
    phrases += [*STYLES, *ADJECTIVES, *OTHER_WORDS]
    phrases += [template.replace("{", " ").replace("}", " ") for template in TEMPLATES]
    words = [word.strip(",") for phrase in phrases for word in phrase.split()]
    return list(dict.fromkeys(word for word in words if word.isalpha()))


def _pieces(word: str, tokens: list[str], merges: list[tuple[str, str]]) -> list[str]:
    model = BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix=WORD_END,
    )
    return [token.value for token in model.tokenize(word)]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of all bytes plus the merges that make each known word one token."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in vocabulary_words():
        # Merges are tried in order of age, so later ones never change an earlier word: start from
        # what the merges so far make of this word and join from the left, one merge at a time.
        while len(pieces := _pieces(word, tokens, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
            tokens.append(pieces[0] + pieces[1])
    tokens += [START, END]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS
    )
    for word in vocabulary_words():
        if len(tokenizer(word).input_ids) != 3:
            raise AssertionError(f"{word!r} is not one token")
    return tokenizer
