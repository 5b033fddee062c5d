"""Sentences of four domains, rated by at least twenty people each (Hutto and Gilbert, ICWSM 2014).

Tweets, Amazon reviews, film reviews and New York Times editorials. The label is the sign of the
mean rating (-4 to 4); sentences within 0.5 of zero are left out.
"""

from __future__ import annotations

from datasets import Dataset

from fedlora.assets.fetch import asset_path
from fedlora.data.split import normalised

FILES = {
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
NEUTRAL = 0.5
"""Ratings of at most this size have no label."""


def sentiment_table() -> Dataset:
    """19,136 rows with text, label (negative or positive), domain and group.

    The group is the review (amazon) or the article (nyt) that a sentence comes from; elsewhere a
    sentence stands alone and its group is its normalised text.
    """
    rows = [row for domain in FILES for row in _rows(domain)]
    return Dataset.from_list(rows)


def _rows(domain: str) -> list[dict[str, str]]:
    content = (asset_path("sentiment") / FILES[domain]).read_text(encoding="utf-8", errors="replace")
    rows = []
    for line in content.splitlines():
        identity, rating, text = line.split("\t", 2)
        if abs(float(rating)) > NEUTRAL:
            document = f"{domain}/{identity.split('_')[0]}"
            rows.append(
                {
                    "text": text.strip(),
                    "label": "positive" if float(rating) > 0 else "negative",
                    "domain": domain,
                    "group": document if domain in ("amazon", "nyt") else normalised(text),
                }
            )
    return rows
