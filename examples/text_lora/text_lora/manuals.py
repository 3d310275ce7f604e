"""Sentences for those who have no data yet; the question is which of two manuals each is from.

Both are on every machine that runs this: Python's language reference, which CPython ships as the topics of
`help()`, and NumPy's docstrings. Which sentences there are depends a little on the two's versions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pydoc_data.topics import topics

import numpy as np

CHAPTERS = (
    np,
    np.linalg,
    np.fft,
    np.random,
    np.random.Generator,
    np.ma,
    np.ma.MaskedArray,
    np.strings,
    np.ndarray,
)
SECTION = re.compile(r"^.*\n\s*-{3,}$", re.MULTILINE)
SENTENCE = re.compile(r"[A-Z][\w ,;()'./-]+[a-z)]\.")
"""Prose, not code: no operator, bracket, quote or backtick."""


def load() -> tuple[list[str], list[str]]:
    """Return Python's sentences and NumPy's, as many of each, without those that both have."""
    first, second = sentences(topics.values()), sentences(docstrings())
    python = [text for text in first if text not in second]
    numpy = [text for text in second if text not in first]
    size = min(len(python), len(numpy))
    return python[:size], numpy[:size]


def docstrings() -> list[str]:
    """Return the docstrings of NumPy's public functions, classes and methods."""
    texts = (getattr(chapter, name).__doc__ for chapter in CHAPTERS for name in dir(chapter) if name[0] != "_")
    return [inspect.cleandoc(text) for text in texts if isinstance(text, str)]


def sentences(texts: Iterable[str]) -> dict[str, None]:
    """Return the sentences of 6 to 30 words in `texts`, each once, in their order."""
    paragraphs = (paragraph for text in texts for paragraph in re.split(r"\n\s*\n", SECTION.sub("", text)))
    plain = (" ".join(re.sub(r'[*"`]', "", paragraph).replace("’", "'").split()) for paragraph in paragraphs)
    found = (sentence for text in plain for sentence in re.split(r"(?<=\.) ", text))
    return {text: None for text in found if SENTENCE.fullmatch(text) and 6 <= len(text.split()) <= 30}
