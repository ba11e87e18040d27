"""The merges that the scores or ranks of a vocabulary imply."""

from textdata.bpe_merges import rank_merges, sentencepiece_merges
from textdata.sentencepiece_tokenizer import CONTROL, NORMAL


def test_ranks_give_every_merge_in_order():
    ranks = [b"a", b"b", b"c", b" ", b"ab", b"abc", b"bc", b" a"]
    assert rank_merges(ranks) == [("a", "b"), ("a", "bc"), ("ab", "c"), ("b", "c"), ("Ġ", "a")]


def test_scores_give_every_merge_of_normal_pieces():
    """The best score is first; pieces of equal scores follow the ids of their parts."""
    pieces = [
        ("<s>", 0.0, CONTROL),
        ("b", -9.0, NORMAL),
        ("a", -9.0, NORMAL),
        ("ab", -2.0, NORMAL),
        ("ba", -2.0, NORMAL),
        ("aba", -1.0, NORMAL),
        ("bab", 0.0, CONTROL),
    ]
    assert sentencepiece_merges(pieces) == [("a", "ba"), ("ab", "a"), ("b", "a"), ("a", "b")]
